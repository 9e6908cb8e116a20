"""Rank metrics for one target a user, and paired comparison of two systems.

With a single relevant item everything follows from the rank of the target (1 is best, 0 stands for
"not in the list"): Recall@k = [1 <= rank <= k], NDCG@k = 1 / log2(1 + rank) within k (Jarvelin and
Kekalainen 2002; the ideal DCG is 1), MRR@k = 1 / rank within k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec.protocols import Floats, Mask

Ranks = NDArray[np.int64]
Values = NDArray[np.float64]

REPORTED = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "recall@20", "ndcg@20")


def rank_of(scores: Floats, target: int, mask: Mask | None = None) -> int:
    """Rank of `target` among all allowed items, ties broken by code; 0 if it is not allowed itself.

    Parameters
    ----------
    scores
        Shape (items,), higher is better.
    mask
        Shape (items,), True where an item takes part.
    """
    if mask is not None:
        if not mask[target]:
            return 0
        scores = np.where(mask, scores, -np.inf)
    own = scores[target]
    ahead = np.count_nonzero(scores > own) + np.count_nonzero(scores[:target] == own)
    return int(ahead) + 1


def per_user(ranks: Ranks, metric: str) -> Values:
    """Value of a metric such as ``ndcg@10`` for each user.

    Raises
    ------
    ValueError
        If the metric is not recall, ndcg or mrr with a cut-off.
    """
    name, _, cut = metric.partition("@")
    if name not in ("recall", "ndcg", "mrr") or not cut.isdigit():
        raise ValueError(f"unknown metric {metric!r}; known: recall@k, ndcg@k, mrr@k")
    hit = (ranks >= 1) & (ranks <= int(cut))
    safe = np.where(hit, ranks, 1).astype(np.float64)
    gain = {"recall": np.ones_like(safe), "ndcg": 1.0 / np.log2(1.0 + safe), "mrr": 1.0 / safe}[name]
    return np.where(hit, gain, 0.0)


def summary(ranks: Ranks, metrics: Sequence[str] = REPORTED) -> dict[str, float]:
    """Mean of each metric over users."""
    return {metric: float(per_user(ranks, metric).mean()) if len(ranks) else 0.0 for metric in metrics}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean difference a - b over the same users, with a 95 % paired bootstrap interval."""

    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    users: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, object]:
        """The form written to results files."""
        return {
            "a": self.a,
            "b": self.b,
            "metric": self.metric,
            "difference": self.difference,
            "ci95": [self.low, self.high],
            "p": self.p,
            "users": self.users,
        }

    def __str__(self) -> str:
        verdict = "" if self.shown else ": no difference shown"
        return (
            f"{self.a} - {self.b}, {self.metric}: {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}] over {self.users} users{verdict}"
        )


def compare(
    ranks: Mapping[str, Ranks], a: str, b: str, metric: str = "ndcg@10", *, draws: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two systems on the same users.

    The interval is the percentile bootstrap over users (Efron 1979); p comes from the paired
    sign-flip permutation test, two-sided, counting the observed assignment itself.
    """
    difference = per_user(ranks[a], metric) - per_user(ranks[b], metric)
    n = len(difference)
    if n == 0:
        return Comparison(a, b, metric, 0.0, 0.0, 0.0, 1.0, 0)
    rng = np.random.default_rng(seed)
    # Users where both agree do not change a resampled sum, so only the others need to be drawn.
    moved = difference[difference != 0]
    means, flips = np.empty(draws), np.empty(draws)
    for start in range(0, draws, 500):
        rows = min(500, draws - start)
        size = rng.binomial(n, len(moved) / n, size=rows)
        for row in range(rows):
            means[start + row] = (
                moved[rng.integers(0, len(moved), size[row])].sum() / n if len(moved) else 0.0
            )
        signs = rng.integers(0, 2, (rows, len(moved)), dtype=np.int8) * 2 - 1
        flips[start : start + rows] = (signs * moved).sum(axis=1) / n
    low, high = np.percentile(means, [2.5, 97.5])
    observed = abs(float(difference.mean()))
    p = (1 + np.count_nonzero(np.abs(flips) >= observed - 1e-12)) / (draws + 1)
    return Comparison(a, b, metric, float(difference.mean()), float(low), float(high), float(p), n)
