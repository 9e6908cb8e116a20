"""How much load does a server carry? Real server processes, clients over HTTP, one machine.

    python eval/load.py                                        # 10 k and 100 k items, about an hour
    python eval/load.py --items 2000 --seconds 5 --mixed-minutes 1

For each size a recommender is fitted on a synthetic log and saved; then a language model is tuned for some
steps and given a weight, so that it takes part: its quality is of no account here, its time is. Measured are

- requests a second and p50, p95, p99 at each number of concurrent clients, without the model and with it;
- milliseconds a request in batches against one by one, in the process itself;
- p99 and the share of degraded answers for each `budget_ms`, at the largest number of clients;
- a mixed load with writes (three of four requests recommend, the others search, store events, put items), of
  the language model where there is one: errors, and whether the memory of the server stays flat.

Writes eval/results/load.json with machine, versions and command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

from llmrec import Event, Item, Recommender, Request
from llmrec.config import Config
from llmrec.environment import environment

LM_WEIGHT = 0.5
Answer = tuple[float, int, bool]
"""Seconds, status (0 for no answer), whether it was degraded."""


def synthetic(items: int, users: int, seed: int) -> tuple[list[Item], list[Event]]:
    """Items of some tastes, and users who mostly go on to the next item of a taste."""
    rng = np.random.default_rng(seed)
    words = [f"word{n}" for n in range(500)]
    catalogue = [
        Item(str(n), f"{' '.join(rng.choice(words, 4))} number {n}", attributes={"shelf": f"s{n % 50}"})
        for n in range(items)
    ]
    starts = (items * rng.random(users) ** 2).astype(int)
    steps = rng.integers(1, 4, (users, 20)).cumsum(axis=1)
    chosen = (starts[:, None] + steps) % items
    lengths = rng.integers(5, 21, users)
    events = [
        Event(f"u{user}", str(item), 1_700_000_000 + 3600 * n)
        for user in range(users)
        for n, item in enumerate(chosen[user, : lengths[user]].tolist())
    ]
    return catalogue, events


@contextmanager
def serving(model: Path, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run `llmrec serve` and give its URL once it is ready, and its process."""
    command = [sys.executable, "-m", "llmrec.cli", "serve", str(model), "--port", "0"]
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            url = _until(process, lambda: re.search(r"http://\S+:\d+", log.read_text()), log).group()
            _until(process, lambda: httpx2.get(f"{url}/ready", timeout=60).status_code == 200, log)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def _until(process: subprocess.Popen[bytes], found: Callable[[], Any], log: Path) -> Any:
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the server ended: {log.read_text()}")
        if value := found():
            return value
        time.sleep(0.1)


async def _client(
    http: httpx2.AsyncClient, make: Callable[[], tuple[str, str, Any]], until: float
) -> list[Answer]:
    answers = []
    while time.perf_counter() < until:
        method, path, body = make()
        begun = time.perf_counter()
        try:
            answer = await http.request(method, path, json=body)
            degraded = answer.status_code == 200 and answer.json().get("degraded", False)
            answers.append((time.perf_counter() - begun, answer.status_code, degraded))
        except httpx2.HTTPError:
            answers.append((time.perf_counter() - begun, 0, False))
    return answers


def drive(
    url: str, clients: int, seconds: float, make: Callable[[], tuple[str, str, Any]]
) -> tuple[list[Answer], float]:
    """Let clients ask, each as soon as it has its answer; return all answers and how long it took."""

    async def run() -> list[list[Answer]]:
        limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            until = time.perf_counter() + seconds
            return await asyncio.gather(*(_client(http, make, until) for _ in range(clients)))

    begun = time.perf_counter()
    found = asyncio.run(run())
    return [answer for one in found for answer in one], time.perf_counter() - begun


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Requests a second, percentiles of the time to answer, statuses that are no success, share degraded."""
    times = 1000 * np.array([answer[0] for answer in answers])
    bad = Counter(str(status) for _, status, _ in answers if not 200 <= status < 300)
    return {
        "requests": len(answers),
        "a_second": round(len(answers) / seconds, 1),
        **{f"p{q}_ms": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)},
        "degraded": round(sum(degraded for *_, degraded in answers) / len(answers), 4),
        "errors": dict(bad),
    }


def asking(users: int, seed: int, budget_ms: float | None = None) -> Callable[[], tuple[str, str, Any]]:
    """Requests of users in no order."""
    choose = random.Random(seed)

    def make() -> tuple[str, str, Any]:
        body: dict[str, Any] = {"user": f"u{choose.randrange(users)}", "k": 10}
        if budget_ms is not None:
            body["budget_ms"] = budget_ms
        return "POST", "/v1/recommend", body

    return make


def mixing(items: int, users: int, seed: int) -> Callable[[], tuple[str, str, Any]]:
    """Mostly requests, some writes; items are put again and again, so that the catalogue does not grow."""
    choose, ask = random.Random(seed), asking(users, seed + 1)

    def make() -> tuple[str, str, Any]:
        drawn = choose.random()
        if drawn < 0.75:
            return ask()
        if drawn < 0.85:
            return "POST", "/v1/search", {"query": f"word{choose.randrange(500)}", "k": 10}
        if drawn < 0.99:
            event = {"user_id": f"u{choose.randrange(users)}", "item_id": str(choose.randrange(items))}
            return "POST", "/v1/events", event
        number = choose.randrange(100)
        return "PUT", f"/v1/items/put{number}", {"title": f"word{choose.randrange(500)} put {number}"}

    return make


def mixed(url: str, process: psutil.Process, args: argparse.Namespace, items: int) -> dict[str, Any]:
    """Drive the mixed load in ten parts; memory of the server after each, in MB."""
    make, memory = mixing(items, args.users, args.seed), []
    answers: list[Answer] = []
    seconds = 0.0
    for _ in range(10):
        found, took = drive(url, max(args.clients), 6 * args.mixed_minutes, make)
        answers += found
        seconds += took
        memory.append(round(process.memory_info().rss / 2**20, 1))
    return {
        **summary(answers, seconds),
        "clients": max(args.clients),
        "memory_mb": memory,
        # The first fifth fills caches.
        "growth_mb": round(memory[-1] - memory[2], 1),
    }


def by_batch(recommender: Recommender, users: int, count: int) -> dict[str, float]:
    """Median milliseconds a request in the process, one by one and in batches of 32."""
    requests = [Request(user=f"u{n % users}") for n in range(count)]
    recommender.recommend_many(requests[:2])
    single, batch = [], []
    for request in requests[: count // 2]:
        begun = time.perf_counter()
        recommender.recommend(request)
        single.append(time.perf_counter() - begun)
    for start in range(count // 2, count, 32):
        part = requests[start : start + 32]
        begun = time.perf_counter()
        recommender.recommend_many(part)
        batch.append((time.perf_counter() - begun) / len(part))
    return {
        "single_ms": round(1000 * float(np.median(single)), 2),
        "batch_of_32_ms": round(1000 * float(np.median(batch)), 2),
    }


def fitted(items: int, args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Save a recommender without a language model and, unless that is left out, one with it."""
    config = Config.of(args.config) if args.config else Config.of({"encoder": {"name": "light"}})
    config = config.with_flags(retrieval={"search": False}, training={"minutes": None, "steps": args.steps})
    made = Recommender.fit(*synthetic(items, args.users, args.seed), config)
    made.save(folder / "plain")
    models = {"without": folder / "plain"}
    if not args.no_lm:
        made.finetune(folder=folder / "run")
        # A weight whatever the held-out events say: what is measured is the time.
        weighed = replace(made.recipe, history=made.recipe.history.with_lm(LM_WEIGHT))
        made._state = replace(made._state, recipe=weighed)
        made.save(folder / "lm")
        models["with"] = folder / "lm"
    made.close()
    return models


def measure(items: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything at one size of the catalogue."""
    result: dict[str, Any] = {"items": items}
    for name, model in fitted(items, args, folder).items():
        recommender = Recommender.load(model)
        found: dict[str, Any] = {"in_process": by_batch(recommender, args.users, args.in_process)}
        recommender.close()
        with serving(model, folder / f"{name}.log") as (url, process):
            drive(url, 1, min(2.0, args.seconds), asking(args.users, args.seed))
            found["clients"] = {
                n: summary(*drive(url, n, args.seconds, asking(args.users, args.seed + n)))
                for n in args.clients
            }
            if name == "with":
                found["budgets_ms"] = {
                    f"{budget:g}": summary(
                        *drive(url, max(args.clients), args.seconds, asking(args.users, args.seed, budget))
                    )
                    for budget in args.budgets
                }
            if name == "with" or args.no_lm:
                found["mixed"] = mixed(url, process, args, items)
        print(json.dumps({"items": items, "language_model": name, **found}), flush=True)
        result[f"{name}_language_model"] = found
    return result


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--budgets", type=float, nargs="+", default=[25, 50, 100, 250, 1000], help="ms")
    parser.add_argument("--mixed-minutes", type=float, default=10.0)
    parser.add_argument("--in-process", type=int, default=640, help="requests in the process itself")
    parser.add_argument(
        "--config", type=Path, help="TOML file of the recommender; the light encoder if not given"
    )
    parser.add_argument("--steps", type=int, default=20, help="of fine-tuning")
    parser.add_argument("--no-lm", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "load.json")
    args = parser.parse_args(argv)
    sizes = []
    for items in args.items:
        with tempfile.TemporaryDirectory(prefix="llmrec-load-") as folder:
            sizes.append(measure(items, args, Path(folder)))
    given = list(map(str, sys.argv[1:] if argv is None else argv))
    if "--out" in given:
        # Where the file lies says nothing of what was measured.
        at = given.index("--out")
        given = given[:at] + given[at + 2 :]
    result = {
        "command": " ".join(["python eval/load.py", *map(str, given)]),
        "users": args.users,
        "seconds_each": args.seconds,
        "mixed_minutes": args.mixed_minutes,
        "sizes": sizes,
        "environment": environment(),
    }
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(args.out)


if __name__ == "__main__":
    main()
