"""What a blend is chosen by: the scores and ranks of all candidates of held-out queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmrec.candidates import LM, Weights, discount, gather, normalise, to_score, with_rest
from llmrec.metrics import Ranks
from llmrec.protocols import Floats, Hits, Scorer
from llmrec.ranking import NO_HITS
from llmrec.recipe import HeldOut


@dataclass(frozen=True, slots=True)
class Features:
    """Normalised scores of all candidates of all queries, one row a candidate, queries one after another.

    Parameters
    ----------
    names
        Components, m of them.
    scores
        Shape (rows, m).
    ranks
        Rank at which each component proposed the candidate, 0 if it did not, shape (rows, m).
    starts
        First row of each query, shape (queries,).
    truth
        Row of the target of each query, -1 where no component found it. Shape (queries,).
    lengths
        Length of each query's history, shape (queries,).
    """

    names: tuple[str, ...]
    scores: Floats
    ranks: NDArray[np.int32]
    starts: NDArray[np.int64]
    truth: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, hits: Mapping[str, Sequence[Hits]], held_out: HeldOut) -> Features:
        """Gather the hits of each query."""
        blocks, placed, starts, truth, row = [], [], [], [], 0
        for i, target in enumerate(held_out.targets):
            items, scores, ranks = gather({name: found[i] for name, found in hits.items()})
            at = int(np.searchsorted(items, target))
            blocks.append(scores)
            placed.append(ranks)
            starts.append(row)
            truth.append(row + at if at < len(items) and items[at] == target else -1)
            row += len(items)
        scores = np.concatenate([np.zeros((0, len(hits)), np.float32), *blocks])
        ranks = np.concatenate([np.zeros((0, len(hits)), np.int32), *placed])
        lengths = np.array([len(query.history) for query in held_out.queries], np.int64)
        where = np.array(starts, np.int64), np.array(truth, np.int64)
        return cls(tuple(hits), scores, ranks, *where, lengths)

    @classmethod
    def with_lm(
        cls,
        hits: Mapping[str, Sequence[Hits]],
        proposed: Sequence[Hits] | None,
        scorer: Scorer,
        held_out: HeldOut,
        weights: Weights | None = None,
        scored: int | None = None,
    ) -> Features:
        """Gather hits and the language model's own; its column holds its scores, as the pipeline has them.

        Parameters
        ----------
        proposed
            The language model's own hits; None where it proposes none.
        weights
            Of the merge: they decide which candidates are the first, where not all are scored.
        scored
            How many of the first candidates are scored, None for all.
        """
        named = {**hits, LM: proposed if proposed is not None else [NO_HITS] * len(held_out.targets)}
        plain = cls.of(named, held_out)
        unions = [
            gather({n: found[i] for n, found in named.items()})[0] for i in range(len(held_out.targets))
        ]
        total = plain.total((weights or Weights({})).with_lm(0.0))
        ends = np.append(plain.starts[1:], len(total))
        rows = []
        for start, end in zip(plain.starts, ends, strict=True):
            order = np.argsort(-total[start:end], kind="stable")
            rows.append(order[to_score(plain.ranks[start + order, -1], scored)])
        asked = [union[own] for union, own in zip(unions, rows, strict=True)]
        scores = plain.scores.copy()
        for start, end, own, values in zip(
            plain.starts, ends, rows, scorer.score(held_out.queries, asked), strict=True
        ):
            scores[start:end, -1] = normalise(with_rest(values, own, int(end - start)))
        return replace(plain, scores=scores)

    def take(self, queries: NDArray[np.int64]) -> Features:
        """Some of the queries, ascending."""
        ends = np.append(self.starts[1:], len(self.scores))
        pieces = [np.arange(self.starts[q], ends[q]) for q in queries]
        rows = np.concatenate([np.empty(0, np.int64), *pieces])
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1].astype(np.int64)
        old, truth = self.starts[queries], self.truth[queries]
        truth = np.where(truth >= 0, truth - old + starts, -1)
        return Features(self.names, self.scores[rows], self.ranks[rows], starts, truth, self.lengths[queries])

    def without(self, name: str) -> Features:
        """The candidates of the other components, without what one says of them."""
        kept = [i for i, own in enumerate(self.names) if own != name]
        ranks = self.ranks[:, kept]
        theirs = ranks.any(axis=1)
        place = np.append(0, np.cumsum(theirs))
        known = np.maximum(self.truth, 0)
        found = (self.truth >= 0) & np.append(theirs, False)[known]
        return Features(
            tuple(self.names[i] for i in kept),
            self.scores[theirs][:, kept],
            ranks[theirs],
            place[self.starts],
            np.where(found, place[known], -1),
            self.lengths,
        )

    def total(self, weights: Weights) -> Floats:
        """Score of each candidate under these weights, as the pipeline has it, shape (rows,)."""
        counts = np.diff(np.append(self.starts, len(self.scores)))
        total = np.zeros(len(self.scores), np.float32)
        given = [weights.for_history(int(n)) for n in self.lengths]
        for chosen in {id(w): w for w in given}.values():
            rows = np.repeat([w is chosen for w in given], counts)
            row = [np.array([of.get(n, 0.0) for n in self.names], np.float32) for of in _kinds(chosen)]
            total[rows] = self.scores[rows] @ row[0]
            if chosen.found or chosen.rank:
                ranks = self.ranks[rows]
                total[rows] += (ranks > 0) @ row[1] + discount(ranks) @ row[2]
            if chosen.lm and LM in self.names:
                total[rows] += chosen.lm * self.scores[rows, self.names.index(LM)]
        return total

    def of_targets(self, weights: Weights) -> Ranks:
        """Rank of each target under these weights, ties in the order of item codes; 0 if not found.

        What the language model alone proposed is no candidate where these weights leave it out.
        """
        total = self.total(weights)
        if LM not in self.names:
            return self.targets_in(total)
        counts = np.diff(np.append(self.starts, len(total)))
        without = np.array([not weights.for_history(int(n)).uses(LM) for n in self.lengths], np.bool_)
        left_out = np.repeat(without, counts)
        others = [i for i, name in enumerate(self.names) if name != LM]
        total[left_out & ~self.ranks[:, others].any(axis=1)] = -np.inf
        ranks, found = self.targets_in(total), self.truth >= 0
        ranks[found] = np.where(total[self.truth[found]] == -np.inf, 0, ranks[found])
        return ranks

    def targets_in(self, total: Floats) -> Ranks:
        """Rank of each target under a score of each candidate, shape (rows,)."""
        counts = np.diff(np.append(self.starts, len(total)))
        found = self.truth >= 0
        own = np.full(len(found), np.inf)
        own[found] = total[self.truth[found]]
        theirs = np.repeat(own, counts)
        earlier = np.arange(len(total)) < np.repeat(self.truth, counts)
        ahead = (total > theirs) | ((total == theirs) & earlier)
        cumulative = np.append(0, np.cumsum(ahead))
        ranks = cumulative[self.starts + counts] - cumulative[self.starts] + 1
        return np.where(found, ranks, 0)


def _kinds(weights: Weights) -> tuple[Mapping[str, float], ...]:
    return weights.retrievers, weights.found, weights.rank
