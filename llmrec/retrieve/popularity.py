"""Popularity: the fallback for empty histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.ranking import top


class PopularityRetriever:
    """The items with the most training events, the same for everybody; score = log(1 + weight of events)."""

    name = "popularity"

    def __init__(self, scores: Floats) -> None:
        self.scores = scores

    @classmethod
    def fit(
        cls, histories: Sequence[Codes], n_items: int, weights: Sequence[Floats] | None = None
    ) -> PopularityRetriever:
        """Count events, each by its weight where `weights` are given, one array a history."""
        events = np.concatenate([np.empty(0, np.int32), *histories])
        counted = None if weights is None else np.concatenate([np.empty(0, np.float32), *weights])
        return cls(np.log1p(np.bincount(events, counted, minlength=n_items)).astype(np.float32))

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return the k most popular allowed items for each query."""
        return [top(self.scores, k, query.mask) for query in queries]

    def grown(self, n_items: int) -> PopularityRetriever:
        """The same for a catalogue that has grown to `n_items`; new items have no events."""
        return PopularityRetriever(np.pad(self.scores, (0, n_items - len(self.scores))))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State as arrays."""
        return {"scores": self.scores}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> PopularityRetriever:
        """Make the retriever from `arrays()`."""
        return cls(arrays["scores"])
