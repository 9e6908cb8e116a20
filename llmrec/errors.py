"""Every error that llmrec raises on purpose.

A message says what happened, what was got, and what to do about it.
"""

from __future__ import annotations

import logging


class LLMRecError(Exception):
    """Base of all errors raised by llmrec."""


class DataError(LLMRecError):
    """The items or events break the data contract; the message gives counts and row numbers."""


class ConfigError(LLMRecError):
    """A configuration is invalid; the message lists every problem at once."""


class RequestError(LLMRecError):
    """A request cannot be answered as asked: unknown id, bad `where`, k below 1."""


class FetchError(LLMRecError):
    """A model or data set cannot be had: unknown name, no network, wrong checksum."""


class ModelError(LLMRecError):
    """A saved model or adapter does not fit: other version, other base weights, missing file."""


class EngineError(ModelError):
    """An inference server gave no scores: it is not there, too slow, or refuses."""


class StoreError(ModelError):
    """An event store cannot be reached, opened or used as it is."""


class ConflictError(ModelError):
    """Another process has saved something else into the same directory meanwhile."""


class LeakError(LLMRecError):
    """An evaluation would report on events that a fitted parameter has seen."""


class NotFoundError(RequestError):
    """An item that is to be shown or removed is not in the catalogue: what a server answers with 404."""


class OverloadError(LLMRecError):
    """A server has too much to do; `retry_after` is in whole seconds, at least 1."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


logger = logging.getLogger(__name__)


def told(error: LLMRecError) -> str:
    """What a language model or somebody outside is told of an error.

    What is wrong with a call is said in the library's words. Where stores and models are concerns nobody
    outside: that goes to the log.
    """
    if isinstance(error, RequestError | DataError | OverloadError):
        return str(error)
    logger.error("%s", error)
    return "this cannot be answered just now; the log says why"
