"""How long does a large log take? Fit the default families on a skewed synthetic log, then time requests.

    python eval/scale.py                                     # 10 M events, 100 k items, 400 k users
    python eval/scale.py --events 1000000 --items 20000 --users 50000
    python eval/scale.py --events 2000000 --items 20000 --users 100000 --batch 100000
    python eval/scale.py --grid        # 1 k to 1 M items, 1 M to 10 M events; goes on if killed

Items have a taste each, popularity falls with rank as Zipf's law says, lengths of histories are log-normal,
and seven of ten events are of the user's three tastes. Texts are words of the item's taste. Prints and
writes eval/results/scale.json: the second at which each stage began, peak memory, and milliseconds a
request on one core, single and in batches of 64. Every retriever is asked for 200 candidates; 200 are
returned, each with its sources, or the ten best. With --batch, `llmrec batch recommend` answers so many
users from the saved model. The grid runs each size in a process of its own, and writes
eval/results/scale-grid.json, with the exponent by which each stage grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from llmrec import Recommender, Request
from llmrec.environment import environment
from llmrec.evaluation.run import peak_memory_mb
from llmrec.index.making import make_index

HERE = Path(__file__).resolve().parent
CANDIDATES, SHOWN = 200, 10
BATCH = 64

BY_ITEMS = [(1_000_000, items) for items in (1_000, 10_000, 100_000, 1_000_000)]
BY_EVENTS = [(events, 100_000) for events in (1_000_000, 3_000_000, 10_000_000)]
SHORT = 0.5
"""Seconds of a stage below this say nothing about growth."""


def synthetic(events: int, items: int, users: int, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Items and events as tables."""
    rng = np.random.default_rng(seed)
    tastes = max(3, items // 200)
    taste = np.sort(rng.integers(0, tastes, items))
    weight = rng.permutation(1.0 / np.arange(1, items + 1))
    cumulative = np.append(0.0, np.cumsum(weight))
    bounds = np.searchsorted(taste, np.arange(tastes + 1))

    length = rng.lognormal(0.0, 1.0, users)
    length = np.maximum(3, (length * events / length.sum()).astype(np.int64))
    user = np.repeat(np.arange(users), length)
    liked = rng.integers(0, tastes, (users, 3))[user, rng.integers(0, 3, len(user))]
    own = (rng.random(len(user)) < 0.7) & (bounds[liked] < bounds[liked + 1])
    low = np.where(own, cumulative[bounds[liked]], 0.0)
    high = np.where(own, cumulative[bounds[liked + 1]], cumulative[-1])
    drawn = low + rng.random(len(user)) * (high - low)
    item = np.clip(np.searchsorted(cumulative, drawn, side="right") - 1, 0, items - 1)

    words = np.array([f"word{n}" for n in range(5 * tastes)])
    chosen = words[5 * taste[:, None] + rng.integers(0, 5, (items, 3))]
    titles = [f"{' '.join(row)} number {n}" for n, row in enumerate(chosen)]
    start = rng.integers(1_500_000_000, 1_600_000_000, users)[user]
    order = np.arange(len(user)) - np.repeat(np.cumsum(length) - length, length)
    table = {"user_id": user.astype(str), "item_id": item.astype(str), "timestamp": start + 3600 * order}
    return pl.DataFrame({"item_id": np.arange(items).astype(str), "title": titles}), pl.DataFrame(table)


def milliseconds(recommender: Recommender, requests: list[Request]) -> dict[str, float]:
    """Median milliseconds a request on one core, single and in batches."""
    with threadpool_limits(1):
        faiss.omp_set_num_threads(1)
        single, batch = [], []
        for request in requests[:50]:
            begun = time.perf_counter()
            recommender.recommend(request)
            single.append(time.perf_counter() - begun)
        for start in range(0, len(requests) - BATCH + 1, BATCH):
            begun = time.perf_counter()
            recommender.recommend_many(requests[start : start + BATCH])
            batch.append((time.perf_counter() - begun) / BATCH)
    return {
        "single_ms": round(1000 * float(np.median(single)), 2),
        "single_p95_ms": round(1000 * float(np.quantile(single, 0.95)), 2),
        "batch_ms": round(1000 * float(np.median(batch)), 2),
    }


def batched(recommender: Recommender, users: int) -> dict[str, float | None]:
    """Seconds and peak memory of `llmrec batch recommend` for so many users, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="llmrec-scale-") as name:
        folder = Path(name)
        recommender.save(folder / "model")
        asked = recommender.users(limit=users)
        pl.DataFrame({"user_id": asked}).write_parquet(folder / "users.parquet")
        command = [sys.executable, "-m", "llmrec.cli", "batch", "recommend", str(folder / "model")]
        command += ["--out", str(folder / "out"), "--users", str(folder / "users.parquet"), "-k", str(SHOWN)]
        begun, peak = time.perf_counter(), None
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = most_memory_mb(process.pid) or peak
            time.sleep(0.1)
        seconds = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        rows = pl.scan_parquet(folder / "out" / "part-*.parquet").select("user_id").collect()
        if rows["user_id"].n_unique() != len(asked):
            raise SystemExit("a user has no recommendation")
    return {
        "users": len(asked),
        "seconds": round(seconds, 1),
        "ms_a_user": round(1000 * seconds / len(asked), 3),
        "peak_memory_mb": peak,
    }


def most_memory_mb(pid: int) -> int | None:
    """Most memory that a running process has held, in MB; None where there is no /proc, or it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) // 1024 if found else None


def durations(started: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each stage, from the second at which each began; lines of one stage together."""
    found: dict[str, float] = {}
    for (stage, begun), (_, later) in itertools.pairwise(started.items()):
        name = stage.split(",")[0].split(":")[0]
        found[name] = round(found.get(name, 0.0) + later - begun, 1)
    return found


def exponent(sizes: Sequence[float], values: Sequence[float], least: float) -> float | None:
    """Slope of log value over log size, by least squares; values below `least` are left out."""
    seen = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if v > 0 and v >= least]
    if len(seen) < 2:
        return None
    return round(float(np.polyfit(*np.array(seen).T, 1)[0]), 2)


def measures(cell: Mapping[str, Any]) -> dict[str, float]:
    """What grows, of one cell."""
    found = {
        **{f"{name}, s": seconds for name, seconds in durations(cell["started_at_seconds"]).items()},
        "fit, s": cell["fit_seconds"],
        "fit, MB": cell["peak_memory_mb"],
        "vector index, s": cell["index_seconds"],
        "request, ms": cell["ten_returned"]["single_ms"],
        "request in batches, ms": cell["ten_returned"]["batch_ms"],
        "batch, ms a user": cell["batch"]["ms_a_user"],
        "batch, MB": cell["batch"]["peak_memory_mb"],
    }
    return {name: value for name, value in found.items() if value is not None}


def growth(cells: Sequence[Mapping[str, Any]], by: str) -> dict[str, Any]:
    """Values and exponents of one axis of the grid."""
    sizes, rows = [cell[by] for cell in cells], [measures(cell) for cell in cells]
    names = [
        name for name in rows[-1] if not name.endswith(", s") or max(r.get(name, 0) for r in rows) >= SHORT
    ]
    table = {name: [row.get(name, 0.0) for row in rows] for name in names}
    return {
        "by": by,
        "sizes": sizes,
        "rows": {
            n: {"values": v, "exponent": exponent(sizes, v, SHORT if n.endswith(", s") else 0.0)}
            for n, v in table.items()
        },
    }


def grid(args: argparse.Namespace) -> None:
    """Run the cells that are missing, each in a process of its own, and write the results file."""
    folder = HERE.parent / "runs" / "scale"
    folder.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for events, items in dict.fromkeys([*BY_ITEMS, *BY_EVENTS]):
        path = folder / f"{events}-{items}-{args.encoder}-{args.seed}.json"
        if not path.is_file():
            print(f"{events:,} events, {items:,} items", flush=True)
            sizes = ["--events", str(events), "--items", str(items), "--users", str(events // 25)]
            command = [sys.executable, __file__, *sizes, "--batch", "10000", "--out", str(path)]
            subprocess.run([*command, "--encoder", args.encoder, "--seed", str(args.seed)], check=True)
        cells[events, items] = json.loads(path.read_text(encoding="utf-8"))
    result = {
        "axes": [
            growth([cells[at] for at in BY_ITEMS], "items"),
            growth([cells[at] for at in BY_EVENTS], "events"),
        ],
        "cells": list(cells.values()),
        "environment": environment(),
    }
    args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=400_000)
    parser.add_argument("--encoder", default="light", help="light, or the name of a sentence encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0, help="users that `llmrec batch recommend` answers")
    parser.add_argument("--grid", action="store_true", help="all cells, and how each stage grows")
    parser.add_argument("--out", type=Path, help="results file; that of the grid or of one run if not given")
    args = parser.parse_args(argv)
    args.out = args.out or HERE / "results" / ("scale-grid.json" if args.grid else "scale.json")
    if args.grid:
        grid(args)
        return
    if args.users < BATCH:
        parser.error(f"requests are timed in batches: at least {BATCH} users")
    stages: dict[str, float] = {}
    begun = time.perf_counter()

    def on_stage(stage: str) -> None:
        stages[stage] = round(time.perf_counter() - begun, 1)
        print(f"{stages[stage]:8.1f} s  {peak_memory_mb():8,.0f} MB  {stage}", flush=True)

    with tempfile.TemporaryDirectory(prefix="llmrec-scale-") as folder:
        items, events = synthetic(args.events, args.items, args.users, args.seed)
        items.write_parquet(f"{folder}/items.parquet")
        events.write_parquet(f"{folder}/events.parquet")
        rows = len(events)
        histories = events.head(60_000).group_by("user_id", maintain_order=True).agg("item_id")["item_id"]
        requests = [Request(history=h[-20:], k=CANDIDATES) for h in histories.to_list()[: 8 * BATCH]]
        del items, events
        begun = time.perf_counter()
        config = {"encoder": {"name": args.encoder}}
        recommender = Recommender.fit(
            f"{folder}/items.parquet", f"{folder}/events.parquet", config, on_stage=on_stage
        )
        on_stage("fitted")
    peak = round(peak_memory_mb())
    begun = time.perf_counter()
    make_index(recommender.texts.vectors, recommender.config.index)
    result = {
        "events": rows,
        "items": args.items,
        "users": args.users,
        "encoder": args.encoder,
        "seed": args.seed,
        "fit_seconds": stages["fitted"],
        "started_at_seconds": stages,
        "index_seconds": round(time.perf_counter() - begun, 2),
        "peak_memory_mb": peak,
        "candidates": CANDIDATES,
        "all_returned": milliseconds(recommender, requests),
        "ten_returned": milliseconds(recommender, [replace(request, k=SHOWN) for request in requests]),
        "environment": environment(),
    }
    if args.batch:
        result["batch"] = batched(recommender, args.batch)
    draft = args.out.with_name(f".{args.out.name}")
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(args.out)
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}))


if __name__ == "__main__":
    main()
