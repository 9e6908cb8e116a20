"""The seams of the pipeline: what a component is given and what it gives back.

Inside the pipeline items are *codes*: positions in the catalogue, int32. Components take arrays and
return new ones; nothing here knows how a component works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llmrec.types import Event, Item

Codes = NDArray[np.int32]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


def _no_codes() -> Codes:
    return np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Query:
    """A request in codes.

    Parameters
    ----------
    history
        Item codes, oldest first, shape (n,), n may be 0.
    text
        The typed wish, empty if there is none.
    mask
        Shape (items,), True where an item may be returned; None allows all.
    """

    history: Codes = field(default_factory=_no_codes)
    text: str = ""
    mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class Hits:
    """Items found by one component: codes and scores of the same length, best first, no duplicates.

    `least` is the score of what was not found, where scores have a zero: one that was found last is not as
    good as nothing. None where the last one marks it.
    """

    items: Codes
    scores: Floats
    least: float | None = None


class Encoder(Protocol):
    """Turns texts into unit vectors."""

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the vectors; vectors of different fingerprints do not mix."""
        ...

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return float32 vectors of length 1 (or 0 for a text without content), shape (len(texts), dim)."""
        ...


class VectorIndex(Protocol):
    """Nearest neighbours by inner product."""

    @property
    def name(self) -> str | None:
        """Name of the collection on a server; None for an index in memory."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the search is exact."""
        ...

    def __len__(self) -> int:
        """Return the number of vectors."""
        ...

    def grown(self, vectors: Floats, changed: Codes) -> VectorIndex:
        """Return an index over `vectors`, which this one has save those at `changed` and new rows.

        This one may be searched meanwhile, and has the rows that it had.
        """
        ...

    def search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        """Return up to k allowed items for each row of `vectors`."""
        ...


class Retriever(Protocol):
    """Proposes items. Empty hits for a query that it cannot use (no history, no text)."""

    @property
    def name(self) -> str:
        """Name in the provenance, weights and reports."""
        ...

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items for each query."""
        ...


class Scorer(Protocol):
    """Scores candidates against the history; higher is better, log-probabilities where it has them."""

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Return one finite score for each candidate of each query."""
        ...


@runtime_checkable
class ComparingScorer(Scorer, Protocol):
    """A scorer whose `score` says of two queries nothing that could be set against one another."""

    def compared(self, queries: Sequence[Query], items: Codes) -> list[Floats]:
        """Scores of the same items for several queries, comparable between them."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """Says how probable each item is to be the next."""

    def log_probs(self, histories: Sequence[Codes]) -> Floats:
        """Return log-probabilities over the catalogue, shape (len(histories), items); rows sum to 1."""
        ...


class Columns(NamedTuple):
    """All events as columns of the same length, oldest first; times in seconds, None where there is none."""

    users: list[str]
    items: list[str]
    timestamps: list[int | None]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class ItemChange:
    """An item that was put into the catalogue, or removed.

    Parameters
    ----------
    item
        As it is, or was when it was removed; None for removed ones in stores of old.
    code
        Its number in the catalogue, the same for all who serve it; None in stores of old.
    """

    item_id: str
    item: Item | None
    code: int | None = None
    removed: bool = False


@runtime_checkable
class EventStore(Protocol):
    """What changes while a recommender serves: events by user, and the items that were put or removed.

    Durable once a method has returned, and shared by all processes that open the same store. Thread-safe.
    """

    def append(self, events: Sequence[Event]) -> int:
        """Store events in the order given, all or none; return how many were new.

        An event whose `event_id` the user has already is not stored again.
        """
        ...

    def history(self, user_id: str, limit: int | None = None) -> list[Event]:
        """Return the latest `limit` events of a user, oldest first."""
        ...

    def users(self, prefix: str = "", limit: int = 10) -> list[str]:
        """Return up to `limit` ids of users that begin with `prefix`, in the order of their code points."""
        ...

    def forget(self, *user_ids: str) -> int:
        """Delete all events of some users; return how many."""
        ...

    def events(self) -> list[Event]:
        """Return all events, oldest first."""
        ...

    def columns(self) -> Columns:
        """Return all events as columns, oldest first."""
        ...

    def count(self) -> int:
        """Return the number of events."""
        ...

    def item_changes(self, after: int = 0) -> tuple[int, list[ItemChange]]:
        """Return the changes of items after a number, the last one of each item, and the last number."""
        ...

    def change_items(
        self, after: int, decide: Callable[[list[ItemChange]], Sequence[ItemChange]]
    ) -> tuple[int, list[ItemChange]]:
        """Store changes of items, and return what `item_changes` would.

        `decide` is given the changes after number `after` and returns those to add. Nobody else changes
        items meanwhile, in any process. What it raises is raised, and then nothing is stored.
        """
        ...

    def close(self) -> None:
        """Release the store."""
        ...
