"""Splits of a log: what is fitted on, what settings are chosen by, what is reported.

Every part keeps the position of its targets in the log, so that `llmrec.evaluation.leaks` can check each
split without knowing how it was made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import DataError
from llmrec.events import EventLog
from llmrec.families import TrainingLog
from llmrec.protocols import Codes, Mask, Query
from llmrec.recipe import HeldOut

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Held-out events: for each user the history before and the item that followed.

    Parameters
    ----------
    users
        Index of each user in the log, shape (n,).
    histories
        n histories, oldest first.
    targets
        Shape (n,).
    events
        Position of each target in the log, shape (n,).
    """

    users: Positions
    histories: Sequence[Codes]
    targets: Codes
    events: Positions

    @classmethod
    def of(cls, log: EventLog, events: Positions) -> Part:
        """Hold these events out; the history is all that the same user did before."""
        users = log.user[events].astype(np.int64)
        histories = [log.item[log.offsets[u] : e] for u, e in zip(users, events, strict=True)]
        return cls(users, histories, log.item[events], np.asarray(events, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Positions) -> Part:
        """Some of the users."""
        return Part(
            self.users[rows], [self.histories[i] for i in rows], self.targets[rows], self.events[rows]
        )

    def sample(self, n: int | None, seed: int) -> Part:
        """A seeded sample of at most n users, in the old order; all for None."""
        if n is None or n >= len(self):
            return self
        return self.take(self.drawn(n, seed))

    def drawn(self, n: int | None, seed: int) -> Positions:
        """Rows of a seeded sample of at most n users, ascending; all for None."""
        if n is None or n >= len(self):
            return np.arange(len(self))
        return np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))

    def held_out(self, active: Mask, exclude_seen: bool) -> HeldOut:
        """Queries with masks: the whole catalogue takes part, seen items only if they may come back."""
        queries = []
        for history in self.histories:
            mask = active.copy()
            if exclude_seen:
                mask[history] = False
            queries.append(Query(history, "", mask))
        return HeldOut(queries, self.targets)

    def sha256(self, user_ids: Sequence[str]) -> str:
        """Hash of the user ids, so that results on another sample are not compared by mistake."""
        return hashlib.sha256("\0".join(user_ids[u] for u in self.users).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """A log, the events that may be fitted on, and two held-out parts.

    Parameters
    ----------
    fitted
        Shape (events,), True where the event may enter a fitted parameter.
    validation, test
        What settings are chosen by, and what is reported.
    """

    log: EventLog
    fitted: Mask
    validation: Part
    test: Part

    @cached_property
    def training(self) -> TrainingLog:
        """Events that may be fitted on, by user index."""
        return training_log(self.log, self.fitted)

    @property
    def train(self) -> Sequence[Codes]:
        """Histories of the events that may be fitted on, by user index."""
        return self.training.histories


def training_log(log: EventLog, keep: Mask | None = None) -> TrainingLog:
    """The histories of a log, or of those of its events that are kept, shape (events,)."""

    def by_user(values: NDArray[Any]) -> list[NDArray[Any]]:
        bounds = zip(log.offsets[:-1], log.offsets[1:], strict=True)
        return [values[a:b] if keep is None else values[a:b][keep[a:b]] for a, b in bounds]

    return TrainingLog(
        by_user(log.item),
        None if bool((log.weight == 1).all()) else by_user(log.weight),
        None if log.timestamp is None else by_user(log.timestamp),
    )


def leave_last_out(log: EventLog) -> Split:
    """Last event of each user is test, second last validation, the rest training.

    The test history includes the validation event. A user with fewer than three events is training only.

    Raises
    ------
    DataError
        If no user has three events.
    """
    ends = log.offsets[1:][np.diff(log.offsets) >= 3]
    if len(ends) == 0:
        raise DataError(f"leave-last-out needs users with at least 3 events; none of {log.n_users} has them")
    fitted = np.ones(len(log), dtype=np.bool_)
    fitted[ends - 1] = fitted[ends - 2] = False
    return Split(log, fitted, Part.of(log, ends - 2), Part.of(log, ends - 1))


def time_split(log: EventLog, validation_from: int, test_from: int) -> Split:
    """Fit on what was before one time; each user's first event after it is validation, after another test.

    Parameters
    ----------
    validation_from, test_from
        Seconds since 1970. Events from `validation_from` on are not fitted on.

    Raises
    ------
    DataError
        If the log has no clock, or one of the three stretches of time is empty.
    """
    stamps = log.require_clock("the split by time")
    if not validation_from < test_from:
        raise DataError(f"validation_from must be before test_from, got {validation_from} and {test_from}")
    fitted = stamps < validation_from
    parts = []
    for name, low, high in (
        ("validation", validation_from, test_from),
        ("test", test_from, np.iinfo(np.int64).max),
    ):
        events = _first_of_users(log, (stamps >= low) & (stamps < high))
        if len(events) == 0 or not fitted.any():
            missing = "training" if not fitted.any() else name
            raise DataError(
                f"the split by time leaves no {missing} events: the log runs from {stamps.min()} to "
                f"{stamps.max()}, validation from {validation_from}, test from {test_from}"
            )
        parts.append(Part.of(log, events))
    return Split(log, fitted, *parts)


def cold_item_split(log: EventLog, share: float, seed: int) -> Split:
    """Hold out all events of some items; a user's first event with one of them is the target.

    With a clock the items that appear last are test, those before them validation; without one they are
    drawn. `share` of the items that have events go to each part. A user who met a test item before their
    first validation item is not validated.

    Raises
    ------
    DataError
        If there are too few items, or nobody is left to validate on.
    """
    items = np.unique(log.item)
    n = round(share * len(items))
    if n < 1 or len(items) <= 2 * n:
        raise DataError(f"{len(items)} items are too few to hold out a share of {share:g} for each part")
    if log.timestamp is None:
        order = np.random.default_rng(seed).permutation(items)
    else:
        first = np.full(int(items.max()) + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, log.item, log.timestamp)
        order = items[np.argsort(first[items], kind="stable")]
    test, validation = np.isin(log.item, order[-n:]), np.isin(log.item, order[-2 * n : -n])
    first = _first_of_users(log, validation)
    # Whoever met a test item before would be validated on a history that holds a test event.
    met = np.full(log.n_users, len(log))
    np.minimum.at(met, log.user[test], np.flatnonzero(test))
    first = first[first < met[log.user[first]]]
    if len(first) == 0:
        raise DataError(
            "the split by cold items leaves no validation events: hold out a larger share of the items"
        )
    parts = Part.of(log, first), Part.of(log, _first_of_users(log, test))
    return Split(log, ~(test | validation), *parts)


def cold_user_split(log: EventLog, share: float, seed: int) -> Split:
    """Hold out all events of some users, drawn; the last event of each is the target.

    `share` of the users with at least two events go to each part.

    Raises
    ------
    DataError
        If there are too few users.
    """
    users = np.flatnonzero(np.diff(log.offsets) >= 2)
    n = round(share * len(users))
    if n < 1 or len(users) <= 2 * n:
        raise DataError(f"{len(users)} users are too few to hold out a share of {share:g} for each part")
    drawn = np.random.default_rng(seed).permutation(users)
    validation, test = np.sort(drawn[:n]), np.sort(drawn[n : 2 * n])
    fitted = ~np.isin(log.user, drawn[: 2 * n])
    parts = [Part.of(log, log.offsets[1:][chosen] - 1) for chosen in (validation, test)]
    return Split(log, fitted, *parts)


def tail(log: EventLog) -> tuple[TrainingLog, Part]:
    """Hold out the last event of every user with at least two: what is left, and the held-out part."""
    ends = log.offsets[1:][np.diff(log.offsets) >= 2]
    fitted = np.ones(len(log), dtype=np.bool_)
    fitted[ends - 1] = False
    return training_log(log, fitted), Part.of(log, ends - 1)


def _first_of_users(log: EventLog, chosen: Mask) -> Positions:
    """Position of each user's first event among the chosen ones."""
    events = np.flatnonzero(chosen)
    return events[np.unique(log.user[events], return_index=True)[1]]
