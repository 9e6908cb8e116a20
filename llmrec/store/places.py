"""Where stores are, by the name that a manifest holds; and exchanging one while others use it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmrec.database import reach
from llmrec.errors import StoreError
from llmrec.store.config import URL_VARIABLE
from llmrec.store.postgres import PostgresStore
from llmrec.store.sqlite import SQLiteStore

Store = SQLiteStore | PostgresStore

_DATABASE = "postgresql:"


def new_name(url: str | None) -> str:
    """Return a name that no store has yet: of a file, or of tables in the database of `url`."""
    made = uuid.uuid4().hex[:12]
    return f"events-{made}.sqlite" if url is None else f"{_DATABASE}llmrec_{made}"


def check(url: str | None) -> None:
    """Connect to a database, so that a wrong URL is found before anything is computed; None is fine.

    Raises
    ------
    StoreError
        If it cannot be reached.
    """
    if url is not None:
        reach(url)


def in_database(name: str) -> bool:
    """Whether the store of that name is in a database."""
    return name.startswith(_DATABASE)


def open_store(name: str, folder: Path, url: str | None, *, create: bool = False) -> Store:
    """Open a store by its name.

    Parameters
    ----------
    folder
        Where files are.
    url
        Of the database.
    create
        Whether one that is not there is made.

    Raises
    ------
    StoreError
        If it is not there, cannot be opened, or is in a database and there is no URL.
    """
    if not in_database(name):
        if not create and not (folder / name).is_file():
            raise StoreError(
                f"{folder / name} is missing: the events of this recommender were kept there; put the file "
                f"back, or save the recommender again from where it was fitted"
            )
        if not create and not (folder / name).stat().st_size:
            raise StoreError(f"{folder / name} is empty: the events of this recommender were kept there")
        return SQLiteStore(folder / name)
    if url is None:
        raise StoreError(
            f"the events of {folder} are in a PostgreSQL database, and nothing says which: give its URL, or "
            f"set {URL_VARIABLE} (or the variable that store.url_env names)"
        )
    return PostgresStore(url, name.removeprefix(_DATABASE), create=create)


def copied(store: Store, name: str, folder: Path, url: str | None, *, after: int | None = None) -> Store:
    """Copy a store to a new place, and return it opened there.

    Parameters
    ----------
    after
        Changes of items after this number go along, numbered anew; None leaves all behind.
    """
    there: Store
    if isinstance(store, SQLiteStore) and not in_database(name):
        store.copy_to(folder / name)
        there = SQLiteStore(folder / name)
        there.clear_items()
    else:
        there = open_store(name, folder, url, create=True)
        try:
            there.fill(store.rows())
        except BaseException:
            there.close()
            remove(name, folder, url)
            raise
    if after is not None:
        changes = store.item_changes(after)[1]
        there.change_items(0, lambda known: changes)
    return there


def remove(name: str, folder: Path, url: str | None) -> None:
    """Remove a store with all that is in it; one that is gone already is no error."""
    if in_database(name):
        # One that is gone is made and dropped again.
        with open_store(name, folder, url, create=True) as store:
            assert isinstance(store, PostgresStore)
            store.drop()
        return
    for path in (folder / name, folder / f"{name}-wal", folder / f"{name}-shm"):
        path.unlink(missing_ok=True)


class Slot:
    """Holds a store that many threads use, until it is exchanged while none does."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._users = 0
        self._exchanging = False
        self._changed = threading.Condition()

    @contextmanager
    def use(self) -> Iterator[Store]:
        """Lend the store; waits while it is being exchanged. Not to be nested."""
        with self._changed:
            self._changed.wait_for(lambda: not self._exchanging)
            self._users += 1
        try:
            yield self._store
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[Store]:
        """Lend the store once nobody uses it, and let nobody use it meanwhile; `put` exchanges it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._exchanging)
            self._exchanging = True
            self._changed.wait_for(lambda: self._users == 0)
        try:
            yield self._store
        finally:
            with self._changed:
                self._exchanging = False
                self._changed.notify_all()

    def put(self, store: Store) -> None:
        """Exchange the store inside `alone`; the old one is closed."""
        old, self._store = self._store, store
        old.close()

    def close(self) -> None:
        """Close the store once nobody uses it."""
        with self.alone() as store:
            store.close()
