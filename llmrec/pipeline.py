"""Retrieve, merge, score, blend: the whole idea, without input or output.

    queries -> retrieve -> merge -> score -> blend -> ranked items with provenance -> arrange.py

Every candidate keeps which component found it, at which rank, and what that added to its score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llmrec.protocols import Codes, Floats, Hits, Query, Retriever, Scorer

LM = "lm"
"""Name of the language model in weights, provenance and reports."""


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


def normalise(scores: Floats, base: Floats | None = None) -> Floats:
    """Scale scores to [0, 1]: the best becomes 1, the last 0; a single or constant list 1.

    With `base`, on the scale of those scores: what is below all of them becomes 0, above them more than 1.
    A constant base, which has no scale, is the unit where it is above 0.
    """
    base = scores if base is None else base
    low, high = float(base.min(initial=np.inf)), float(base.max(initial=-np.inf))
    if high - low >= 1e-12:
        scaled: Floats = np.maximum((scores - low) / (high - low), 0.0).astype(np.float32)
    elif base is scores or not 0 < low < np.inf:
        scaled = np.ones_like(scores)
    else:
        scaled = np.maximum(scores / low, 0.0).astype(np.float32)
    return scaled


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
        scores[rows, column] = normalise(found.scores)
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


@dataclass(frozen=True)
class Pipeline:
    """The components and their weights.

    Parameters
    ----------
    retrievers
        By name; the language model is among them, as ``lm``, where it proposes items itself.
    history, query, similar
        Weights for requests by history, with typed words, and for items like one item.
    scorer
        The language model, None if there is none.
    depth
        Hits taken from each retriever.
    calibration
        For `predict`, fitted for these weights by history.
    prior
        Share of each item in the events, shape (items,); sums to 1.
    scored
        How many of the first merged candidates the language model scores; None for all.
    """

    retrievers: Mapping[str, Retriever]
    history: Weights
    query: Weights
    similar: Weights
    scorer: Scorer | None = None
    depth: int = 200
    calibration: Calibration = field(default_factory=Calibration)
    prior: Floats | None = None
    scored: int | None = None
    fallback: ClassVar[str] = "popularity"

    def weights_for(self, query: Query) -> Weights:
        """The weights that apply to a query."""
        if query.text:
            return self.query.for_history(len(query.history))
        # Weights that were fitted with the language model say nothing without it.
        history = self.history if self.scorer is not None else self.history.with_lm(0.0)
        return history.for_history(len(query.history))

    def recommend(self, queries: Sequence[Query], k: int) -> list[Candidates]:
        """Return up to k candidates for each query, ranked by the whole pipeline."""
        weights = [self.weights_for(q) for q in queries]
        merged = self.retrieve(queries, weights)
        return [c.top(k) for c in self.rerank(queries, merged, [w.lm for w in weights])]

    def predict(self, queries: Sequence[Query]) -> NDArray[np.float64]:
        """Probability that the next event is each item, shape (queries, items); rows sum to 1.

        Items that a query's mask rules out keep their share of the prior: they are unlikely, not impossible.
        """
        assert self.prior is not None
        found = self.recommend(queries, len(self.prior))
        prior, rows = self.prior.astype(np.float64), []
        for candidates in found:
            alone = candidates.names == (self.fallback,)
            rows.append(prior if alone else self.calibration.probabilities(candidates, self.prior))
        return np.stack(rows) if rows else np.zeros((0, len(self.prior)))

    def retrieve(self, queries: Sequence[Query], weights: Sequence[Weights]) -> list[Candidates]:
        """Retrieve and merge, without the language model's score."""
        wanted = {n for w in weights for n in self.retrievers if w.uses(n)}
        found = {n: self.retrievers[n].retrieve(queries, self.depth) for n in self.retrievers if n in wanted}
        merged = []
        for row, (query, weight) in enumerate(zip(queries, weights, strict=True)):
            used = {n: hits[row] for n, hits in found.items() if weight.uses(n)}
            nothing_asked = not len(query.history) and not query.text
            if nothing_asked or not any(len(h.items) for h in used.values()):
                # Weights of a blend say nothing of a list that rests on popularity alone.
                used = {self.fallback: self.retrievers[self.fallback].retrieve([query], self.depth)[0]}
                merged.append(merge(used, Weights({self.fallback: 1.0})))
            else:
                merged.append(merge(used, weight))
        return merged

    def rerank(
        self, queries: Sequence[Query], merged: Sequence[Candidates], lm_weights: Sequence[float]
    ) -> list[Candidates]:
        """Score the candidates with the language model and blend, where its weight is not 0."""
        rows = [i for i, weight in enumerate(lm_weights) if weight > 0 and len(merged[i].items)]
        result = list(merged)
        if self.scorer is None or not rows:
            return result
        own = [to_score(merged[i].proposed_by(LM), self.scored) for i in rows]
        asked = [merged[i].items[places] for i, places in zip(rows, own, strict=True)]
        scores = self.scorer.score([queries[i] for i in rows], asked)
        for i, places, values in zip(rows, own, scores, strict=True):
            result[i] = blend(merged[i], with_rest(values, places, len(merged[i].items)), lm_weights[i])
        return result

    def order(self, query: Query, items: Codes) -> Candidates:
        """Order given items, all of them: those that no component found come last, as they were given.

        The query's mask has to allow these items and no others; an item is given once.
        """
        weights = self.weights_for(query)
        merged = self.retrieve([query], [weights])[0]
        merged = followed(merged, items[~np.isin(items, merged.items)])
        return self.rerank([query], [merged], [weights.lm])[0]

    def filled(self, query: Query, found: Candidates, n: int) -> Candidates:
        """The same with the n most popular items that are allowed after it, save those that are in it."""
        popular = self.retrievers[self.fallback].retrieve([query], n)[0].items
        new = ~np.isin(popular, found.items)
        if self.fallback not in found.names:
            none = np.zeros((len(found.items), 1))
            found = replace(
                found,
                names=(*found.names, self.fallback),
                parts=np.concatenate([found.parts, none.astype(np.float32)], axis=1),
                ranks=np.concatenate([found.ranks, none.astype(np.int32)], axis=1),
            )
        more = followed(found, popular[new])
        more.ranks[len(found.items) :, more.names.index(self.fallback)] = 1 + np.flatnonzero(new)
        return more

    def scores(self, queries: Sequence[Query], items: Codes, weights: Weights) -> Floats:
        """Blended scores of the same items for several queries, comparable, shape (queries, items).

        Weights and the scale of each component are those of the first query, so that what an item loses or
        gains for another query is not hidden by scaling that query's best item to 1; nothing falls back to
        popularity. Masks have to allow these items and no others. For the query and the candidates of an
        answer the first row is the answer's scores, save where the language model does not score all
        candidates: it scores the first of these.
        """
        table = np.zeros((len(queries), len(items)), np.float32)
        order = np.argsort(items)
        for name in (name for name in self.retrievers if weights.uses(name)):
            found = self.retrievers[name].retrieve(queries, self.depth)
            for row, hits in enumerate(found):
                bonus = weights.found.get(name, 0.0) + weights.rank.get(name, 0.0) * discount(
                    np.arange(1, len(hits.items) + 1, dtype=np.int32)
                )
                part = weights.retrievers.get(name, 0.0) * normalise(hits.scores, found[0].scores) + bonus
                table[row, order[np.searchsorted(items, hits.items, sorter=order)]] += part
        if weights.lm > 0 and self.scorer is not None:
            first = items[: self.scored]
            scores = self.scorer.score(queries, [first] * len(queries))
            table[:, : len(first)] += weights.lm * np.stack([normalise(row, scores[0]) for row in scores])
        return table
