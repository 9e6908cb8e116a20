"""Arrange a ranked list under the rules: pins, caps on attribute values, diversity. Pure.

    candidates, best first -> pins first -> one after another, by score or MMR, under caps -> at most k

What leaves here is allowed, listed once and within the caps, whatever the earlier stages made of the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec.candidates import Candidates, normalise
from llmrec.errors import RequestError
from llmrec.protocols import Codes, Floats, Mask
from llmrec.types import AttributeValue

PIN = "pin"
"""Name of the caller's pins in the provenance."""


@dataclass(frozen=True, slots=True)
class Cap:
    """At most `limit` items of each value of an attribute.

    Parameters
    ----------
    name
        Of the attribute.
    values
        Those of each candidate, in the candidates' order; a candidate without a value is not capped.
    """

    name: str
    limit: int
    values: Sequence[Sequence[AttributeValue]]


def pinned(found: Candidates, pins: Codes) -> Candidates:
    """Put items first, in the order given, and name ``pin`` as one of their sources.

    Nothing else changes: a pin keeps the score that it has among the candidates, 0 if it is none of them.
    """
    if not len(pins):
        return found
    place = {int(code): row for row, code in enumerate(found.items)}
    rows = np.array([place.get(int(code), -1) for code in pins], np.int64)
    known = rows >= 0
    scores, m = np.zeros(len(pins), np.float32), len(found.names)
    parts, ranks = np.zeros((len(pins), m), np.float32), np.zeros((len(pins), m), np.int32)
    scores[known], parts[known], ranks[known] = (
        values[rows[known]] for values in (found.scores, found.parts, found.ranks)
    )
    rest = found.take(np.flatnonzero(~np.isin(found.items, pins)))
    own = np.zeros((len(pins) + len(rest.items), 1), np.int32)
    own[: len(pins), 0] = np.arange(1, len(pins) + 1)
    parts = np.concatenate([parts, rest.parts])
    return Candidates(
        np.concatenate([pins, rest.items]).astype(np.int32),
        np.concatenate([scores, rest.scores]),
        (*found.names, PIN),
        np.concatenate([parts, np.zeros_like(own, np.float32)], axis=1),
        np.concatenate([np.concatenate([ranks, rest.ranks]), own], axis=1),
    )


def arrange(
    found: Candidates,
    k: int,
    allowed: Mask | None = None,
    pins: int = 0,
    caps: Sequence[Cap] = (),
    diversity: float = 0.0,
    vectors: Floats | None = None,
) -> Candidates:
    """Choose up to k candidates, one after another, each the best that breaks no rule.

    A candidate that is over a cap stays out, so that the next one takes its place. With lists of values
    another choice might fit more items under the caps: the better item comes first here.

    Parameters
    ----------
    found
        n candidates, best first, the pins before them all (`pinned`).
    allowed
        Shape (items,), True where an item may be returned; None allows all. Pins are not looked up in it.
    pins
        How many of the first candidates are pins, at most k.
    diversity
        d in [0, 1]: with d > 0 the next candidate is that with the largest (1 - d) * score - d * (largest
        cosine to what is chosen already), scores of all that may be chosen scaled to [0, 1], ties in the
        order of `found`: maximal marginal relevance, Carbonell and Goldstein 1998, with d = 1 - lambda.
    vectors
        Unit text vectors of the candidates, shape (n, dim); needed where `diversity` is above 0.

    Raises
    ------
    RequestError
        If the pins alone are over a cap.
    """
    room = _Room(len(found.items), caps)
    for row in range(pins):
        room.check_pin(row)
        room.take(row)
    free = _free(found.items, pins, allowed)
    if diversity > 0:
        assert vectors is not None
        chosen = _by_margin(found.scores, free, k, pins, room, diversity, vectors)
    else:
        chosen = _in_order(free, k, pins, room)
    return found.take(np.array(chosen, np.int64))


def _free(items: Codes, pins: int, allowed: Mask | None) -> NDArray[np.int64]:
    """Rows after the pins that may be chosen: allowed, and no item twice. Ascending."""
    first = np.zeros(len(items), np.bool_)
    first[np.unique(items, return_index=True)[1]] = True
    first[:pins] = False
    return np.flatnonzero(first if allowed is None else first & allowed[items])


def _in_order(free: NDArray[np.int64], k: int, pins: int, room: _Room) -> list[int]:
    chosen = list(range(pins))
    for row in free.tolist():
        if len(chosen) >= k:
            break
        if room.open[row]:
            room.take(row)
            chosen.append(row)
    return chosen


def _by_margin(
    scores: Floats,
    free: NDArray[np.int64],
    k: int,
    pins: int,
    room: _Room,
    diversity: float,
    vectors: Floats,
) -> list[int]:
    chosen, own = list(range(pins)), vectors[free]
    relevance = (1.0 - diversity) * normalise(scores[free]).astype(np.float64)
    nearest = (own @ vectors[:pins].T).max(axis=1) if pins else np.zeros(len(free), np.float32)
    while len(chosen) < k and room.open[free].any():
        margin = relevance - diversity * nearest.astype(np.float64)
        row = int(free[np.where(room.open[free], margin, -np.inf).argmax()])
        cosines = own @ vectors[row]
        nearest = np.maximum(nearest, cosines) if chosen else cosines
        room.take(row)
        chosen.append(row)
    return chosen


class _Room:
    """Which rows may still be chosen: `open`, shape (n,). Taking one closes those that no longer fit."""

    def __init__(self, n: int, caps: Sequence[Cap]) -> None:
        self.open = np.ones(n, np.bool_)
        self._caps = caps
        self._rows: list[dict[AttributeValue, list[int]]] = []
        for cap in caps:
            rows: dict[AttributeValue, list[int]] = {}
            for row, values in enumerate(cap.values):
                for value in set(values):
                    rows.setdefault(value, []).append(row)
            self._rows.append(rows)
        self._counts: list[Counter[AttributeValue]] = [Counter() for _ in caps]

    def take(self, row: int) -> None:
        """Choose a row."""
        self.open[row] = False
        for cap, rows, counted in zip(self._caps, self._rows, self._counts, strict=True):
            for value in set(cap.values[row]):
                counted[value] += 1
                if counted[value] >= cap.limit:
                    self.open[rows[value]] = False

    def check_pin(self, row: int) -> None:
        """Raise RequestError if a pin is over a cap."""
        for cap, counted in zip(self._caps, self._counts, strict=True):
            for value in cap.values[row]:
                if counted[value] >= cap.limit:
                    raise RequestError(
                        f"pins break other rules: more than {cap.limit} of them have {cap.name} {value!r}, "
                        f"which caps do not allow; pin fewer of these, or raise the cap"
                    )
