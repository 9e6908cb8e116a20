"""The log: load, validate, order, and split into histories. Items are codes of the catalogue."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.catalog import Catalog
from llmrec.clock import to_seconds
from llmrec.errors import DataError, RequestError
from llmrec.protocols import Codes, Floats, Mask
from llmrec.rows import SHOWN, LoadReport, Policy, Problems, id_order, id_strings, renaming
from llmrec.tables import read_table
from llmrec.types import Event, as_id
from llmrec.weights import HEAVIEST, event_weight, type_weight

Clock = Literal["time", "none"]
"""Whether events have a time stamp; with ``"none"`` the order of rows is the order of events."""

Ties = Literal["input", "item"]
"""What orders events of one user and one time stamp: their order in the source, or the item id."""

Int64s = NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class EventLog:
    """Events in the order of users (by id) and, within a user, oldest first.

    Parameters
    ----------
    users
        User ids by user index.
    user, item
        User index and catalogue code of each event, shape (n,).
    timestamp
        Seconds since 1970, shape (n,); None where the log has no clock.
    weight
        Finite and above 0, shape (n,).
    offsets
        Shape (n_users + 1,): user u has the events ``offsets[u]:offsets[u + 1]``.
    report
        What loading did.
    """

    users: list[str]
    user: Codes
    item: Codes
    timestamp: Int64s | None
    weight: Floats
    offsets: Int64s
    report: LoadReport

    @classmethod
    def load(
        cls,
        source: Any,
        catalog: Catalog,
        *,
        mapping: Mapping[str, str] | None = None,
        clock: Clock = "time",
        ties: Ties = "input",
        policy: Policy = "raise",
        rating_threshold: float | None = None,
        event_weights: Mapping[str, float] | None = None,
        empty: bool = False,
        timestamp_format: str | None = None,
    ) -> EventLog:
        """Load events from a file, a frame or a list of `Event`.

        Parameters
        ----------
        source
            Whatever `llmrec.tables.read_table` takes, with columns user_id, item_id and timestamp (unless
            `clock` is ``"none"``); optional are weight, rating and event (a type). price and quantity may
            be there and are not used.
        catalog
            Its items are those that events may have, removed ones included.
        mapping
            Columns to rename, ``{name in the source: name in the data contract}``.
        clock, ties
            How events are ordered within a user.
        policy
            What to do with rows that lack an id or a time stamp, or have an unknown item.
        rating_threshold
            Ratings below it are not positive: these rows are left out and counted.
        event_weights
            Weight by event type; a type of weight 0 is left out and counted.
        empty
            Whether nothing may be left of the rows.
        timestamp_format
            How time stamps in text are written, as strptime has it; UTC, unless it has a zone.

        Raises
        ------
        DataError
            With all problems at once, their counts and first rows.
        """
        if clock not in ("time", "none") or ties not in ("input", "item"):
            raise DataError(f"clock is 'time' or 'none', ties 'input' or 'item'; got {clock!r} and {ties!r}")
        frame = read_table(source, "events", mapping)
        needed = ["user_id", "item_id"] + ["timestamp"] * (clock == "time")
        missing = [name for name in needed if name not in frame.columns]
        if missing:
            advice = (
                " (or declare that the log has no clock with clock='none')" if "timestamp" in missing else ""
            )
            raise DataError(
                f"events: no column {' and no column '.join(map(repr, missing))}; the columns are "
                f"{', '.join(frame.columns)}; {renaming(frame.columns, missing, 'events')}{advice}"
            )
        problems = Problems("events", frame.height)
        notes: list[str] = []
        user_ids = id_strings(frame["user_id"], "events")
        problems.add("null or blank user_id", user_ids.is_null().to_numpy())
        item = _item_codes(id_strings(frame["item_id"], "events"), catalog, problems)
        seconds = None
        if clock == "time":
            column, note = to_seconds(frame["timestamp"], "events", timestamp_format)
            notes += [note] if note else []
            unread = frame["timestamp"].filter(column.is_null() & frame["timestamp"].is_not_null())
            ways = "seconds, dates and ISO text are read, other text by data.timestamp_format"
            if timestamp_format is not None:
                ways = f"data.timestamp_format is {timestamp_format!r}"
            shown = f", e.g. {unread[0]!r}; {ways}" if len(unread) else ""
            problems.add("timestamp missing or not readable", column.is_null().to_numpy(), examples=shown)
            seconds = column.fill_null(0).to_numpy()
        weight = event_weight(frame, problems, rating_threshold, event_weights)
        notes += _unread(frame, rating_threshold, event_weights)
        report = problems.finish(policy, notes, empty=empty)
        keep = problems.keep
        users, user = _number(user_ids.filter(pl.Series(keep)))
        seconds = None if seconds is None else seconds[keep]
        ranks = catalog.id_ranks() if ties == "item" else None
        return _ordered(users, user, item[keep], seconds, weight[keep], ranks, report)

    @classmethod
    def none(cls, clock: Clock = "time") -> EventLog:
        """A log of nothing, for a catalogue that nobody has chosen from yet."""
        nothing = np.empty(0, dtype=np.int32)
        stamps = np.empty(0, dtype=np.int64) if clock == "time" else None
        report = Problems("events", 0).finish("raise", [], empty=True)
        return _ordered([], nothing, nothing, stamps, np.empty(0, dtype=np.float32), None, report)

    def __len__(self) -> int:
        return len(self.item)

    def __repr__(self) -> str:
        return f"EventLog({len(self):,} events of {self.n_users:,} users, {self.report})"

    @property
    def n_users(self) -> int:
        """Number of users, those without events included."""
        return len(self.users)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over users, events and their order."""
        digest = hashlib.sha256("\0".join(self.users).encode())
        for array in (self.user, self.item, self.timestamp, self.weight):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def require_clock(self, what: str) -> Int64s:
        """Return the time stamps, shape (n,); DataError that names `what` if the log has no clock."""
        if self.timestamp is None:
            raise DataError(f"{what} needs time stamps, and this log was loaded with clock='none'")
        return self.timestamp

    def history(self, user: int) -> Codes:
        """Return the item codes of a user index, oldest first, shape (events of the user,)."""
        return self.item[self.offsets[user] : self.offsets[user + 1]]

    def history_weights(self) -> list[Floats] | None:
        """Return the weights of each user's events, by user index; None if all are 1."""
        if bool((self.weight == 1).all()):
            return None
        return [self.weight[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def span(self) -> str:
        """Return from which day to which day the log is, in UTC; empty without a clock."""
        if self.timestamp is None or not len(self):
            return ""
        ends = (np.datetime64(int(s), "s") for s in (self.timestamp.min(), self.timestamp.max()))
        return "from {} to {}".format(*(moment.astype("datetime64[D]") for moment in ends))

    def repeat_share(self) -> float:
        """Return the share of events whose item the same user had before; one that is there twice is one."""
        if not len(self):
            return 0.0
        pairs = self.user.astype(np.int64) << 32 | self.item
        events = len(self) - _exact_repeats(self)
        return 1.0 - len(np.unique(pairs)) / events

    def select(self, keep: Mask, *, keep_users: bool = True) -> EventLog:
        """Return the events where `keep`, shape (n,); users without events stay if `keep_users`."""
        user, users = self.user[keep], self.users
        if not keep_users:
            left = np.flatnonzero(np.bincount(user, minlength=self.n_users))
            renumbered = np.zeros(self.n_users, dtype=np.int32)
            renumbered[left] = np.arange(len(left), dtype=np.int32)
            user, users = renumbered[user], [users[index] for index in left]
        timestamp = None if self.timestamp is None else self.timestamp[keep]
        offsets = _offsets(user, len(users))
        return EventLog(users, user, self.item[keep], timestamp, self.weight[keep], offsets, self.report)

    def core(self, k: int) -> EventLog:
        """Return the k-core: users and items with at least k events each, dropped until nothing changes.

        Item codes stay those of the catalogue; the report counts what went. May be empty.
        """
        keep = np.ones(len(self), dtype=np.bool_)
        while True:
            of_user = np.bincount(self.user[keep], minlength=self.n_users)[self.user]
            of_item = np.bincount(self.item[keep], minlength=int(self.item.max(initial=0)) + 1)[self.item]
            smaller = keep & (of_user >= k) & (of_item >= k)
            if smaller.sum() == keep.sum():
                break
            keep = smaller
        log = self.select(keep, keep_users=False)
        dropped = {f"not in the {k}-core": len(self) - len(log)} if len(log) < len(self) else {}
        return replace(log, report=LoadReport(len(self), len(log), dropped))

    def drop_last(self, n: int) -> EventLog:
        """Return the log without each user's last `n` events; users keep their index, even if empty."""
        to_end = self.offsets[1:][self.user] - np.arange(len(self))
        return self.select(to_end > n)

    def only_last(self, n: int) -> EventLog:
        """Return each user's last `n` events; users keep their index."""
        to_end = self.offsets[1:][self.user] - np.arange(len(self))
        return self.select(to_end <= n)

    def to_events(self, catalog: Catalog) -> list[Event]:
        """Return all events as values, users in order, oldest first."""
        ids, users = catalog.ids, self.users
        stamps = [None] * len(self) if self.timestamp is None else self.timestamp.tolist()
        rows = zip(self.user.tolist(), self.item.tolist(), stamps, self.weight.tolist(), strict=True)
        return [Event(users[user], ids[item], stamp, weight) for user, item, stamp, weight in rows]


def in_seconds(stamp: Any) -> Any:
    """Whole seconds of a datetime, in UTC unless it has a zone, or of a number; anything else as it is."""
    # What pandas has for a missing one equals nothing, itself included.
    if isinstance(stamp, datetime) and stamp == stamp:
        stamp = (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
    return math.floor(stamp) if isinstance(stamp, float) and math.isfinite(stamp) else stamp


def live_events(
    events: Iterable[Event],
    catalog: Catalog,
    clock: Clock,
    now: int,
    event_weights: Mapping[str, float] | None = None,
) -> list[Event]:
    """Return events as the store takes them, in the order given, or raise for the first that spoils the log.

    Parameters
    ----------
    clock
        With ``"none"`` time stamps are dropped: the order of arrival is the order of events.
    now
        Seconds since 1970, for events without a time stamp.
    event_weights
        Weight by event type; events of a type of weight 0 are left out.

    Raises
    ------
    RequestError
        If an item is unknown, a user blank, a time no seconds, a weight out of range, or an event_id
        no text of 1 to 500 characters.
    """
    if isinstance(events, Event):
        raise RequestError("expected a list of events, got a single one")
    checked = []
    for event in events:
        if not isinstance(event, Event):
            raise RequestError(f"expected events, got {event!r:.100}; make them with llmrec.Event")
        user, item = as_id(event.user_id, "user_id"), as_id(event.item_id, "item_id")
        stamp: Any = event.timestamp
        weight: Any = event.weight
        # Numbers of tables are numpy's.
        stamp, weight = (n.item() if isinstance(n, np.generic) else n for n in (stamp, weight))
        catalog.code(item)
        if not user.strip() or "\0" in user:
            raise RequestError(f"an event needs the id of its user, without NUL; got {user!r:.100}")
        if not (isinstance(weight, int | float) and 0 < weight <= HEAVIEST):
            raise RequestError(f"weight must be a number above 0, at most {HEAVIEST:,}; got {weight!r:.100}")
        factor = type_weight(event.event, event_weights)
        stamp = in_seconds(stamp)
        whole = isinstance(stamp, int) and not isinstance(stamp, bool) and abs(stamp) <= 10**11
        if clock == "time" and stamp is not None and not whole:
            raise RequestError(f"timestamp must be a datetime or seconds since 1970, got {stamp!r:.100}")
        named = event.event_id
        good = isinstance(named, str) and named.strip() and len(named) <= 500 and "\0" not in named
        if named is not None and not good:
            raise RequestError(
                f"event_id must be text of 1 to 500 characters, without NUL; got {named!r:.100}"
            )
        at = None if clock == "none" else now if stamp is None else stamp
        if weight * factor > HEAVIEST:
            raise RequestError(
                f"weight {weight:g} of an event {event.event!r} is above {HEAVIEST:,}, weighed"
            )
        if factor:
            checked.append(Event(user, item, at, weight * factor, named))
    return checked


def _unread(
    frame: pl.DataFrame, rating_threshold: float | None, event_weights: Mapping[str, float] | None
) -> list[str]:
    """Say which columns say nothing, and which setting would read them."""
    settings = {
        "rating": "" if rating_threshold is not None else ", where every one counts (data.rating_threshold)",
        "event": "" if event_weights is not None else ", where every type counts 1 (data.event_weights)",
    }
    read = {"user_id", "item_id", "timestamp", "weight", *(name for name, how in settings.items() if not how)}
    names = [name + settings.get(name, "") for name in frame.columns if name not in read]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"columns that are not read: {'; '.join(names[:SHOWN] + more)}"] if names else []


def _item_codes(ids: pl.Series, catalog: Catalog, problems: Problems) -> Codes:
    problems.add("null or blank item_id", ids.is_null().to_numpy())
    distinct = ids.drop_nulls().unique()
    codes = ids.replace_strict(distinct, catalog.find(distinct.to_list()), default=-1, return_dtype=pl.Int32)
    item: Codes = codes.to_numpy()
    unknown = (item < 0) & problems.keep
    others = ids.filter(pl.Series(unknown)).unique(maintain_order=True).to_list()
    examples = f", e.g. {', '.join(map(repr, others[:5]))}{_other_spelling(others, catalog)}"
    problems.add("item is not in the catalogue", unknown, examples=examples)
    return item


def _other_spelling(ids: Sequence[str], catalog: Catalog) -> str:
    """Say how the catalogue spells the first of these numbers that it has in another way, if there is one."""
    for item_id in ids:
        number = item_id.removesuffix(".0").lstrip("0") or "0"
        if number != item_id and number in catalog:
            return f"; the catalogue has {number!r} where the events have {item_id!r}"
    return ""


def _number(ids: pl.Series) -> tuple[list[str], Codes]:
    """Number ids in their order: distinct ids and the number of each row, shape (rows,)."""
    if not len(ids):
        return [], np.empty(0, np.int32)
    distinct = ids.unique()
    distinct = distinct[id_order(distinct.to_list())]
    numbers = np.arange(len(distinct), dtype=np.int32)
    return distinct.to_list(), ids.replace_strict(distinct, numbers, return_dtype=pl.Int32).to_numpy()


def _ordered(
    users: list[str],
    user: Codes,
    item: Codes,
    seconds: Int64s | None,
    weight: Floats,
    ranks: Int64s | None,
    report: LoadReport,
) -> EventLog:
    """Return the log with its events in order; numpy's sorts here keep the input order of equal keys."""
    keys: tuple[NDArray[Any], ...] = (user,)
    if seconds is not None:
        keys = (seconds, user) if ranks is None else (ranks[item], seconds, user)
    order = np.lexsort(keys)
    user, item, weight = user[order], item[order], weight[order]
    seconds = None if seconds is None else seconds[order]
    log = EventLog(users, user, item, seconds, weight, _offsets(user, len(users)), report)
    notes = list(report.notes)
    if twice := _exact_repeats(log):
        notes.append(f"kept although they repeat user, item and time stamp of another row: {twice:,}")
    late = 0 if seconds is None else int((seconds > time.time() + 86_400).sum())
    if late:
        notes.append(f"later than today, so that what is observed now comes before them: {late:,}")
    return replace(log, report=replace(report, notes=tuple(notes)))


def _exact_repeats(log: EventLog) -> int:
    if log.timestamp is None:
        return 0
    order = np.lexsort((log.item, log.timestamp, log.user))
    same = np.ones(max(len(log) - 1, 0), dtype=np.bool_)
    for array in (log.user, log.item, log.timestamp):
        values = array[order]
        same &= values[1:] == values[:-1]
    return int(same.sum())


def _offsets(user: Codes, n_users: int) -> Int64s:
    return np.concatenate([[0], np.cumsum(np.bincount(user, minlength=n_users))]).astype(np.int64)
