"""Events and changed items in a PostgreSQL database, which processes on many machines may use at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from llmrec.database import make_engine, shown, state_of, unusable
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

if TYPE_CHECKING:
    from sqlalchemy import Connection

A = TypeVar("A")

SCHEMA_VERSION = 1
ATTEMPTS = 3
"""How often a transaction is tried that another one made impossible."""

_DEADLOCK, _LOCK_TIMEOUT, _MANY = "40P01", "55P03", 1000
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,40}")
_FIELDS = "user_id, item_id, timestamp, weight, event_id"

# The planner finds a user without statistics, and those of user_id would hold ids that `forget` must erase.
_TABLES = """
CREATE TABLE {name}_events (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    timestamp BIGINT,
    weight DOUBLE PRECISION NOT NULL CHECK (weight <> 'NaN'),
    event_id TEXT
);
ALTER TABLE {name}_events ALTER COLUMN user_id SET STATISTICS 0, ALTER COLUMN event_id SET STATISTICS 0;
CREATE INDEX {name}_by_user ON {name}_events (user_id, timestamp DESC NULLS FIRST, seq DESC);
CREATE UNIQUE INDEX {name}_by_id ON {name}_events (user_id, event_id) WHERE event_id IS NOT NULL;
CREATE TABLE {name}_items (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    item_id TEXT NOT NULL UNIQUE,
    body TEXT
);
COMMENT ON TABLE {name}_events IS 'llmrec event store, version {version}'
"""
_OLDEST_FIRST = "ORDER BY timestamp NULLS LAST, seq"
_LATEST_FIRST = "ORDER BY timestamp DESC NULLS FIRST, seq DESC"


class PostgresStore:
    """An event store in two tables of a database, ``<name>_events`` and ``<name>_items``.

    They are made in the schema that the connection comes to first, and several stores may share a database.
    What a method has stored is as durable as the database makes a commit.

    Parameters
    ----------
    url
        ``postgresql+psycopg://user:password@host/database``, with whatever parameters the driver knows.
    name
        Lower-case letters, digits and underscores, 41 at most.
    create
        Whether the tables are made where they are missing.

    Raises
    ------
    StoreError
        If the database cannot be reached, or holds no such store or one of another version.
    ImportError
        If the driver is not installed.
    """

    def __init__(self, url: str, name: str, *, create: bool = False) -> None:
        self._engine = make_engine(url)
        import psycopg
        import sqlalchemy

        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r} cannot be the name of an event store: use a-z, 0-9 and underscores")
        self.name = name
        self._pid, self._closed = os.getpid(), False
        self.shown = shown(self._engine)
        # Copying rows goes past SQLAlchemy.
        self._refuses = (
            sqlalchemy.exc.IntegrityError,
            sqlalchemy.exc.DataError,
            psycopg.IntegrityError,
            psycopg.DataError,
        )
        self._errors = (sqlalchemy.exc.SQLAlchemyError, psycopg.Error)
        try:
            self._prepare(create)
        except BaseException:
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
        rows = [row_of(event) for event in events]

        def write(connection: Connection) -> int:
            if len(rows) >= _MANY and not known:
                self._copy(connection, rows)
                return len(rows)
            added = connection.exec_driver_sql(
                f"INSERT INTO {self.name}_events ({_FIELDS}) VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT (user_id, event_id) WHERE event_id IS NOT NULL DO NOTHING",
                rows,
            ).rowcount
            if added < len(rows):
                for key, event in known.items():
                    stored = (
                        f"SELECT item_id, weight FROM {self.name}_events WHERE user_id = %s AND event_id = %s"
                    )
                    check_same(event, *connection.exec_driver_sql(stored, key).one())
            return added

        if not rows:
            return 0
        try:
            return self._transact(write)
        except (*self._refuses, UnicodeEncodeError) as error:
            raise refused(len(rows), getattr(error, "orig", None) or error) from error

    def fill(self, rows: Iterable[Row]) -> None:
        """Store the rows of another store, in the order given."""
        try:
            self._transact(lambda connection: self._copy(connection, rows))
        except self._refuses as error:
            raise StoreError(
                f"the database refuses an event: {getattr(error, 'orig', None) or error}"
            ) from error

    def _copy(self, connection: Connection, rows: Iterable[Row]) -> None:
        cursor: Any = connection.connection.cursor()
        with cursor, cursor.copy(f"COPY {self.name}_events ({_FIELDS}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    def history(self, user_id: str, limit: int | None = None) -> list[Event]:
        """Return the latest `limit` events of a user, oldest first: by (timestamp, order of arrival)."""
        query = f"SELECT {_FIELDS} FROM {self.name}_events WHERE user_id = %s {_LATEST_FIRST} LIMIT %s"
        try:
            rows = self._read(query, (user_id, limit))
        except (*self._refuses, UnicodeEncodeError):
            return []  # no such id can be stored
        return [Event(*row) for row in reversed(rows)]

    def users(self, prefix: str = "", limit: int = 10) -> list[str]:
        """Return up to `limit` user ids that begin with `prefix`, in the order of their code points.

        Reads all ids: for people who look somebody up, not for each request.
        """
        query = (
            f'SELECT DISTINCT user_id COLLATE "C" AS own FROM {self.name}_events '
            "WHERE starts_with(user_id, %s) ORDER BY own LIMIT %s"
        )
        try:
            rows = self._read(query, (prefix, limit))
        except (*self._refuses, UnicodeEncodeError):
            return []  # no such id can be stored
        return [user for (user,) in rows]

    def forget(self, *user_ids: str) -> int:
        """Delete all events of some users and rewrite the table without them; return how many there were.

        A deletion alone leaves the rows in the table's files until something overwrites them, and so does a
        plain VACUUM. This runs VACUUM FULL: the table and its indexes are written anew and the old files
        removed, which takes some seconds for a million events, during which others wait. What lies outside
        the table is the database's to erase: its write-ahead log until the segments are recycled, replicas
        until they have followed, backups and archived logs until they expire.

        Raises
        ------
        StoreError
            If others kept the table busy, or it belongs to another role: the events are deleted, but their
            bytes may still be in its files. Calling again finishes the work.
        """
        deletion = f"DELETE FROM {self.name}_events WHERE user_id = %s"
        # The database has no NUL in texts.
        stored = [user_id for user_id in user_ids if is_text(user_id) and "\0" not in user_id]
        if not stored:
            return 0
        count = self._transact(
            lambda c: sum(c.exec_driver_sql(deletion, (user_id,)).rowcount for user_id in stored)
        )
        self._rewrite(count)
        return count

    def _rewrite(self, count: int) -> None:
        left: list[str] = []
        with self._guarded(), self._engine.connect() as pooled:
            connection = pooled.execution_options(isolation_level="AUTOCOMMIT")
            driver: Any = connection.connection.driver_connection

            def hear(notice: Any) -> None:
                if notice.severity_nonlocalized == "WARNING":
                    left.append(notice.message_primary)

            driver.add_notice_handler(hear)
            connection.exec_driver_sql(f"SET lock_timeout = {int(1000 * BUSY_SECONDS)}")
            try:
                connection.exec_driver_sql(f"VACUUM (FULL) {self.name}_events")
            except self._errors as error:
                if state_of(error) != _LOCK_TIMEOUT:
                    raise
                left.append("others kept it busy")
            finally:
                driver.remove_notice_handler(hear)
                connection.exec_driver_sql("RESET lock_timeout")
        if left:
            raise StoreError(
                f"{count} events are deleted, but their bytes may still be in the files of table "
                f"{self.name}_events: {left[0]}; call forget again, as the owner of the table"
            )

    def events(self) -> list[Event]:
        """Return all events, oldest first: by (timestamp, order of arrival)."""
        return [
            Event(*row) for row in self._read(f"SELECT {_FIELDS} FROM {self.name}_events {_OLDEST_FIRST}")
        ]

    def columns(self) -> Columns:
        """Return all events as columns, oldest first: much faster than `events` for a large log."""
        columns = Columns([], [], [], [])
        query = f"SELECT user_id, item_id, timestamp, weight FROM {self.name}_events {_OLDEST_FIRST}"
        for user, item, timestamp, weight in self._stream(query):
            columns.users.append(user)
            columns.items.append(item)
            columns.timestamps.append(timestamp)
            columns.weights.append(weight)
        return columns

    def count(self) -> int:
        """Return the number of events."""
        return int(self._read(f"SELECT count(*) FROM {self.name}_events")[0][0])

    def rows(self) -> Iterator[Row]:
        """Return all events as they are stored, in the order of arrival."""
        return self._stream(f"SELECT {_FIELDS} FROM {self.name}_events ORDER BY seq")

    def item_changes(self, after: int = 0) -> tuple[int, list[ItemChange]]:
        """Return the changes of items after a number, the last one of each item, and the last number."""
        with self._guarded(), self._engine.connect() as connection:
            return self._item_changes(connection, after)

    def change_items(
        self, after: int, decide: Callable[[list[ItemChange]], Sequence[ItemChange]]
    ) -> tuple[int, list[ItemChange]]:
        """Store changes of items, see `EventStore`."""

        def write(connection: Connection) -> tuple[int, list[ItemChange]]:
            # Readers go on; another change waits here, so that numbers are given in the order of commits.
            connection.exec_driver_sql(f"LOCK TABLE {self.name}_items IN EXCLUSIVE MODE")
            for change in decide(self._item_changes(connection, after)[1]):
                connection.exec_driver_sql(
                    f"DELETE FROM {self.name}_items WHERE item_id = %s", (change.item_id,)
                )
                connection.exec_driver_sql(
                    f"INSERT INTO {self.name}_items (item_id, body) VALUES (%s, %s)",
                    (change.item_id, body_of(change)),
                )
            return self._item_changes(connection, after)

        return self._transact(write)

    def _item_changes(self, connection: Connection, after: int) -> tuple[int, list[ItemChange]]:
        found = connection.exec_driver_sql(
            f"SELECT item_id, body, seq FROM {self.name}_items WHERE seq > %s ORDER BY seq", (after,)
        ).all()
        last = found[-1][2] if found else after
        return last, list(changes_of((item_id, body) for item_id, body, _ in found))

    def drop(self) -> None:
        """Remove the tables with all that is in them."""
        self._transact(
            lambda c: c.exec_driver_sql(f"DROP TABLE IF EXISTS {self.name}_events, {self.name}_items")
        )

    def close(self) -> None:
        """Release the connections. Closing twice is allowed."""
        self._closed = True
        if os.getpid() == self._pid:
            self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, query: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        with self._guarded(), self._engine.connect() as connection:
            return list(connection.exec_driver_sql(query, parameters).all())

    def _stream(self, query: str) -> Iterator[Any]:
        """Yield rows as they come, without holding all of them."""
        with self._guarded(), self._engine.connect() as connection:
            chunked = connection.execution_options(stream_results=True, max_row_buffer=10_000)
            for row in chunked.exec_driver_sql(query):
                yield tuple(row)

    def _transact(self, work: Callable[[Connection], A]) -> A:
        """Run work in a transaction of its own, again where another transaction made it impossible."""
        for attempt in range(ATTEMPTS):
            try:
                with self._guarded(), self._engine.begin() as connection:
                    return work(connection)
            except _Again:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn what the driver says of connections and tables into an error of this library."""
        if os.getpid() != self._pid:
            # Two processes would talk over one connection.
            raise StoreError(
                f"{self.shown} was opened in another process: open a PostgresStore of its own in each"
            )
        if self._closed:
            raise StoreError(f"the event store {self.shown} is closed: open a new PostgresStore")
        try:
            yield
        except self._refuses:
            raise
        except self._errors as error:
            kind = _Again if state_of(error) == _DEADLOCK else StoreError
            raise kind(unusable(self._engine, error)) from error

    def _prepare(self, create: bool) -> None:
        """Check or make the tables."""

        def prepare(connection: Connection) -> str | None:
            if create:
                # Two processes may begin at once.
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext(%s))", (self.name,))
            version = connection.exec_driver_sql(
                "SELECT coalesce(obj_description(to_regclass(%s)), to_regclass(%s)::text)",
                (f"{self.name}_events",) * 2,
            ).scalar()
            if version is None and create:
                for statement in _TABLES.format(name=self.name, version=SCHEMA_VERSION).split(";"):
                    connection.exec_driver_sql(statement)
                version = _version(SCHEMA_VERSION)
            return version

        version = self._transact(prepare)
        if version is None:
            raise StoreError(f"{self.shown} holds no event store {self.name!r}; is it another database?")
        if version != _version(SCHEMA_VERSION):
            raise StoreError(
                f"table {self.name}_events of {self.shown} is {version!r}, this llmrec reads "
                f"{_version(SCHEMA_VERSION)!r}: use the llmrec that made it, or another name"
            )


class _Again(StoreError):
    """A transaction that may well succeed when it is tried again."""


def _version(number: int) -> str:
    return f"llmrec event store, version {number}"
