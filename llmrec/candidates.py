"""Candidates of a request and where each comes from: weights, merging, blending, probabilities. Pure.

Every candidate keeps which component found it, at which rank, and what that added to its score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.protocols import Codes, ComparingScorer, Floats, Hits, Query, Scorer

LM = "lm"
"""Name of the language model in weights, provenance and reports."""

READS_WORDS = ("bm25", "text")
"""Retrievers that read a typed query."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the components for one kind of request.

    Parameters
    ----------
    retrievers
        Of the normalised scores.
    lm
        Of the language model in the blend; 0 leaves it out.
    found, rank
        Bonus for an item that a component proposed, whole and discounted by its rank there.
    longer
        Weights for histories of at least so many items, ascending; they take the place of these.
    plain
        Where these were fitted with the language model: what takes their place without it.
    """

    retrievers: Mapping[str, float]
    lm: float = 0.0
    found: Mapping[str, float] = field(default_factory=dict)
    rank: Mapping[str, float] = field(default_factory=dict)
    longer: tuple[tuple[int, Weights], ...] = ()
    plain: Weights | None = None

    def uses(self, name: str) -> bool:
        """Whether a component takes part."""
        if name == LM:
            return self.lm > 0
        return any(weights.get(name, 0.0) for weights in (self.retrievers, self.found, self.rank))

    def ever_uses(self, name: str) -> bool:
        """Whether a component takes part for any length of history."""
        return self.uses(name) or any(weights.uses(name) for _, weights in self.longer)

    def for_history(self, n: int) -> Weights:
        """The weights for a history of n items."""
        fitting = [weights for least, weights in self.longer if n >= least]
        return fitting[-1] if fitting else self

    @property
    def most_lm(self) -> float:
        """Largest weight of the language model, over all lengths of history."""
        return max(self.lm, *(weights.lm for _, weights in self.longer), 0.0)

    def with_lm(self, weight: float) -> Weights:
        """The same with another weight of the language model, in all segments; for 0 the plain ones."""
        if weight == 0 and self.plain is not None:
            return self.plain
        longer = tuple((least, replace(weights, lm=weight)) for least, weights in self.longer)
        return replace(self, lm=weight, longer=longer)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them."""
        values: dict[str, Any] = {"retrievers": dict(self.retrievers), "lm": self.lm}
        values |= {n: dict(v) for n, v in (("found", self.found), ("rank", self.rank)) if v}
        if self.longer:
            values["longer"] = [[least, weights.as_dict()] for least, weights in self.longer]
        if self.plain is not None:
            values["plain"] = self.plain.as_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Weights:
        """Read `as_dict()`."""
        longer = tuple((int(least), cls.from_dict(weights)) for least, weights in values.get("longer", ()))
        plain = cls.from_dict(values["plain"]) if "plain" in values else None
        return cls(**{**values, "longer": longer, "plain": plain})


@dataclass(frozen=True, slots=True)
class Candidates:
    """The merged candidates of one query, best first.

    Parameters
    ----------
    items
        Codes, shape (n,).
    scores
        Sum of the contributions, shape (n,).
    names
        The components, m of them.
    parts
        What each component added, shape (n, m).
    ranks
        Rank at which each component proposed the item, from 1; 0 if it did not. Shape (n, m).
    """

    items: Codes
    scores: Floats
    names: tuple[str, ...]
    parts: Floats
    ranks: NDArray[np.int32]

    def proposed_by(self, name: str) -> NDArray[np.int32]:
        """Rank at which a component proposed each item, 0 if it did not, shape (n,)."""
        if name not in self.names:
            return np.zeros(len(self.items), np.int32)
        return self.ranks[:, self.names.index(name)]

    def top(self, k: int) -> Candidates:
        """The first k."""
        return self.take(np.arange(min(k, len(self.items))))

    def take(self, rows: NDArray[np.int64]) -> Candidates:
        """Some of them, in the order of `rows`."""
        return Candidates(self.items[rows], self.scores[rows], self.names, self.parts[rows], self.ranks[rows])


FLAT = 1e-6
"""Share of a score that float32 does not tell from rounding."""


def normalise(scores: Floats, base: Floats | None = None, least: float | None = None) -> Floats:
    """Scale scores to [0, 1]: the best becomes 1; 0 is the last score, or `least` where given.

    A constant list becomes 1. With `base`, on the scale of those scores: above all of them it is more than 1.
    A constant base, which has no scale, is the unit where it is above 0.
    """
    base = scores if base is None else base
    low = float(base.min(initial=np.inf)) if least is None else least
    high = float(base.max(initial=-np.inf))
    if high - low > FLAT * max(abs(low), abs(high)):
        scaled: Floats = np.maximum((scores - low) / (high - low), 0.0).astype(np.float32)
    elif base is scores or not 0 < low < np.inf:
        scaled = np.ones_like(scores)
    else:
        scaled = np.maximum(scores / low, 0.0).astype(np.float32)
    return scaled


def compared(scorer: Scorer, queries: Sequence[Query], items: Codes) -> list[Floats]:
    """Scores of the same items for several queries that can be set against one another."""
    if isinstance(scorer, ComparingScorer):
        return scorer.compared(queries, items)
    return scorer.score(queries, [items] * len(queries))


def gather(hits: Mapping[str, Hits]) -> tuple[Codes, Floats, NDArray[np.int32]]:
    """Union of all hits in the order of item codes, with normalised scores and ranks.

    Returns
    -------
    tuple
        Codes (n,), scores in [0, 1] (n, components), 0 where a component did not propose the item, and
        ranks (n, components) from 1, 0 where it did not.
    """
    items = np.unique(np.concatenate([np.empty(0, np.int32), *(h.items for h in hits.values())]))
    scores = np.zeros((len(items), len(hits)), dtype=np.float32)
    ranks = np.zeros((len(items), len(hits)), dtype=np.int32)
    for column, found in enumerate(hits.values()):
        rows = np.searchsorted(items, found.items)
        scores[rows, column] = normalise(found.scores, least=found.least)
        ranks[rows, column] = np.arange(1, len(found.items) + 1)
    return items.astype(np.int32), scores, ranks


def merge(hits: Mapping[str, Hits], weights: Weights) -> Candidates:
    """Weighted sum over the union of all hits; ties in the order of item codes.

    A component adds its weight times the normalised score, a bonus for having proposed the item, and one
    that falls with the rank; without weights it adds candidates and provenance alone.
    """
    items, scores, ranks = gather(hits)
    names = tuple(hits)
    parts = scores * _row(names, weights.retrievers)
    if weights.found or weights.rank:
        parts += (ranks > 0) * _row(names, weights.found) + discount(ranks) * _row(names, weights.rank)
    return _ordered(items, names, parts.astype(np.float32), ranks)


def followed(found: Candidates, items: Codes) -> Candidates:
    """Candidates with others after them that no component proposed, with the lowest score, at most 0."""
    parts = np.zeros((len(items), len(found.names)), np.float32)
    parts[:, :1] = found.scores.min(initial=0.0)
    return Candidates(
        np.concatenate([found.items, items]).astype(np.int32),
        np.concatenate([found.scores, parts.sum(axis=1)]),
        found.names,
        np.concatenate([found.parts, parts]),
        np.concatenate([found.ranks, np.zeros(parts.shape, np.int32)]),
    )


def discount(ranks: NDArray[np.int32]) -> Floats:
    """1 / log2(1 + rank), 0 for rank 0."""
    values: Floats = np.where(ranks > 0, 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0).astype(np.float32)
    return values


def _row(names: Sequence[str], weights: Mapping[str, float]) -> Floats:
    return np.array([weights.get(name, 0.0) for name in names], dtype=np.float32)


def to_score(proposed: NDArray[np.int32], scored: int | None) -> NDArray[np.int64]:
    """Which candidates the language model scores: the first `scored`, and as many of its own.

    Parameters
    ----------
    proposed
        Rank at which it proposed each candidate, in the order of the merge; 0 if it did not.
    scored
        None for all candidates.
    """
    if scored is None:
        return np.arange(len(proposed))
    chosen = (proposed > 0) & (proposed <= scored)
    chosen[:scored] = True
    return np.flatnonzero(chosen)


def with_rest(scores: Floats, rows: NDArray[np.int64], n: int) -> Floats:
    """Scores of some of n candidates, where they belong; the others get the lowest of them."""
    filled = np.full(n, scores.min() if len(scores) else 0.0, np.float32)
    filled[rows] = scores
    return filled


def blend(candidates: Candidates, lm_scores: Floats, weight: float) -> Candidates:
    """Add `weight` times the language model's normalised score; ties keep the merge order.

    `lm_scores` has one score a candidate, in the candidates' order.
    """
    names = tuple(n for n in candidates.names if n != LM)
    keep = [candidates.names.index(n) for n in names]
    own = candidates.proposed_by(LM)[:, None]
    part = (weight * normalise(lm_scores))[:, None]
    if LM in candidates.names:
        # What it added by proposing the item.
        part = part + candidates.parts[:, [candidates.names.index(LM)]]
    parts = np.concatenate([candidates.parts[:, keep], part], axis=1).astype(np.float32)
    ranks = np.concatenate([candidates.ranks[:, keep], own], axis=1)
    return _ordered(candidates.items, (*names, LM), parts, ranks)


def _ordered(items: Codes, names: tuple[str, ...], parts: Floats, ranks: NDArray[np.int32]) -> Candidates:
    scores: Floats = parts.sum(axis=1, dtype=np.float32)
    order = np.argsort(-scores, kind="stable")
    return Candidates(items[order], scores[order], names, parts[order], ranks[order])


@dataclass(frozen=True, slots=True)
class Calibration:
    """Turns scores of candidates into probabilities over the catalogue.

    p(i) = (1 - mix) * softmax(temperature * score)(i) over the candidates + mix * prior(i), so that every
    item has a probability and they sum to 1.
    """

    temperature: float = 1.0
    mix: float = 0.5

    def probabilities(self, found: Candidates, prior: Floats) -> NDArray[np.float64]:
        """Probability of each item to be the next, shape (items,); `prior` sums to 1, shape (items,)."""
        p = self.mix * prior.astype(np.float64)
        if len(found.items) == 0:
            return p / max(self.mix, 1e-12) if self.mix > 0 else prior.astype(np.float64)
        e = np.exp(self.temperature * (found.scores.astype(np.float64) - float(found.scores.max())))
        p[found.items] += (1.0 - self.mix) * e / e.sum()
        return p
