"""Popularity, of all time and of late: the fallback for empty histories."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.ranking import top

HALF_LIVES_DAYS = (7.0, 30.0, 90.0, 365.0, np.inf)
"""Ages at which an event counts half, that are tried for popularity of late; infinity is all time."""

LATE = 0.1
"""Share of the latest events that choose among them."""


class PopularityRetriever:
    """The items with the most training events, the same for everybody; score = log(1 + weight of events).

    Parameters
    ----------
    scores
        Of all time, shape (items,).
    fresh
        Of late, shape (items,), for a query that asks nothing: no history, no words. None where the log
        has no clock: then those of all time.
    """

    name = "popularity"

    def __init__(self, scores: Floats, fresh: Floats | None = None) -> None:
        self.scores, self.fresh = scores, fresh

    @cached_property
    def _order(self) -> Codes:
        """All items, best first: everybody gets the first of them."""
        return _best_first(self.scores)

    @cached_property
    def _shares(self) -> Floats:
        smoothed = np.exp(self.scores.astype(np.float64))
        shares: Floats = (smoothed / smoothed.sum()).astype(np.float32)
        return shares

    @cached_property
    def _fresh_order(self) -> Codes:
        """The same of late."""
        return _best_first(self.scores if self.fresh is None else self.fresh)

    @classmethod
    def fit(
        cls,
        histories: Sequence[Codes],
        n_items: int,
        weights: Sequence[Floats] | None = None,
        stamps: Sequence[NDArray[np.int64]] | None = None,
    ) -> PopularityRetriever:
        """Count events, each by its weight; weights and stamps (seconds) are one array a history."""
        events = np.concatenate([np.empty(0, np.int32), *histories])
        counted = np.ones(len(events)) if weights is None else np.concatenate([np.empty(0), *weights])
        scores = np.log1p(np.bincount(events, counted, minlength=n_items)).astype(np.float32)
        if stamps is None or not len(events):
            return cls(scores)
        return cls(scores, fresh_scores(events, np.concatenate(stamps), counted, n_items))

    def shares(self) -> Floats:
        """Share of each item in the events, with one pseudo-event an item, shape (items,); sums to 1."""
        return self._shares

    def among(self, found: Iterable[Hits]) -> Hits:
        """What others found for one query, the most popular first."""
        items = np.unique(np.concatenate([np.empty(0, np.int32), *(hits.items for hits in found)]))
        scores = self.scores[items]
        order = np.lexsort((items, -scores))
        return Hits(items[order].astype(np.int32), scores[order])

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return the k most popular allowed items for each query; of late where nothing is asked."""
        return [self._first(query, k) for query in queries]

    def _first(self, query: Query, k: int) -> Hits:
        asks = len(query.history) or query.text
        scores, order = self.scores, self._order
        if self.fresh is not None and not asks:
            scores, order = self.fresh, self._fresh_order
        if query.mask is not None:
            some = order[: 4 * k]
            codes = some[query.mask[some]]
            order = codes if len(codes) >= k else order[query.mask[order]]
        return Hits(order[:k], scores[order[:k]].astype(np.float32))

    def grown(self, n_items: int) -> PopularityRetriever:
        """The same for a catalogue that has grown to `n_items`; new items have no events."""
        more = (0, n_items - len(self.scores))
        return PopularityRetriever(
            np.pad(self.scores, more), None if self.fresh is None else np.pad(self.fresh, more)
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State as arrays."""
        return {"scores": self.scores} | ({} if self.fresh is None else {"fresh": self.fresh})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> PopularityRetriever:
        """Make the retriever from `arrays()`."""
        return cls(arrays["scores"], arrays.get("fresh"))


def _best_first(scores: Floats) -> Codes:
    order: Codes = np.argsort(-scores, kind="stable").astype(np.int32)
    return order


def newest(stamps: NDArray[np.int64]) -> int:
    """The latest time stamp, in seconds; those of tomorrow or later are mistakes, unless all are."""
    past = stamps[stamps <= time.time() + 86_400]
    known = past if len(past) else stamps
    return int(known.max()) if len(known) else 0


def fresh_scores(
    events: Codes, stamps: NDArray[np.int64], weights: NDArray[np.floating[Any]], n_items: int
) -> Floats:
    """Popularity of late on the scale of counts, log(1 + expected weight), shape (items,).

    Half of an item's share is its share of all time, with one pseudo-event an item; the other half the share
    in events that fade with age. The half-life is the one under which the latest tenth of the events would
    have been most probable, from what came before; where what was popular stays so, that is infinity.
    Arguments have one entry an event; stamps are seconds.
    """
    order = np.argsort(stamps, kind="stable")
    events, stamps, weights = events[order], stamps[order], weights[order].astype(np.float64)
    early, latest = len(events) - max(1, round(LATE * len(events))), newest(stamps)

    def shares(until: int, half_life: float) -> NDArray[np.float64]:
        before = slice(0, until)
        days = np.maximum(min(stamps[until - 1], latest) - stamps[before], 0) / 86_400
        faded = np.bincount(events[before], weights[before] * 0.5 ** (days / half_life), minlength=n_items)
        counts = np.bincount(events[before], weights[before], minlength=n_items) + 1.0
        mixed: NDArray[np.float64] = 0.5 * counts / counts.sum() + 0.5 * faded / faded.sum()
        return mixed

    def nats(half_life: float) -> float:
        return -float(weights[early:] @ np.log(shares(early, half_life)[events[early:]]))

    chosen = min(reversed(HALF_LIVES_DAYS), key=nats) if early > 0 else np.inf
    fresh: Floats = np.log1p(shares(len(events), chosen) * weights.sum()).astype(np.float32)
    return fresh


class RecentConfig(BaseModel):
    """Settings of popularity over time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    half_life_days: float = Field(14.0, gt=0, description="age at which an event counts half")
    smoothing: float = Field(5.0, gt=0, description="of trends: events added to an item's long-run count")


class RecentRetriever:
    """What is popular now, or on the rise, the same for everybody; needs a clock.

    An event of age a days counts 2 ** (-a / half life) times its weight; age 0 is the latest event of the
    log, see `newest`. With `trend` the sum is divided by the item's undecayed count plus `smoothing`: what
    rises, not what is large.
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
        days = np.maximum(newest(seconds) - seconds, 0) / 86_400
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
