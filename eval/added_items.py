"""Items that came after training: how far from where a retrained model puts them, in each mode.

    python eval/added_items.py --data data/ml-latest-small --config eval/configs/ml-latest-small.toml

A tenth of the items is drawn. Each mode is trained twice for the same number of events: on a log without
the events of the drawn items, which are then known by their text alone, as if added afterwards, and on the
whole training log. Both score the same lists for the same held-out users, a quarter of them drawn items and
the rest others, all at random. The bias is the mean rank of the drawn items in the list after training
without them, less that of the retrained model: 0 without bias, positive where what is new is ranked too
low. Test events are not touched; histories may hold drawn items, as they do when somebody has chosen
something new. Writes eval/results/NAME-added-items.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ablations import RUNS, Prepared, prepare, trained
from numpy.typing import NDArray
from rich.console import Console

from llmrec.config import Config
from llmrec.environment import environment
from llmrec.errors import DataError, LLMRecError
from llmrec.fetch import resolve
from llmrec.metrics import compare_values
from llmrec.protocols import Codes, Floats
from llmrec.recipe import HeldOut

HERE = Path(__file__).resolve().parent
MODES: dict[str, dict[str, Any]] = {
    "item_tokens": {},
    "likelihood": {"tokens": 12, "training": {"tokens_per_step": 3600}},
    "yes_no": {"tokens": 400, "training": {"tokens_per_step": 3600}, "events": 0.05},
    "letters": {"tokens": 400, "training": {"tokens_per_step": 3600}, "events": 0.05},
}
"""How each is trained; as the trials of eval/ablations. `generate` searches by the scores of `likelihood`."""

SHARE = 0.1
"""Of the items that are drawn."""

LISTED, NEW = 20, 5
"""Items in a list, and how many of them are drawn ones."""

console = Console(stderr=True)


def without(p: Prepared, items: NDArray[np.bool_]) -> Prepared:
    """The same without the training events of some items."""
    return replace(p, split=replace(p.split, fitted=p.split.fitted & ~items[p.split.log.item]))


def lists_of(asked: HeldOut, drawn: Codes, items: int, seed: int) -> list[Codes]:
    """Lists of unseen items: the drawn ones first, then others."""
    rng, found = np.random.default_rng(seed), []
    others = np.setdiff1d(np.arange(items), drawn)
    for query in asked.queries:
        new, old = (np.setdiff1d(part, query.history) for part in (drawn, others))
        if len(new) < NEW or len(old) < LISTED - NEW:
            raise DataError(
                f"too few items for lists of {LISTED} that a user has not seen, {NEW} of them drawn"
            )
        chosen = [rng.choice(part, n, replace=False) for part, n in ((new, NEW), (old, LISTED - NEW))]
        found.append(np.concatenate(chosen).astype(np.int32))
    return found


def ranks_of_new(scores: Sequence[Floats]) -> NDArray[np.float64]:
    """Mean rank, from 1, of the first items of each list among all of it, shape (lists,)."""
    # Equal scores share their ranks.
    ranks = [
        ((s[None, :] > s[:NEW, None]).sum(1) + (s[None, :] >= s[:NEW, None]).sum(1) + 1) / 2 for s in scores
    ]
    return np.array([float(own.mean()) for own in ranks])


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder, or a name that llmrec fetch knows")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--events", type=int, default=200_000, help="that item_tokens learns from")
    parser.add_argument("--words", type=int, default=10_000, help="that the modes that read words learn from")
    parser.add_argument("--users", type=int, default=500, help="whose lists are scored, at most")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    given = Path(args.data) if Path(args.data).is_dir() else resolve(args.data)
    p = prepare(given, Config.of(args.config), args.users, args.users)
    items = len(p.state.catalog)
    drawn = np.sort(np.random.default_rng(0).choice(items, max(NEW, round(SHARE * items)), replace=False))
    is_drawn = np.zeros(items, np.bool_)
    is_drawn[drawn] = True
    lists = lists_of(p.asked, drawn.astype(np.int32), items, 0)
    modes: dict[str, Any] = {}
    for mode in args.modes:
        ranks = {}
        for name, own in (("added", without(p, is_drawn)), ("retrained", p)):
            events = args.words if "tokens" in MODES[mode] else args.events
            events = int(MODES[mode].get("events", 1) * events)
            trial = {**MODES[mode], "lm": {"mode": mode}, "events": events}
            folder = RUNS / given.name / f"{mode} {name}.run"
            lm, training = trained(own, f"{mode} {name}", trial, folder)
            ranks[name] = ranks_of_new(lm.scorer.score(p.asked.queries, lists))
            console.print(mode, name, round(float(ranks[name].mean()), 3), f"{training['seconds']} s")
        found = compare_values(ranks["added"] - ranks["retrained"], "added", "retrained", "mean rank")
        modes[mode] = {
            **{name: round(float(values.mean()), 4) for name, values in ranks.items()},
            "bias": round(found.difference, 4),
            "ci95": [round(found.low, 4), round(found.high, 4)],
        }
    result = {
        "command": " ".join(["python eval/added_items.py", *(sys.argv[1:] if argv is None else argv)]),
        "data": given.name,
        "log_sha256": p.split.log.fingerprint,
        "part": "validation",
        "users": len(lists),
        "items": items,
        "drawn": len(drawn),
        "events_of_drawn": round(float(is_drawn[p.split.log.item[p.split.fitted]].mean()), 4),
        "listed": LISTED,
        "new_in_a_list": NEW,
        "modes": modes,
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / f"{given.name}-added-items.json"
    draft = out.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(out)


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
