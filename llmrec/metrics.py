"""Rank metrics, and paired comparison of two systems.

With a single relevant item everything follows from the rank of the target (1 is best, 0 stands for
"not in the list"): Recall@k = [1 <= rank <= k], NDCG@k = 1 / log2(1 + rank) within k (Jarvelin and
Kekalainen 2002; the ideal DCG is 1), MRR@k = 1 / rank within k. There the hit rate is Recall, and MAP
is MRR. `relevance` has the same for many relevant items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.protocols import Codes

Ranks = NDArray[np.int64]
Values = NDArray[np.float64]

FEWEST = 20
"""Users below whom no gain is called one: their errors say too little of each other."""

REPORTED = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "recall@20", "ndcg@20")


def per_user(ranks: Ranks, metric: str) -> Values:
    """Value of a metric such as ``ndcg@10`` for each user.

    Raises
    ------
    ValueError
        If the metric is not recall, hit, ndcg, mrr or map with a cut-off.
    """
    name, _, cut = metric.partition("@")
    name = {"hit": "recall", "map": "mrr"}.get(name, name)
    if name not in ("recall", "ndcg", "mrr") or not cut.isdigit():
        raise ValueError(f"unknown metric {metric!r}; known: recall@k, hit@k, ndcg@k, mrr@k, map@k")
    hit = (ranks >= 1) & (ranks <= int(cut))
    safe = np.where(hit, ranks, 1).astype(np.float64)
    gain = {"recall": np.ones_like(safe), "ndcg": 1.0 / np.log2(1.0 + safe), "mrr": 1.0 / safe}[name]
    return np.where(hit, gain, 0.0)


def summary(ranks: Ranks, metrics: Sequence[str] = REPORTED) -> dict[str, float]:
    """Mean of each metric over users."""
    return {metric: float(per_user(ranks, metric).mean()) if len(ranks) else 0.0 for metric in metrics}


def relevance(found: Codes, relevant: Codes, k: int) -> dict[str, float]:
    """Measures of one ranked list where several items are relevant, all of them equally.

    NDCG@k with the ideal order of min(k, relevant) items, Recall@k, hit rate, MRR@k, and MAP@k: the mean
    over all relevant items of the precision at their rank, 0 for those beyond k (TREC's definition).
    """
    hits = np.isin(found[:k], relevant)
    at = np.flatnonzero(hits) + 1
    if not len(relevant):
        raise ValueError("no item is relevant")
    ideal = float((1.0 / np.log2(1.0 + np.arange(1, min(k, len(relevant)) + 1))).sum())
    return {
        f"recall@{k}": len(at) / len(relevant),
        f"hit@{k}": float(len(at) > 0),
        f"ndcg@{k}": float((1.0 / np.log2(1.0 + at)).sum()) / ideal,
        f"mrr@{k}": 1.0 / float(at[0]) if len(at) else 0.0,
        f"map@{k}": float((np.arange(1, len(at) + 1) / at).sum()) / len(relevant),
    }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean difference a - b over the same users, with a 95 % paired bootstrap interval.

    `p` is that of a paired permutation test, `p_holm` the same corrected for all comparisons of the run
    (None for a single one), and `effect` the mean difference in standard deviations of the difference over
    users (Cohen's d_z; None where all users differ alike).
    """

    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    users: int
    effect: float | None = None
    p_holm: float | None = None

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """What to say where the difference is not shown, or not among so many comparisons; else empty."""
        if not self.shown:
            return ": no difference shown"
        if self.p_holm is not None and self.p_holm > 0.05:
            return ": not shown among all comparisons of this run"
        return ""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Comparison:
        """Read what `as_dict` wrote."""
        low, high = stored["ci95"]
        values = {k: stored[k] for k in ("a", "b", "metric", "difference", "p", "users", "p_holm")}
        return cls(**values, low=low, high=high, effect=stored["effect_size"])

    def as_dict(self) -> dict[str, object]:
        """The form written to results files."""
        return {
            "a": self.a,
            "b": self.b,
            "metric": self.metric,
            "difference": self.difference,
            "ci95": [self.low, self.high],
            "p": self.p,
            "p_holm": self.p_holm,
            "effect_size": self.effect,
            "users": self.users,
            "shown": self.shown,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        effect = "" if self.effect is None else f", effect {self.effect:+.3f}"
        corrected = "" if self.p_holm is None else f", corrected {self.p_holm:.4f}"
        return (
            f"{self.a} - {self.b}, {self.metric}: {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}] over {self.users} users{effect}, "
            f"p {self.p:.4f}{corrected}{self.verdict}"
        )


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Correct the p values of all comparisons of a run (Holm 1979): p_holm bounds the chance of any error."""
    order = sorted(range(len(comparisons)), key=lambda i: comparisons[i].p)
    corrected, largest = list(comparisons), 0.0
    for position, row in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - position) * comparisons[row].p))
        corrected[row] = replace(comparisons[row], p_holm=largest)
    return corrected


def compare(
    ranks: Mapping[str, Ranks], a: str, b: str, metric: str = "ndcg@10", *, draws: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two systems on the same users.

    The interval is the percentile bootstrap over users (Efron 1979); p comes from the paired
    sign-flip permutation test, two-sided, counting the observed assignment itself.
    """
    difference = per_user(ranks[a], metric) - per_user(ranks[b], metric)
    return compare_values(difference, a, b, metric, draws=draws, seed=seed)


def compare_all(
    ranks: Mapping[str, Ranks],
    pairs: Iterable[tuple[str, str]],
    metrics: Sequence[str] = ("ndcg@10", "recall@10"),
) -> list[Comparison]:
    """Compare pairs of systems, corrected for how many comparisons these are.

    Two that give every user the same rank, as where a model is left out, are no test of anything: they come
    first, and the correction does not count them.
    """
    given = list(pairs)
    same = [pair for pair in given if np.array_equal(ranks[pair[0]], ranks[pair[1]])]
    tested = [compare(ranks, a, b, m) for a, b in given if (a, b) not in same for m in metrics]
    return [*(compare(ranks, a, b, m) for a, b in same for m in metrics), *holm(tested)]


def standard_error(values: Values) -> float | None:
    """Of the mean of some users' values; None for fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def clear(gain: Values) -> bool:
    """Whether the mean gain of some users, `FEWEST` or more, exceeds twice its standard error."""
    error = standard_error(gain)
    return error is not None and len(gain) >= FEWEST and float(gain.mean()) > 2 * error


def compare_values(
    difference: Values, a: str, b: str, metric: str, *, draws: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two systems by the difference a - b of each user, shape (users,); see `compare`."""
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
    spread = float(difference.std(ddof=1)) if n > 1 else 0.0
    mean = float(difference.mean())
    # A spread of rounding errors is none.
    effect = mean / spread if spread > 1e-12 * max(abs(mean), 1e-300) else None
    return Comparison(a, b, metric, mean, float(low), float(high), float(p), n, effect)
