"""Connections to PostgreSQL, and what goes wrong with them in words that hold no password."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from llmrec.errors import StoreError

if TYPE_CHECKING:
    from sqlalchemy import Engine

CONNECT_SECONDS = 10
POOL_SECONDS = 30
"""How long to wait for a connection that others use."""

EVENTS = "event store"
_SCHEMES = ("postgresql+psycopg://", "postgresql://", "postgres://")


class UrlConfig(BaseModel):
    """Where a server is. A URL may hold a password, so it is never saved; the name of a variable is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    section: ClassVar[str]
    """Of the configuration."""
    variable: ClassVar[str]
    """Environment variable in which the URL is looked for when no other place names it."""

    url: SecretStr | None = Field(None, exclude=True, description="never saved, since it may hold a password")
    url_env: str | None = Field(
        None, min_length=1, description="environment variable that holds the URL; its name is saved"
    )

    def wanted(self) -> str | None:
        """Return the URL that this names, None for what is beside the model.

        Raises
        ------
        StoreError
            If the variable that should hold it is not set.
        """
        if self.url is not None:
            return self.url.get_secret_value()
        if self.url_env is None:
            return None
        if not os.environ.get(self.url_env):
            raise StoreError(f"{self.section}.url_env names the variable {self.url_env}, which is not set")
        return os.environ[self.url_env]

    def known(self) -> str | None:
        """Return the URL for what is on a server already, None if nothing says it."""
        if self.url is not None:
            return self.url.get_secret_value()
        return os.environ.get(self.url_env or self.variable) or None


def with_driver(url: str, what: str = EVENTS) -> str:
    """Return a URL with the driver in it; `what` names in errors what is kept in the database.

    Raises
    ------
    StoreError
        If it is none of PostgreSQL. The message does not repeat it: it may hold a password.
    """
    for scheme in _SCHEMES:
        if url.startswith(scheme):
            who = re.split("[/?#]", url.removeprefix(scheme))[0].rpartition("@")[0]
            if "@" in who.partition(":")[2]:
                # What stands behind it would be taken for the host, and shown.
                raise StoreError(f"the URL of the {what} has an '@' in its password: write it as %40")
            return _SCHEMES[0] + url.removeprefix(scheme)
    raise StoreError(f"the URL of the {what} must begin with {_SCHEMES[0]}, and this one does not")


def make_engine(url: str, what: str = EVENTS) -> Engine:
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
        raise ImportError(f'the {what} in PostgreSQL needs: pip install "llmrec[postgres]"') from missing
    try:
        return sqlalchemy.create_engine(
            with_driver(url, what),
            # A connection that the server dropped meanwhile is replaced before it is used.
            pool_pre_ping=True,
            pool_timeout=POOL_SECONDS,
            connect_args={"connect_timeout": CONNECT_SECONDS},
            # A message that a log may keep must not hold the events that were sent.
            hide_parameters=True,
        )
    except (sqlalchemy.exc.ArgumentError, ValueError):
        # Its words repeat the URL.
        raise StoreError(
            f"the URL of the {what} cannot be read; write it as "
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


def unusable(engine: Engine, error: Any, what: str = EVENTS) -> str:
    """Return what an error of the driver says, in one line."""
    cause = getattr(error, "orig", None) or error
    words = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return f"the {what} {shown(engine)} cannot be used: {words}"
