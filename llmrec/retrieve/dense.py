"""Dense retrieval over text embeddings: from the history, and from a typed query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from llmrec.protocols import Encoder, Floats, Hits, Query, VectorIndex
from llmrec.ranking import NO_HITS, age_weights


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
        return _nearest(self.index, queries, able, vectors, k)


class TextQueryRetriever:
    """Items whose text is near the typed query."""

    name = "text"

    def __init__(self, encoder: Encoder, index: VectorIndex) -> None:
        self.encoder, self.index = encoder, index

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items for each query with words."""
        able = [i for i, query in enumerate(queries) if query.text]
        vectors = self.encoder.encode([queries[i].text for i in able])
        return _nearest(self.index, queries, able, vectors, k)


def _nearest(
    index: VectorIndex, queries: Sequence[Query], rows: Sequence[int], vectors: Floats, k: int
) -> list[Hits]:
    """Hits of the queries at `rows`, which have these vectors; none for the others and for a zero vector."""
    hits = [NO_HITS] * len(queries)
    # A text without a known word is as near to every item: no reason to propose any.
    able = np.flatnonzero(vectors.any(axis=1)).tolist()
    found = index.search(vectors[able], k, [queries[rows[i]].mask for i in able])
    for i, result in zip(able, found, strict=True):
        hits[rows[i]] = result
    return hits
