"""What goes in and what comes out. Standard library only, all values frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmrec.errors import RequestError

AttributeValue = str | int | float | bool | tuple[str, ...]
"""What an item attribute may hold; several strings (genres, categories) are a tuple."""

Seen = Literal["auto", "exclude", "include"]
"""Whether items of the history may be recommended; `auto` follows the share of repeats in the log."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of the catalogue."""

    item_id: str
    title: str
    text: str = ""
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """One purchase, click or watch. `timestamp` is in seconds since 1970, None where the log has no clock."""

    user_id: str
    item_id: str
    timestamp: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """What to recommend, to whom, under which rules.

    Parameters
    ----------
    user
        Id whose stored history is used. An unknown user has an empty history.
    history
        Item ids or events, oldest first; used instead of the stored history.
    query
        A wish typed in words.
    k
        How many recommendations at most, at least 1.
    where
        Conditions on item attributes, e.g. ``{"genres": "Comedy", "year": {"gte": 1990}}``.
    exclude
        Item ids never to return.
    seen
        Whether items of the history may come back.

    Raises
    ------
    RequestError
        If `k` is below 1, `seen` is unknown, or both `user` and `history` are given.
    """

    user: str | None = None
    history: Sequence[str | Event] | None = None
    query: str | None = None
    k: int = 10
    where: Mapping[str, Any] | None = None
    exclude: Sequence[str] = ()
    seen: Seen = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise RequestError(f"k must be a whole number of at least 1, got {self.k!r}")
        if self.seen not in ("auto", "exclude", "include"):
            raise RequestError(f"seen must be 'auto', 'exclude' or 'include', got {self.seen!r}")
        if self.user is not None and self.history is not None:
            raise RequestError("give either user (its stored history is used) or history, not both")
        if isinstance(self.history, str) or isinstance(self.exclude, str):
            raise RequestError("history and exclude are lists of item ids, got one string")
        if self.query is not None and not isinstance(self.query, str):
            raise RequestError(f"query must be text, got {type(self.query).__name__}")


@dataclass(frozen=True, slots=True)
class Source:
    """Which component proposed a candidate, at which rank (from 1), and what it added to the score."""

    name: str
    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item. Rank starts at 1; a higher score is better, comparable within one answer only."""

    item: Item
    rank: int
    score: float
    sources: tuple[Source, ...] = ()

    @property
    def item_id(self) -> str:
        """Id of the recommended item."""
        return self.item.item_id

    @property
    def title(self) -> str:
        """Title of the recommended item."""
        return self.item.title
