"""Splits of a log: what is trained on, what settings are chosen by, what is reported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import DataError
from llmrec.events import EventLog
from llmrec.protocols import Codes, Floats, Mask, Query
from llmrec.recipe import HeldOut


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
    """

    users: NDArray[np.int64]
    histories: Sequence[Codes]
    targets: Codes

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: NDArray[np.int64]) -> Part:
        """Some of the users."""
        return Part(self.users[rows], [self.histories[i] for i in rows], self.targets[rows])

    def sample(self, n: int | None, seed: int) -> Part:
        """A seeded sample of at most n users, in the old order; all for None."""
        if n is None or n >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False)))

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


@dataclass(frozen=True, slots=True)
class Split:
    """Training histories and weights of their events by user index; events to choose by and to report on."""

    train: Sequence[Codes]
    weights: Sequence[Floats] | None
    validation: Part
    test: Part


def leave_last_out(log: EventLog) -> Split:
    """Last event of each user is test, second last validation, the rest training.

    The test history includes the validation event. A user with fewer than three events is training only.

    Raises
    ------
    DataError
        If no user has three events.
    """
    lengths = np.diff(log.offsets)
    users = np.flatnonzero(lengths >= 3)
    if len(users) == 0:
        raise DataError(f"leave-last-out needs users with at least 3 events; none of {log.n_users} has them")
    histories = [log.history(u) for u in range(log.n_users)]
    train = [h[:-2] if len(h) >= 3 else h for h in histories]

    def part(back: int) -> Part:
        before = [histories[u][:-back] for u in users]
        return Part(users, before, np.array([histories[u][-back] for u in users], dtype=np.int32))

    return Split(train, _shortened(log, train), part(2), part(1))


def tail(log: EventLog) -> tuple[list[Codes], list[Floats] | None, Part]:
    """Hold out the last event of every user with at least two: histories, their weights, held-out part."""
    lengths = np.diff(log.offsets)
    users = np.flatnonzero(lengths >= 2)
    histories = [log.history(u) for u in range(log.n_users)]
    train = [h[:-1] if len(h) >= 2 else h for h in histories]
    targets = np.array([histories[u][-1] for u in users], dtype=np.int32)
    return train, _shortened(log, train), Part(users, [train[u] for u in users], targets)


def _shortened(log: EventLog, train: Sequence[Codes]) -> list[Floats] | None:
    """Weights of the events that are left in training."""
    weights = log.history_weights()
    return None if weights is None else [w[: len(h)] for w, h in zip(weights, train, strict=True)]
