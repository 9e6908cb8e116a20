"""Settings of a server: where it listens, who may ask, how much, and how requests are gathered."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmrec.errors import ConfigError

Role = Literal["read", "write"]
"""`read` may ask; `write` may also store events, change items and forget users."""


class ApiKey(BaseModel):
    """A key of which only the hash is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="for people; never compared")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the key, in hexadecimal")
    role: Role = "read"


class AdapterConfig(BaseModel):
    """A tuned language model beside the recommender's own, for requests that name it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path = Field(description="of a saved recommender with a language model, or of an adapter")
    weight: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="in the blend; the recipe's if not given"
    )


class ServeConfig(BaseModel):
    """Everything about serving that can be set, with defaults that work on one machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    keys: tuple[ApiKey, ...] = Field(
        (), description="without keys everyone on this machine may do everything"
    )

    adapters: dict[str, AdapterConfig] = Field(
        {}, description="language models that requests can name, all on the same base model"
    )

    max_k: int = Field(100, ge=1, description="most items in an answer")
    max_history: int = Field(1000, ge=1, description="most items of a history in a request")
    max_candidates: int = Field(1000, ge=1, description="most items or documents to order, texts to embed")
    max_events: int = Field(1000, ge=1, description="most events in a request")
    max_body: int = Field(1_000_000, ge=1000, description="largest request body in bytes")

    batch: int = Field(32, ge=1, description="most requests that the recommender answers as one batch")
    wait_ms: float = Field(3.0, ge=0, le=1000, description="how long the first request waits for others")
    queue: int = Field(256, ge=1, description="requests that may wait; more are refused with 503")
    follow_seconds: float = Field(
        1.0, gt=0, le=3600, description="how often items that other processes changed are taken over"
    )
    threads: int = Field(2, ge=1, description="of each process, for what is not batched")
    workers: int = Field(1, ge=1, le=1024, description="processes that answer on one socket")

    @model_validator(mode="after")
    def _guarded(self) -> ServeConfig:
        if not self.keys and not is_loopback(self.host):
            raise ValueError(
                f"{self.host!r} can be reached from other machines, and there are no keys: "
                "add a key (a [[keys]] table with name, sha256 and role), or listen on 127.0.0.1"
            )
        return self

    @classmethod
    def of(cls, source: str | Path | Mapping[str, Any] | None = None, **flags: Any) -> ServeConfig:
        """Make settings from a TOML file or a mapping; flags that are not None win.

        Raises
        ------
        ConfigError
            With every problem at once.
        """
        where = "the serving configuration" if source is None or isinstance(source, Mapping) else str(source)
        values = {} if source is None else source if isinstance(source, Mapping) else _read(Path(source))
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls.model_validate({**values, **given})
        except ValidationError as invalid:
            # The input is not repeated: it may hold a key.
            problems = [
                f"{'.'.join(map(str, e['loc'])) or 'host'}: {e['msg'].removeprefix('Value error, ')}"
                for e in invalid.errors()
            ]
            raise ConfigError(f"{len(problems)} problem(s) in {where}:\n  " + "\n  ".join(problems)) from None

    def role_of(self, key: str | None) -> Role | None:
        """Return what a key allows, None if nothing. Takes the same time for every key."""
        if not self.keys:
            return "write"
        digest = hashlib.sha256((key or "").encode("utf-8", "replace")).hexdigest()
        role: Role | None = None
        for known in self.keys:
            if hmac.compare_digest(digest, known.sha256):
                role = known.role
        return role if key else None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on that host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as opened:
            return tomllib.load(opened)
    except OSError as missing:
        raise ConfigError(f"cannot read the configuration {path}: {missing.strerror}") from missing
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"{path} is not valid TOML: {broken}") from broken
