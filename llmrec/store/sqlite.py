"""Events and changed items in one SQLite file, which several threads and processes may use at once."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from llmrec.errors import StoreError
from llmrec.protocols import Columns, ItemChange
from llmrec.store.common import (
    BUSY_SECONDS,
    Row,
    body_of,
    changes_of,
    check_same,
    is_text,
    refused,
    row_of,
    with_ids,
)
from llmrec.types import Event

SCHEMA_VERSION = 2
_BULK = 10_000
_LAST = "\U0010ffff"

_TABLE = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    timestamp INTEGER,
    weight REAL NOT NULL,
    event_id TEXT
)
"""
_INDEX = "CREATE INDEX events_by_user ON events (user_id, seq)"
# What version 2 has beside version 1. AUTOINCREMENT never gives a number twice: it says what is new.
_SINCE_2 = (
    "CREATE UNIQUE INDEX events_by_id ON events (user_id, event_id) WHERE event_id IS NOT NULL",
    "CREATE TABLE items (seq INTEGER PRIMARY KEY AUTOINCREMENT, item_id TEXT NOT NULL UNIQUE, body TEXT)",
)
_INSERT = (
    "INSERT INTO events (user_id, item_id, timestamp, weight, event_id) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (user_id, event_id) WHERE event_id IS NOT NULL DO NOTHING"
)
_SELECT = "SELECT user_id, item_id, timestamp, weight, event_id FROM events"
_COLUMNS = "SELECT user_id, item_id, timestamp, weight FROM events"

# An event without a time stamp comes after those that have one: in a log without a clock the order of
# arrival is the order of events, and in one with a clock it was observed after the log was loaded.
_OLDEST_FIRST = "ORDER BY timestamp NULLS LAST, seq"
_LATEST_FIRST = "ORDER BY timestamp DESC NULLS FIRST, seq DESC"


class SQLiteStore:
    """An event store in one file (and its ``-wal`` beside it while it is open).

    What a method has stored survives the death of the process and a power loss.

    Parameters
    ----------
    path
        The file, made if it is missing; ``":memory:"`` keeps everything in this process.

    Raises
    ------
    StoreError
        If the file is no event store, one of another version, or cannot be opened.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: sqlite3.Connection | None = None
        try:
            self._open = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._prepare(self._open)
        except sqlite3.Error as error:
            self.close()
            raise StoreError(
                f"cannot open {self.path} as an event store: {error}; pass a file that llmrec wrote, or "
                f"a new name in a folder that exists and can be written"
            ) from error
        except StoreError:
            self.close()
            raise

    def append(self, events: Sequence[Event]) -> int:
        """Store events in the order given, all of them or none if one is refused; return how many were new.

        An event whose `event_id` the user has already is not stored again.

        Raises
        ------
        DataError
            If an event has no user, no item, or a weight that is not a number, or its id is that of
            another event.
        """
        known = with_ids(events)
        return self._insert([row_of(event) for event in events], known) if events else 0

    def _insert(self, rows: Sequence[Row], known: dict[tuple[str, str], Event]) -> int:
        with self._transaction() as connection:
            # Sorting the users once is three times faster than finding the place of each.
            bulk = len(rows) > _BULK and len(rows) > _count(connection)
            if bulk:
                connection.execute("DROP INDEX events_by_user")
            try:
                new = connection.executemany(_INSERT, rows).rowcount
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError, OverflowError, ValueError) as error:
                raise refused(len(rows), error) from error
            if bulk:
                connection.execute(_INDEX)
            if new < len(rows):
                for key, event in known.items():
                    stored = "SELECT item_id, weight FROM events WHERE user_id = ? AND event_id = ?"
                    check_same(event, *connection.execute(stored, key).fetchone())
        return new

    def history(self, user_id: str, limit: int | None = None) -> list[Event]:
        """Return the latest `limit` events of a user, oldest first: by (timestamp, order of arrival)."""
        query = f"{_SELECT} WHERE user_id = ? {_LATEST_FIRST} LIMIT ?"
        with self._connection() as connection:
            try:
                rows = connection.execute(query, (user_id, -1 if limit is None else limit)).fetchall()
            except UnicodeEncodeError:
                return []  # no such id can be stored
        return [Event(*row) for row in reversed(rows)]

    def users(self, prefix: str = "", limit: int = 10) -> list[str]:
        """Return up to `limit` user ids that begin with `prefix`, in the order of their code points."""
        with self._connection() as connection:
            try:
                # Characters above all others end the range, so that the index is used and case counts.
                rows = connection.execute(
                    "SELECT DISTINCT user_id FROM events WHERE user_id >= ? AND user_id < ? "
                    "ORDER BY user_id LIMIT ?",
                    (prefix, prefix + _LAST, limit),
                ).fetchall()
            except UnicodeEncodeError:
                return []  # no such id can be stored
        return [user for (user,) in rows]

    def forget(self, *user_ids: str) -> int:
        """Delete all events of some users and rewrite the file without them; return how many there were.

        Takes about a second for a million events, during which others wait; for all users once.

        Raises
        ------
        StoreError
            If another process kept the file busy: the events are deleted, but their bytes may still be in
            the file or its log. Calling again finishes the work.
        """
        stored = [user_id for user_id in user_ids if is_text(user_id)]
        if not stored:
            return 0
        with self._transaction() as connection:
            deletion = "DELETE FROM events WHERE user_id = ?"
            count = sum(connection.execute(deletion, (user_id,)).rowcount for user_id in stored)
        why = f"another process kept it busy for {BUSY_SECONDS:.0f} s"
        with self._connection() as connection:
            try:
                # `secure_delete` overwrites rows in place, but a page that was split may hold a stale copy.
                connection.execute("VACUUM")
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            except sqlite3.OperationalError as error:
                busy = True
                why = f"it could not be rewritten ({error})" if not _is_busy(error) else why
        if busy:
            raise StoreError(
                f"{count} events are deleted, but their bytes may still be in {self.path} or its "
                f"-wal, since {why}: call forget again"
            )
        return count

    def events(self) -> list[Event]:
        """Return all events, oldest first: by (timestamp, order of arrival)."""
        with self._connection() as connection:
            return [Event(*row) for row in connection.execute(f"{_SELECT} {_OLDEST_FIRST}")]

    def columns(self) -> Columns:
        """Return all events as columns, oldest first: much faster than `events` for a large log."""
        with self._connection() as connection:
            rows = connection.execute(f"{_COLUMNS} {_OLDEST_FIRST}").fetchall()
        if not rows:
            return Columns([], [], [], [])
        users, items, timestamps, weights = zip(*rows, strict=True)
        return Columns(list(users), list(items), list(timestamps), list(weights))

    def count(self) -> int:
        """Return the number of events."""
        with self._connection() as connection:
            return _count(connection)

    def rows(self) -> Iterator[Row]:
        """Return all events as they are stored, in the order of arrival; others wait until all were taken."""
        with self._connection() as connection:
            yield from connection.execute(f"{_SELECT} ORDER BY seq")

    def item_changes(self, after: int = 0) -> tuple[int, list[ItemChange]]:
        """Return the changes of items after a number, the last one of each item, and the last number."""
        with self._connection() as connection:
            return _item_changes(connection, after)

    def change_items(
        self, after: int, decide: Callable[[list[ItemChange]], Sequence[ItemChange]]
    ) -> tuple[int, list[ItemChange]]:
        """Store changes of items, see `EventStore`; `decide` must not use this store."""
        with self._transaction() as connection:
            rows = [(c.item_id, body_of(c)) for c in decide(_item_changes(connection, after)[1])]
            # A new row, since its number says that it is the latest change.
            connection.executemany("REPLACE INTO items (item_id, body) VALUES (?, ?)", rows)
            return _item_changes(connection, after)

    def fill(self, rows: Iterable[Row]) -> None:
        """Store the rows of another store, in the order given."""
        self._insert(list(rows), {})

    def clear_items(self) -> None:
        """Forget all changes of items."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM items")

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy while others go on writing; an existing file is replaced in one step."""
        with self._connection() as connection:
            self._copy(connection, Path(path))

    @staticmethod
    def _copy(connection: sqlite3.Connection, path: Path) -> None:
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{threading.get_ident()}")
        try:
            copy = sqlite3.connect(temporary)
            try:
                connection.backup(copy)
            finally:
                copy.close()
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            # SQLite would replay the log of the replaced file onto the new one.
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the file. Closing twice is allowed."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection to one thread at a time."""
        if os.getpid() != self._pid:
            # A SQLite connection that went through a fork corrupts the file.
            raise StoreError(
                f"{self.path} was opened in another process: open a SQLiteStore of its own in each"
            )
        with self._lock:
            if self._open is None:
                raise StoreError(f"the event store {self.path} is closed: open a new SQLiteStore")
            try:
                yield self._open
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
                raise
            except sqlite3.DatabaseError as error:
                raise StoreError(f"the event store {self.path} cannot be used: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            # IMMEDIATE waits for the write lock at once; a later upgrade would fail without waiting.
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                _roll_back(connection)
                raise
            connection.execute("COMMIT")

    @contextmanager
    def sealing(self) -> Iterator[None]:
        """Keep all others from writing, and leave no table to write to: for a store that is moved.

        Readers, of another connection, are not kept. If what happens meanwhile fails, nothing has changed.
        """
        with self._transaction() as connection:
            yield
            connection.execute("DROP TABLE events")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check or make the tables, then set how they are written."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version not in (1, SCHEMA_VERSION) and (version or tables):
                raise StoreError(
                    f"{self.path} has schema version {version}, this llmrec reads {SCHEMA_VERSION}: "
                    f"use the llmrec that wrote it, or another file"
                )
            if not tables:
                connection.execute(_TABLE)
                connection.execute(_INDEX)
            elif version == 1:
                connection.execute("ALTER TABLE events ADD COLUMN event_id TEXT")
            if version != SCHEMA_VERSION:
                for statement in _SINCE_2:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            _roll_back(connection)
            raise
        connection.execute("COMMIT")
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")


def _count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])


def _roll_back(connection: sqlite3.Connection) -> None:
    # Where the disk is full SQLite has done it by itself.
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _item_changes(connection: sqlite3.Connection, after: int) -> tuple[int, list[ItemChange]]:
    rows = connection.execute("SELECT item_id, body, seq FROM items WHERE seq > ? ORDER BY seq", (after,))
    found = rows.fetchall()
    last = found[-1][2] if found else after
    return last, list(changes_of((item_id, body) for item_id, body, _ in found))


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the file; unlike other statements this one does not wait for others that open it."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
