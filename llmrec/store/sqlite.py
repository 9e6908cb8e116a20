"""Events in one SQLite file: several threads and processes may read and write it at once."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from llmrec.errors import DataError, ModelError
from llmrec.types import Event

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
"""How long to wait for another process that is writing."""
_BULK = 10_000
_LAST = "\U0010ffff"

_TABLE = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    timestamp INTEGER,
    weight REAL NOT NULL
)
"""
_INDEX = "CREATE INDEX events_by_user ON events (user_id, seq)"
_INSERT = "INSERT INTO events (user_id, item_id, timestamp, weight) VALUES (?, ?, ?, ?)"
_SELECT = "SELECT user_id, item_id, timestamp, weight FROM events"

# An event without a time stamp comes after those that have one: in a log without a clock the order of
# arrival is the order of events, and in one with a clock it was observed after the log was loaded.
_OLDEST_FIRST = "ORDER BY timestamp NULLS LAST, seq"
_LATEST_FIRST = "ORDER BY timestamp DESC NULLS FIRST, seq DESC"


class Columns(NamedTuple):
    """All events as columns of the same length, oldest first; times in seconds, None where there is none."""

    users: list[str]
    items: list[str]
    timestamps: list[int | None]
    weights: list[float]


class SQLiteStore:
    """An event store in one file (and its ``-wal`` beside it while it is open).

    An event that `append` took survives the death of the process and a power loss.

    Parameters
    ----------
    path
        The file, made if it is missing; ``":memory:"`` keeps everything in this process.

    Raises
    ------
    ModelError
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
            raise ModelError(
                f"cannot open {self.path} as an event store: {error}; pass a file that llmrec wrote, or "
                f"a new name in a folder that exists and can be written"
            ) from error
        except ModelError:
            self.close()
            raise

    def append(self, events: Sequence[Event]) -> None:
        """Store events in the order given: all of them, or none if one is refused.

        Raises
        ------
        DataError
            If an event has no user, no item, or a weight that is not a number.
        """
        rows = [(e.user_id, e.item_id, e.timestamp, e.weight) for e in events]
        if not rows:
            return
        with self._transaction() as connection:
            # Sorting the users once is three times faster than finding the place of each.
            bulk = len(rows) > _BULK and len(rows) > _count(connection)
            if bulk:
                connection.execute("DROP INDEX events_by_user")
            try:
                connection.executemany(_INSERT, rows)
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError, OverflowError) as error:
                raise DataError(
                    f"none of {len(rows)} events was stored, since one was refused: {error}; an event needs "
                    f"a user_id, an item_id and a weight that is a number"
                ) from error
            if bulk:
                connection.execute(_INDEX)

    def history(self, user_id: str, limit: int | None = None) -> list[Event]:
        """Return the latest `limit` events of a user, oldest first: by (timestamp, order of arrival)."""
        with self._connection() as connection:
            rows = connection.execute(
                f"{_SELECT} WHERE user_id = ? {_LATEST_FIRST} LIMIT ?",
                (user_id, -1 if limit is None else limit),
            ).fetchall()
        return [Event(*row) for row in reversed(rows)]

    def users(self, prefix: str = "", limit: int = 10) -> list[str]:
        """Return up to `limit` user ids that begin with `prefix`, in the order of their code points."""
        with self._connection() as connection:
            # Characters above all others end the range, so that the index is used and case counts.
            rows = connection.execute(
                "SELECT DISTINCT user_id FROM events WHERE user_id >= ? AND user_id < ? "
                "ORDER BY user_id LIMIT ?",
                (prefix, prefix + _LAST, limit),
            ).fetchall()
        return [user for (user,) in rows]

    def forget(self, user_id: str) -> int:
        """Delete all events of a user and rewrite the file without them; return how many there were.

        Takes about a second for a million events, during which others wait.

        Raises
        ------
        ModelError
            If another process kept the file busy: the events are deleted, but their bytes may still be in
            the file or its log. Calling again finishes the work.
        """
        with self._transaction() as connection:
            count = connection.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount
        with self._connection() as connection:
            try:
                # `secure_delete` overwrites rows in place, but a page that was split may hold a stale copy.
                connection.execute("VACUUM")
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            except sqlite3.OperationalError as error:
                busy = error
        if busy:
            raise ModelError(
                f"{count} events of the user are deleted, but their bytes may still be in {self.path} or its "
                f"-wal, since another process kept it busy for {BUSY_SECONDS:.0f} s: call forget again"
            )
        return count

    def events(self) -> list[Event]:
        """Return all events, oldest first: by (timestamp, order of arrival)."""
        return [Event(*row) for row in zip(*self.columns(), strict=True)]

    def columns(self) -> Columns:
        """Return all events as columns, oldest first: much faster than `events` for a large log."""
        with self._connection() as connection:
            rows = connection.execute(f"{_SELECT} {_OLDEST_FIRST}").fetchall()
        if not rows:
            return Columns([], [], [], [])
        users, items, timestamps, weights = zip(*rows, strict=True)
        return Columns(list(users), list(items), list(timestamps), list(weights))

    def count(self) -> int:
        """Return the number of events."""
        with self._connection() as connection:
            return _count(connection)

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy while others go on writing; an existing file is replaced in one step."""
        with self._connection() as connection:
            self._copy(connection, Path(path))

    @contextmanager
    def moving(self, path: Path) -> Iterator[None]:
        """Copy everything to `path`, and go on there once the block has ended well; others wait meanwhile."""
        with self._connection() as connection:
            self._copy(connection, Path(path))
            yield
            there = SQLiteStore(path)
            connection.close()
            self._open, self.path = there._open, there.path

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
            raise ModelError(
                f"{self.path} was opened in another process: open a SQLiteStore of its own in each"
            )
        with self._lock:
            if self._open is None:
                raise ModelError(f"the event store {self.path} is closed: open a new SQLiteStore")
            yield self._open

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            # IMMEDIATE waits for the write lock at once; a later upgrade would fail without waiting.
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check or make the tables, then set how they are written."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version != SCHEMA_VERSION and (version or tables):
                raise ModelError(
                    f"{self.path} has schema version {version}, this llmrec reads {SCHEMA_VERSION}: "
                    f"use the llmrec that wrote it, or another file"
                )
            if not tables:
                connection.execute(_TABLE)
                connection.execute(_INDEX)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")


def _count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the file; unlike other statements this one does not wait for others that open it."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
