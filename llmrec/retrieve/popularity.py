"""Popularity, of all time and of late: the fallback for empty histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

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

    def shares(self) -> Floats:
        """Share of each item in the events, with one pseudo-event an item, shape (items,); sums to 1."""
        smoothed = np.exp(self.scores.astype(np.float64))
        shares: Floats = (smoothed / smoothed.sum()).astype(np.float32)
        return shares

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


class RecentConfig(BaseModel):
    """Settings of popularity over time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    half_life_days: float = Field(14.0, gt=0, description="age at which an event counts half")
    smoothing: float = Field(5.0, gt=0, description="of trends: events added to an item's long-run count")


class RecentRetriever:
    """What is popular now, or on the rise, the same for everybody; needs a clock.

    An event of age a days counts 2 ** (-a / half life) times its weight; age 0 is the latest event of the
    log. With `trend` the sum is divided by the item's undecayed count plus `smoothing`: what rises, not what
    is large.
    """

    def __init__(self, scores: Floats, config: RecentConfig, *, trend: bool) -> None:
        self.scores, self.config, self.trend = scores, config, trend
        self.name = "trending" if trend else "recent"

    @classmethod
    def fit(
        cls,
        histories: Sequence[Codes],
        stamps: Sequence[NDArray[np.int64]],
        n_items: int,
        config: RecentConfig,
        weights: Sequence[Floats] | None = None,
        *,
        trend: bool = False,
    ) -> RecentRetriever:
        """Count events by age; `stamps` are seconds, one array a history."""
        events = np.concatenate([np.empty(0, np.int32), *histories])
        seconds = np.concatenate([np.empty(0, np.int64), *stamps])
        value = np.ones(len(events)) if weights is None else np.concatenate(weights).astype(np.float64)
        days = (seconds.max(initial=0) - seconds) / 86_400
        recent = np.bincount(events, value * 0.5 ** (days / config.half_life_days), minlength=n_items)
        if trend:
            recent = recent / (np.bincount(events, value, minlength=n_items) + config.smoothing)
        return cls(recent.astype(np.float32), config, trend=trend)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return the k best allowed items for each query."""
        return [top(self.scores, k, query.mask, floor=0.0) for query in queries]

    def grown(self, n_items: int) -> RecentRetriever:
        """The same for a catalogue that has grown to `n_items`; new items have no events."""
        scores = np.pad(self.scores, (0, n_items - len(self.scores)))
        return RecentRetriever(scores, self.config, trend=self.trend)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State as arrays."""
        return {"scores": self.scores}
