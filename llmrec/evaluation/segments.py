"""For whom and for what a system works: measures by history length, popularity of the target, new items."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmrec.evaluation.split import Part
from llmrec.metrics import Ranks, summary
from llmrec.protocols import Mask

LENGTHS = ((0, 0), (1, 4), (5, 9), (10, 19), (20, 49), (50, None))
MEASURES = ("ndcg@10", "recall@10")


def segments(part: Part, counts: NDArray[np.float64]) -> dict[str, Mask]:
    """Masks over the part's users, shape (n,); each kind of segment covers every user once.

    ``history a-b``
        Events before the target.
    ``target head | middle | tail | new``
        Items that make up the first half of the training events, the next 30 %, the rest; and items
        without a training event.
    """
    lengths = np.array([len(history) for history in part.histories], dtype=np.int64)
    masks: dict[str, Mask] = {}
    for low, high in LENGTHS:
        name = (
            f"history {low}+"
            if high is None
            else f"history {low}"
            if low == high
            else f"history {low}-{high}"
        )
        masks[name] = (lengths >= low) & (lengths <= (high if high is not None else np.inf))
    order = np.argsort(-counts, kind="stable")
    before = np.empty(len(counts))
    cumulative = np.cumsum(counts[order])
    total = max(float(counts.sum()), 1.0)
    # Share of events on more popular items.
    before[order] = np.append(0.0, cumulative[:-1]) / total
    of_target, seen = before[part.targets], counts[part.targets] > 0
    masks["target head"] = seen & (of_target < 0.5)
    masks["target middle"] = seen & (of_target >= 0.5) & (of_target < 0.8)
    masks["target tail"] = seen & (of_target >= 0.8)
    masks["target new"] = ~seen
    return {name: mask for name, mask in masks.items() if mask.any()}


def by_segment(ranks: Mapping[str, Ranks], masks: Mapping[str, Mask]) -> dict[str, dict[str, object]]:
    """Measures of every system in every segment, with the number of users in it."""
    return {
        name: {
            "users": int(mask.sum()),
            "systems": {system: summary(values[mask], MEASURES) for system, values in ranks.items()},
        }
        for name, mask in masks.items()
    }
