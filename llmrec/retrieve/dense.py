"""Dense retrieval over text embeddings: from the history, and from a typed query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from llmrec.protocols import Encoder, Floats, Hits, Query, VectorIndex
from llmrec.ranking import NO_HITS, age_weights

LEAST = 1e-3
"""Cosine below which two texts are not near."""


class ProfileConfig(BaseModel):
    """Settings of the profile retriever."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decay: float = Field(0.7, gt=0, le=1, description="weight of a history item, per step of age")


class ProfileRetriever:
    """Items whose text is near the recency-weighted mean of the history's text vectors.

    Parameters
    ----------
    vectors
        Unit text vectors of the catalogue, shape (items, dim).
    index
        An index over the same vectors.
    """

    name = "profile"

    def __init__(self, vectors: Floats, index: VectorIndex, config: ProfileConfig) -> None:
        self.vectors, self.index, self.config = vectors, index, config

    def profile(self, query: Query) -> Floats:
        """Unit vector of the history, shape (dim,)."""
        weights = age_weights(len(query.history), self.config.decay)
        vector: Floats = weights @ self.vectors[query.history]
        length = float(np.linalg.norm(vector))
        return vector / length if length > 0 else vector

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items for each query with a history."""
        able = [i for i, query in enumerate(queries) if len(query.history)]
        vectors = np.stack([self.profile(queries[i]) for i in able]) if able else self.vectors[:0]
        return _spread(len(queries), able, _nearest(self.index, queries, able, vectors, k))


class NearestConfig(BaseModel):
    """Settings of the nearest-neighbour retriever."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    last: int = Field(5, ge=1, description="latest items whose neighbours are taken; 1: the last alone")
    decay: float = Field(0.9, gt=0, le=1, description="weight of a history item, per step of age")


class NearestRetriever:
    """Items whose text is near that of any of the latest items: the largest weighted cosine counts.

    Where the profile averages tastes, this keeps them apart.
    """

    name = "nearest"

    def __init__(self, vectors: Floats, index: VectorIndex, config: NearestConfig) -> None:
        self.vectors, self.index, self.config = vectors, index, config

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items for each query with a history."""
        asked, rows, weights = [], [], []
        for row, query in enumerate(queries):
            latest = list(dict.fromkeys(query.history[::-1].tolist()))[: self.config.last]
            for age, code in enumerate(latest):
                asked.append(code)
                rows.append(row)
                weights.append(self.config.decay**age)
        codes = np.array(asked, dtype=np.int64)
        found = _nearest(self.index, queries, rows, self.vectors[codes], k)
        best: list[dict[int, float]] = [{} for _ in queries]
        for row, weight, hits in zip(rows, weights, found, strict=True):
            for item, score in zip(hits.items.tolist(), hits.scores.tolist(), strict=True):
                # Cosines may be negative: a weight must not lift those.
                best[row][item] = max(best[row].get(item, -1.0), weight * (score + 1.0) - 1.0)
        return [_ranked(scores, k) for scores in best]


def _ranked(scores: dict[int, float], k: int) -> Hits:
    order = sorted(scores, key=lambda item: (-scores[item], item))[:k]
    return Hits(np.array(order, np.int32), np.array([scores[item] for item in order], np.float32))


class TextQueryRetriever:
    """Items whose text is near the typed query."""

    name = "text"

    def __init__(self, encoder: Encoder, index: VectorIndex) -> None:
        self.encoder, self.index = encoder, index

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items for each query with words."""
        able = [i for i, query in enumerate(queries) if query.text]
        vectors = self.encoder.encode([queries[i].text for i in able])
        return _spread(len(queries), able, _nearest(self.index, queries, able, vectors, k))


def _nearest(
    index: VectorIndex, queries: Sequence[Query], rows: Sequence[int], vectors: Floats, k: int
) -> list[Hits]:
    """Hits of each vector, under the mask of the query at its row; none for a zero vector."""
    hits = [NO_HITS] * len(rows)
    # A text without a known word is as near to every item: no reason to propose any.
    able = np.flatnonzero(vectors.any(axis=1)).tolist()
    found = index.search(vectors[able], k, [queries[rows[i]].mask for i in able])
    for i, result in zip(able, found, strict=True):
        hits[i] = _near(result)
    return hits


def _near(hits: Hits) -> Hits:
    """Those hits that are near at all, in their order."""
    near = hits.scores >= LEAST
    return Hits(hits.items[near], hits.scores[near])


def _spread(n: int, rows: Sequence[int], hits: Sequence[Hits]) -> list[Hits]:
    """Hits at their rows of n, none elsewhere."""
    spread = [NO_HITS] * n
    for row, found in zip(rows, hits, strict=True):
        spread[row] = found
    return spread
