"""Retrieve, merge, score, blend: the whole idea, without input or output.

queries -> retrieve -> merge -> score -> blend -> ranked items with provenance -> arrange.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from llmrec.candidates import (
    LM,
    READS_WORDS,
    Calibration,
    Candidates,
    Weights,
    blend,
    compared,
    discount,
    followed,
    merge,
    normalise,
    to_score,
    with_rest,
)
from llmrec.protocols import Codes, Floats, Hits, Query, Retriever, Scorer
from llmrec.retrieve.popularity import PopularityRetriever


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
    popular
        Whether popular items stand in where nothing is found and no words were typed.
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
    popular: bool = True
    fallback: ClassVar[str] = "popularity"
    by_meaning: ClassVar[str] = "text"

    def weights_for(self, query: Query) -> Weights:
        """The weights that apply to a query: without history and words those of popularity alone."""
        if not query.text and not len(query.history):
            return Weights({self.fallback: 1.0})
        if query.text:
            return self.query.for_history(len(query.history))
        # Weights that were fitted with the language model say nothing without it.
        history = self.history if self.scorer is not None else self.history.with_lm(0.0)
        return history.for_history(len(query.history))

    def weights_of(self, query: Query, found: Candidates) -> Weights:
        """The weights that a query's candidates were merged with, where others joined or stood in too."""
        weights = self.weights_for(query)
        if self.by_meaning in found.names and not weights.uses(self.by_meaning):
            return self._with_meaning(weights)
        if found.names == (self.fallback,):
            return Weights({self.fallback: 1.0})
        return weights

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

    def retrieve(
        self, queries: Sequence[Query], weights: Sequence[Weights], *, given: bool = False
    ) -> list[Candidates]:
        """Retrieve and merge, without the language model's score.

        For typed words popularity and the language model propose nothing: they score what is found, since
        what lacks the words is not what was asked for. Where the recipe's retrievers of words find nothing
        that is allowed, items join whose texts are near in meaning, as strongly as the strongest of the
        recipe. Where nothing is found still, popular items are, but not for somebody who typed what it should
        be about.

        Parameters
        ----------
        given
            Whether the allowed items are the caller's own, all of which will be answered: then nothing joins,
            and popular items order what nothing is found of.
        """
        found: dict[str, dict[int, Hits]] = {}
        for name, retriever in self.retrievers.items():
            rows = [row for row, query in enumerate(queries) if _proposes(name, query, weights[row])]
            if rows:
                hits = retriever.retrieve([queries[row] for row in rows], self.depth)
                found[name] = dict(zip(rows, hits, strict=True))
        own = [{n: hits[row] for n, hits in found.items() if row in hits} for row in range(len(queries))]
        wanting = [
            row
            for row, query in enumerate(queries)
            if not given and self._wants_meaning(query, weights[row], own[row])
        ]
        meant: dict[int, Hits] = {}
        if wanting:
            hits = self.retrievers[self.by_meaning].retrieve([queries[row] for row in wanting], self.depth)
            meant = dict(zip(wanting, hits, strict=True))
        merged = []
        for row, (query, weight, used) in enumerate(zip(queries, weights, own, strict=True)):
            if row in meant and len(meant[row].items):
                used, weight = used | {self.by_meaning: meant[row]}, self._with_meaning(weight)
            if query.text and weight.uses(self.fallback):
                popularity = cast(PopularityRetriever, self.retrievers[self.fallback])
                used[self.fallback] = popularity.among(used.values())
            if not any(len(h.items) for h in used.values()):
                # Weights of a blend say nothing of a list that rests on popularity alone.
                depth = self.depth if given or (self.popular and not query.text) else 0
                used = {self.fallback: self.retrievers[self.fallback].retrieve([query], depth)[0]}
                weight = Weights({self.fallback: 1.0})
            merged.append(merge(used, weight))
        return merged

    def _wants_meaning(self, query: Query, weights: Weights, used: Mapping[str, Hits]) -> bool:
        """Whether words were typed of which the recipe's retrievers of words found nothing."""
        if not query.text or self.by_meaning in used or self.by_meaning not in self.retrievers:
            return False
        readers = [name for name in READS_WORDS if weights.uses(name)]
        return not any(len(used[name].items) for name in readers or used)

    def _with_meaning(self, weights: Weights) -> Weights:
        strongest = max(weights.retrievers.values(), default=0.0) or 1.0
        return replace(weights, retrievers={**weights.retrievers, self.by_meaning: strongest})

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
        merged = self.retrieve([query], [weights], given=True)[0]
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
        used = [name for name in self.retrievers if weights.uses(name)]
        for name in (name for name in used if name != LM or not queries[0].text):
            # Popularity of all time for some rows and of late for others would be no effect of an item.
            asked = (
                queries
                if name != self.fallback
                else [replace(q, history=queries[0].history) for q in queries]
            )
            found = self.retrievers[name].retrieve(asked, self.depth)
            for row, hits in enumerate(found):
                bonus = weights.found.get(name, 0.0) + weights.rank.get(name, 0.0) * discount(
                    np.arange(1, len(hits.items) + 1, dtype=np.int32)
                )
                scaled = normalise(hits.scores, found[0].scores, found[0].least)
                part = weights.retrievers.get(name, 0.0) * scaled + bonus
                table[row, order[np.searchsorted(items, hits.items, sorter=order)]] += part
        if weights.lm > 0 and self.scorer is not None:
            first = items[: self.scored]
            scores = compared(self.scorer, queries, first)
            table[:, : len(first)] += weights.lm * np.stack([normalise(row, scores[0]) for row in scores])
        return table


def _proposes(name: str, query: Query, weights: Weights) -> bool:
    """Whether a component proposes candidates for a query."""
    return weights.uses(name) and not (query.text and name in (LM, Pipeline.fallback))
