"""An inference server that runs the language model, and how it is asked."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from llmrec.database import UrlConfig
from llmrec.errors import ConfigError, EngineError, ModelError

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which it is worth asking again."""

PAUSE_SECONDS = 0.1
"""Mean pause before the second attempt; it doubles with each."""


class EngineConfig(UrlConfig):
    """The language model runs in this process, or on a server by URL: vLLM with the adapter on its base."""

    section: ClassVar[str] = "engine"
    variable: ClassVar[str] = "LLMREC_ENGINE_URL"

    model: str = Field("rec", min_length=1, description="name that the server gives to the adapter")
    key_env: str | None = Field(None, min_length=1, description="environment variable that holds a key")
    timeout_seconds: float = Field(10.0, gt=0, description="longest wait for the scores of a batch")
    retries: int = Field(3, ge=0, description="further attempts where the server is busy or not there")
    connections: int = Field(16, ge=1, description="requests to the server at once")

    @field_validator("url")
    @classmethod
    def _web(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            check_web(url.get_secret_value())
        return url


def check_web(url: str) -> None:
    """Make sure that a URL is of a web server.

    Raises
    ------
    ValueError
        If it is not. The message does not repeat it: it may hold a password.
    """
    try:
        parts = urlsplit(url)
        known = (
            parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        known = False
    if not known or parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "an inference server is named by http://host:port or https://host, without user or query; a key "
            "is named by engine.key_env"
        )


GRACE_SECONDS = 0.2
"""For a request to say itself what kept it, when its time is over."""


class Engine:
    """Asks the server, several requests at once over kept connections. Thread-safe.

    What fails for the moment is asked again after a drawn pause, as long as there is time: `timeout_seconds`
    are for all requests of a call and all their attempts.

    Parameters
    ----------
    transport
        Of httpx2, for tests and proxies.

    Raises
    ------
    ConfigError
        If the URL is of no web server, or the variable of the key is not set.
    ImportError
        If httpx2 is not there.
    """

    def __init__(self, url: str, config: EngineConfig, transport: Any = None) -> None:
        try:
            import httpx2
        except ImportError as missing:
            raise ImportError('an inference server needs: pip install "llmrec[serve]"') from missing
        try:
            check_web(url)
        except ValueError as wrong:
            raise ConfigError(str(wrong)) from None
        headers = {}
        if config.key_env is not None:
            key = os.environ.get(config.key_env)
            if not key:
                raise ConfigError(f"engine.key_env names the variable {config.key_env}, which is not set")
            if not key.isascii():
                raise ConfigError(f"the key in {config.key_env} has letters that no header can carry")
            headers = {"Authorization": f"Bearer {key}"}
        limits = httpx2.Limits(max_connections=config.connections)
        self._failures: Any = httpx2.HTTPError
        self._http = httpx2.Client(base_url=url, headers=headers, limits=limits, transport=transport)
        self._pool = ThreadPoolExecutor(config.connections, thread_name_prefix="llmrec-engine")
        self.config, self.where = config, urlsplit(url).hostname

    def ask(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Post each body and return the answers in their order.

        Raises
        ------
        EngineError
            If one is not answered in time.
        ModelError
            If one is refused: the adapter is not there, or the key is wrong.
        """
        end = time.monotonic() + self.config.timeout_seconds
        waiting = [self._pool.submit(self._one, path, body, end) for body in bodies]
        try:
            # A timeout of httpx is for each read, of which an answer may have many.
            return [one.result(max(0.0, end + GRACE_SECONDS - time.monotonic())) for one in waiting]
        except TimeoutError:
            raise EngineError(
                f"the inference server on {self.where} gave no scores for {path} within "
                f"{self.config.timeout_seconds:g} seconds"
            ) from None
        finally:
            for one in waiting:
                one.cancel()

    def _one(self, path: str, body: Mapping[str, Any], end: float) -> dict[str, Any]:
        said = "no time was left"
        for attempt in range(self.config.retries + 1):
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                answer = self._http.post(path, json=body, timeout=left)
            except self._failures as failed:
                said = type(failed).__name__
            else:
                if answer.is_success:
                    return self._content(answer.content, path)
                said = f"status {answer.status_code}: {answer.text[:200]}"
                if answer.status_code not in BUSY:
                    raise ModelError(f"the inference server on {self.where} refuses {path}: {said}")
            if attempt < self.config.retries:
                pause = PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5)
                time.sleep(max(0.0, min(pause, end - time.monotonic())))
        raise EngineError(f"the inference server on {self.where} gave no scores for {path}: {said}")

    def _content(self, content: bytes, path: str) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EngineError(f"what {self.where} answers to {path} is not vLLM's: {content[:100]!r}")
        return found

    def close(self) -> None:
        """Let go of the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()


def engine_of(config: EngineConfig) -> Engine | None:
    """The server that a configuration or LLMREC_ENGINE_URL names; None where the model runs here."""
    url = config.known()
    return None if url is None else Engine(url, config)
