"""What an evaluation says besides its means: the ceiling, for whom a stage pays, order bias, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrec.evaluation.split import Part
from llmrec.metrics import Ranks, compare_values, per_user
from llmrec.protocols import Codes, Mask, Query, Scorer

DEPTHS = (10, 20, 50, 100)
"""Lengths of the shortlist of which the ceiling is reported."""

DRAWS = 2000
"""Resamples of each segment's interval."""

LEAST = 10
"""Users whose lists differ below whom resampling says nothing: the interval of none has no width."""

ORDERS = 4
"""Random orders of the candidates beside the given one."""


def ceiling(ranks: Ranks) -> dict[str, float]:
    """Share of users whose target is in the first 10, 20, 50, 100: what a perfect reranker could reach."""
    return {str(k): float(per_user(ranks, f"recall@{k}").mean()) if len(ranks) else 0.0 for k in DEPTHS}


def differences(
    ranks: Mapping[str, Ranks], masks: Mapping[str, Mask], a: str, b: str, metric: str = "ndcg@10"
) -> dict[str, dict[str, Any]]:
    """Difference of two systems in each segment where `LEAST` users' differ or more, with a 95 % interval.

    Intervals are bootstrapped, and not corrected for the number of segments.
    """
    values = per_user(ranks[a], metric) - per_user(ranks[b], metric)
    found = {}
    for name, mask in masks.items():
        if np.count_nonzero(values[mask]) < LEAST:
            continue
        own = compare_values(values[mask], a, b, metric, draws=DRAWS)
        found[name] = {"users": own.users, "difference": own.difference, "ci95": [own.low, own.high]}
    return found


def order_bias(
    scorer: Scorer, queries: Sequence[Query], candidates: Sequence[Codes], seed: int = 0
) -> dict[str, Any]:
    """How much the order in which candidates are given changes what a scorer makes of them.

    Returns
    -------
    dict
        ``users`` asked and ``orders`` tried beside the given one; ``largest_change``: largest change of a
        score; ``top_changes``: share of users and orders in which another candidate comes first; and
        ``mean_rank_by_position``: mean rank, from 1, of what stands at each position over the random orders,
        half the number of candidates plus a half at each of them without bias.
    """
    rng = np.random.default_rng(seed)
    rows = [i for i, items in enumerate(candidates) if len(items) > 1]
    longest = max((len(candidates[i]) for i in rows), default=0)
    rows = [i for i in rows if len(candidates[i]) == longest]
    asked, given = [queries[i] for i in rows], [candidates[i] for i in rows]
    first = scorer.score(asked, given) if rows else []
    largest, changed, ranks = 0.0, 0, np.zeros(longest)
    for _ in range(ORDERS if rows else 0):
        orders = [rng.permutation(longest) for _ in rows]
        scores = scorer.score(asked, [items[order] for items, order in zip(given, orders, strict=True)])
        for before, after, order in zip(first, scores, orders, strict=True):
            largest = max(largest, float(np.abs(after - before[order]).max()))
            changed += int(order[np.argmax(after)] != np.argmax(before))
            ranks[np.argsort(-after, kind="stable")] += np.arange(1, longest + 1)
    tried = max(1, ORDERS * len(rows))
    return {
        "users": len(rows),
        "candidates": longest,
        "orders": ORDERS,
        "largest_change": largest,
        "top_changes": changed / tried,
        "mean_rank_by_position": [round(float(value), 3) for value in ranks / tried],
    }


@dataclass(frozen=True, slots=True)
class Example:
    """One user: titles of the latest history, oldest first, of what came next, and of each list's first."""

    history: list[str]
    target: str
    lists: dict[str, list[str]]
    ranks: dict[str, int]


def examples(
    part: Part,
    shown: Mapping[str, Sequence[Codes]],
    ranks: Mapping[str, Ranks],
    titles: Sequence[str],
    n: int = 10,
    seed: int = 0,
) -> list[Example]:
    """Drawn users side by side, whatever came out: the latest 10 items and the first 5 of each list."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(part))[:n])
    return [
        Example(
            [titles[code] for code in part.histories[row][-10:]],
            titles[part.targets[row]],
            {name: [titles[code] for code in lists[row][:5]] for name, lists in shown.items()},
            {name: int(ranks[name][row]) for name in shown},
        )
        for row in rows
    ]
