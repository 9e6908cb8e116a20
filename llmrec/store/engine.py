"""Connections to PostgreSQL, and what goes wrong with them in words that hold no password."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrec.errors import StoreError
from llmrec.store.common import BUSY_SECONDS

if TYPE_CHECKING:
    from sqlalchemy import Engine

CONNECT_SECONDS = 10
_SCHEMES = ("postgresql+psycopg://", "postgresql://", "postgres://")


def with_driver(url: str) -> str:
    """Return a URL with the driver in it.

    Raises
    ------
    StoreError
        If it is none of PostgreSQL. The message does not repeat it: it may hold a password.
    """
    for scheme in _SCHEMES:
        if url.startswith(scheme):
            return _SCHEMES[0] + url.removeprefix(scheme)
    raise StoreError(f"the URL of an event store must begin with {_SCHEMES[0]}, and this one does not")


def make_engine(url: str) -> Engine:
    """Make the engine of a URL; nothing is connected yet.

    Raises
    ------
    StoreError
        If the URL cannot be read.
    ImportError
        If the driver is not installed.
    """
    try:
        import psycopg  # noqa: F401 - SQLAlchemy looks for it when it makes the engine
        import sqlalchemy
    except ImportError as missing:
        raise ImportError('an event store in PostgreSQL needs: pip install "llmrec[postgres]"') from missing
    try:
        return sqlalchemy.create_engine(
            with_driver(url),
            # A connection that the server dropped meanwhile is replaced before it is used.
            pool_pre_ping=True,
            pool_timeout=BUSY_SECONDS,
            connect_args={"connect_timeout": CONNECT_SECONDS},
            # A message that a log may keep must not hold the events that were sent.
            hide_parameters=True,
        )
    except (sqlalchemy.exc.ArgumentError, ValueError):
        # Its words repeat the URL.
        raise StoreError(
            "the URL of the event store cannot be read; write it as "
            "postgresql+psycopg://user:password@host/database, signs in the password as %XX"
        ) from None


def reach(url: str) -> None:
    """Connect to the database of a URL and do nothing.

    Raises
    ------
    StoreError
        If that cannot be done.
    """
    engine = make_engine(url)
    import sqlalchemy

    try:
        engine.connect().close()
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise StoreError(unusable(engine, error)) from error
    finally:
        engine.dispose()


def shown(engine: Engine) -> str:
    """Return where an engine connects to, without a password."""
    return engine.url.set(query={}).render_as_string(hide_password=True)


def state_of(error: Any) -> str | None:
    """Return the five characters by which PostgreSQL says what is wrong, None where it did not."""
    state: str | None = getattr(getattr(error, "orig", None) or error, "sqlstate", None)
    return state


def unusable(engine: Engine, error: Any) -> str:
    """Return what an error of the driver says, in one line."""
    cause = getattr(error, "orig", None) or error
    words = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return f"the event store {shown(engine)} cannot be used: {words}"
