"""How long does a large log take? Fit the default families on a skewed synthetic log, then time requests.

    python eval/scale.py                                     # 10 M events, 100 k items, 400 k users
    python eval/scale.py --events 1000000 --items 20000 --users 50000

Items have a taste each, popularity falls with rank as Zipf's law says, lengths of histories are log-normal,
and seven of ten events are of the user's three tastes. Texts are words of the item's taste. Prints and
writes eval/results/scale.json: the second at which each stage began, peak memory, and milliseconds a
request on one core, single and in batches of 64. Every retriever is asked for 200 candidates; 200 are
returned, each with its sources, or the ten best.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from llmrec import Recommender, Request
from llmrec.environment import environment
from llmrec.evaluation.run import peak_memory_mb

CANDIDATES, SHOWN = 200, 10
BATCH = 64


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


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=400_000)
    parser.add_argument("--encoder", default="light", help="light, or the name of a sentence encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    args = parser.parse_args(argv)
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
    result = {
        "events": rows,
        "items": args.items,
        "users": args.users,
        "encoder": args.encoder,
        "seed": args.seed,
        "fit_seconds": stages["fitted"],
        "started_at_seconds": stages,
        "peak_memory_mb": round(peak_memory_mb()),
        "candidates": CANDIDATES,
        "all_returned": milliseconds(recommender, requests),
        "ten_returned": milliseconds(recommender, [replace(request, k=SHOWN) for request in requests]),
        "environment": environment(),
    }
    args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}))


if __name__ == "__main__":
    main()
