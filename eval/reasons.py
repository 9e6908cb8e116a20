"""Are reasons faithful? Delete what a reason names, and see how far the item falls in the served list.

    python eval/reasons.py --model demo-model --users 200

For users of a saved recommender, the first items of their list are explained. Of each item whose reason names
a history item, three histories are asked anew: without the item that the reason names first, without a random
other one, and without the most recent one. Faithful reasons cost the item more places than the others do.
Where the most recent item is the one that the reason names, the pair says nothing and is left out. Writes
eval/results/reasons.json, with the share of items that have evidence and the time that reasons take; with
--phrased, also how many sentences the language model may keep.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmrec import Recommendation, Recommender, Request
from llmrec.environment import environment
from llmrec.metrics import compare_values

LISTED = 200
"""Length of the list in which an item is sought; one that is not there has the place behind it."""


def without(history: list[str], item: str) -> list[str]:
    """A history without an item."""
    return [other for other in history if other != item]


def fall(recommender: Recommender, history: list[str], one: Recommendation, item: str) -> float:
    """How much the logarithm of the rank grows where a history item is deleted."""
    # The deleted item could come back itself; where it does, it takes no place from the others.
    shorter = without(history, item)
    found = recommender.recommend(history=shorter, k=LISTED, exclude=[item])
    after = next((other.rank for other in found if other.item_id == one.item_id), LISTED + 1)
    return float(np.log2(after / one.rank))


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved recommender")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--shown", type=int, default=3, help="items of each list that are explained")
    parser.add_argument("--phrased", type=int, default=0, help="users whose reasons the model phrases too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reasons.json")
    args = parser.parse_args(argv)
    recommender, rng = Recommender.load(args.model), np.random.default_rng(args.seed)
    users = recommender.users("", 10**9)
    users = [users[i] for i in rng.permutation(len(users))[: args.users]]
    falls: dict[str, list[tuple[int, float, float]]] = {"random": [], "most recent": []}
    named, shown, seconds, plain = 0, 0, [], []
    kept, asked = 0, 0
    for number, user in enumerate(users):
        history = list(dict.fromkeys(event.item_id for event in recommender.history(user)[-50:]))
        if len(history) < 3:
            continue
        begun = time.perf_counter()
        recommender.recommend(Request(history=history, k=args.shown))
        plain.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        found = recommender.recommend(Request(history=history, k=args.shown, explain=True))
        seconds.append(time.perf_counter() - begun)
        if number < args.phrased:
            asked += sum(bool(one.reason and one.reason.history) for one in found)
            kept += sum(bool(one.reason and one.reason.worded) for one in recommender.phrase(found))
        for one in found:
            shown += 1
            if one.reason is None or not one.reason.history:
                continue
            named += 1
            first = one.reason.history[0].item_id
            own = fall(recommender, history, one, first)
            # Among those that were left out one at a time.
            others = without(history[-20:], first)
            if others:
                other = others[int(rng.integers(len(others)))]
                falls["random"].append((number, own, fall(recommender, history, one, other)))
            if history[-1] != first:
                falls["most recent"].append((number, own, fall(recommender, history, one, history[-1])))
    result: dict[str, Any] = {
        "command": " ".join(["python eval/reasons.py", *(sys.argv[1:] if argv is None else argv)]),
        "users": len(seconds),
        "items": shown,
        "with_history_in_evidence": round(named / max(shown, 1), 4),
        "median_ms": {
            "without_reasons": round(1000 * float(np.median(plain)), 2),
            "with_reasons": round(1000 * float(np.median(seconds)), 2),
        },
        "doublings_of_the_rank": {},
        "environment": environment(),
    }
    for name, pairs in falls.items():
        number, own, other = np.array(pairs, dtype=np.float64).reshape(-1, 3).T
        # Items of one user fall alike: users are what is resampled.
        _, user = np.unique(number, return_inverse=True)
        own, other = (np.bincount(user, falls) / np.maximum(np.bincount(user), 1) for falls in (own, other))
        compared = compare_values(own - other, "evidence", name, "log2 rank", seed=args.seed)
        result["doublings_of_the_rank"][f"evidence against {name}"] = {
            "pairs": len(pairs),
            "users": len(own),
            "evidence": round(float(own.mean()), 4) if len(own) else 0.0,
            name: round(float(other.mean()), 4) if len(other) else 0.0,
            "difference": round(compared.difference, 4),
            "ci95": [round(compared.low, 4), round(compared.high, 4)],
        }
    if args.phrased:
        result["phrased"] = {"asked": asked, "kept": kept}
    draft = args.out.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(args.out)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
