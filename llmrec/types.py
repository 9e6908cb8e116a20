"""What goes in and what comes out. Standard library only, all values frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral, Real
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
    """One purchase, click or watch.

    Parameters
    ----------
    timestamp
        In seconds since 1970, None where the log has no clock. What is observed may have a datetime.
    event_id
        An id that the caller chose, unique among the events of the user: an event store keeps one event of
        each id, so that sending it again after a lost answer does not count twice. `fit` does not read it:
        what was in the log counts again if it is sent again.
    event
        Its type, as "view" or "buy": `weight` is multiplied by what `data.event_weights`, if set, has for it.
    """

    user_id: str
    item_id: str
    timestamp: int | None = None
    weight: float = 1.0
    event_id: str | None = None
    event: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What to recommend, to whom, under which rules.

    Parameters
    ----------
    user
        Id whose stored history is used. An unknown user has an empty history.
    history
        Item ids or events, oldest first; used instead of the stored history. Those that are not in the
        catalogue do not count; it is an error if none is.
    query
        A wish typed in words.
    k
        How many recommendations at most, at least 1.
    where
        Conditions on item attributes, e.g. ``{"genres": "Comedy", "year": {"gte": 1990}}``.
    exclude
        Item ids never to return; a set will do, and ids that are not in the catalogue.
    seen
        Whether items of the history may come back.
    caps
        At most so many items of a value, by attribute: ``{"brand": 2}``. Each value of a list counts; an
        item without the attribute is not capped.
    pins
        Item ids that come first, in this order, at most `k`. They may be seen items, and they count
        towards `caps`; one that is removed, excluded, not allowed by `where` or over a cap is an error.
    diversity
        From 0, by score alone, to 1, as unlike each other as can be: maximal marginal relevance over the
        text vectors (Carbonell and Goldstein 1998).
    explain
        Whether each recommendation gets a `Reason`. Costs one more batch of up to 21 queries a request.
    now
        The moment that is asked about, in seconds since 1970: stored events, and events in `history`, count
        up to it. None counts all.
    adapter
        Name of a language model that was put beside the recommender's own by `Recommender.add_adapter`.
    budget_ms
        Time in milliseconds. Where the language model would take longer, going by what it took of late, or
        has not been measured (see `Recommender.warm_up`), the answer is in retrieval order and marked
        `degraded`. Nothing is broken off: retrieval itself takes as long as it takes.

    Raises
    ------
    RequestError
        If a field is of the wrong type or out of its range, or both `user` and `history` are given.
    """

    user: str | None = None
    history: Sequence[str | Event] | None = None
    query: str | None = None
    k: int = 10
    where: Mapping[str, Any] | None = None
    exclude: Sequence[str] = ()
    seen: Seen = "auto"
    caps: Mapping[str, int] | None = None
    pins: Sequence[str] = ()
    diversity: float = 0.0
    explain: bool = False
    budget_ms: float | None = None
    now: int | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.k):
            raise RequestError(f"k must be a whole number of at least 1, got {self.k!r}")
        if self.seen not in ("auto", "exclude", "include"):
            raise RequestError(f"seen must be 'auto', 'exclude' or 'include', got {self.seen!r}")
        self._check_ids()
        if self.query is not None and not isinstance(self.query, str):
            raise RequestError(f"query must be text, got {type(self.query).__name__}")
        if not isinstance(self.explain, bool):
            raise RequestError(f"explain must be True or False, got {self.explain!r:.100}")
        if self.budget_ms is not None and not (_is_number(self.budget_ms) and self.budget_ms > 0):
            raise RequestError(f"budget_ms must be a number above 0, got {self.budget_ms!r:.100}")
        if self.now is not None and not _is_whole(self.now):
            raise RequestError(f"now must be whole seconds since 1970, got {self.now!r:.100}")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise RequestError(f"adapter must be a name, got {type(self.adapter).__name__}")
        self._check_arrangement()

    def _check_ids(self) -> None:
        if self.user is not None and self.history is not None:
            raise RequestError("give either user (its stored history is used) or history, not both")
        if self.user is not None:
            object.__setattr__(self, "user", as_id(self.user, "user"))
        for name in ("history", "exclude", "pins"):
            given = getattr(self, name)
            if given is None and name == "history":
                continue
            ids = as_ids(given, name, events=name == "history", ordered=name != "exclude")
            object.__setattr__(self, name, ids)

    def _check_arrangement(self) -> None:
        if self.caps is not None and not isinstance(self.caps, Mapping):
            raise RequestError(f'caps must be a mapping such as {{"brand": 2}}, got {self.caps!r:.100}')
        wrong = [
            f"{name!r}: {limit!r:.100}" for name, limit in (self.caps or {}).items() if not _is_count(limit)
        ]
        if wrong:
            raise RequestError(f"a cap is a whole number of at least 1, got {', '.join(wrong)}")
        if len(self.pins) > self.k:
            raise RequestError(f"{len(self.pins)} pins do not fit into k = {self.k}; pin fewer, or raise k")
        if not (_is_number(self.diversity) and 0 <= self.diversity <= 1):
            raise RequestError(f"diversity must be a number from 0 to 1, got {self.diversity!r:.100}")


def as_id(value: object, what: str) -> str:
    """An id as text: text as it is, whole numbers as in tables, so that 42 and 42.0 are ``"42"``.

    Raises
    ------
    RequestError
        For anything else, of which no events could be stored.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, bool):
        if isinstance(value, Integral):
            if abs(int(value)) >= 10**100:
                raise RequestError(f"{what} must be text or a whole number, got one of more than 100 digits")
            return str(int(value))
        if isinstance(value, Real) and float(value).is_integer():
            return str(int(float(value)))
    raise RequestError(f"{what} must be text or a whole number, got {value!r:.100}")


def as_ids(given: Any, what: str, *, events: bool = False, ordered: bool = True) -> tuple[Any, ...]:
    """Ids as texts, see `as_id`; with `events`, an `Event` may stand for its item.

    Raises
    ------
    RequestError
        If it is no list, tuple, array or column of ids: one string, what is read once and gone, or, where
        they are `ordered`, a set.
    """
    unfit = (str, bytes, Mapping, Set) if ordered else (str, bytes, Mapping)
    if not isinstance(given, unfit) and hasattr(given, "__len__"):
        try:
            return tuple(one if events and isinstance(one, Event) else as_id(one, what) for one in given)
        except TypeError:
            pass
    got = "one string" if isinstance(given, str) else f"{given!r:.100}"
    raise RequestError(f"{what} must be a list of item ids, got {got}")


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def at_most(limit: int | None) -> int | None:
    """A limit as stores take it: None for none, a whole number of at least 1 else.

    Raises
    ------
    RequestError
        If it is another.
    """
    if limit is not None and not _is_count(limit):
        raise RequestError(f"limit must be a whole number of at least 1, or None, got {limit!r:.100}")
    return None if limit is None or limit >= 2**31 else int(limit)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 1


@dataclass(frozen=True, slots=True)
class Source:
    """Which component proposed a candidate, at which rank (0: it only scored it), and what it added."""

    name: str
    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Influence:
    """A history item that raised the score of a recommended item.

    `amount` is the item's score less what it would be without this history item: among the same candidates
    and on the scale of the answer's scores.
    """

    item_id: str
    title: str
    amount: float


@dataclass(frozen=True, slots=True)
class Shared:
    """An attribute value of a recommended item, and the history items in evidence that have it too."""

    name: str
    value: AttributeValue
    item_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an item is recommended: a sentence, and all the evidence that it rests on.

    Parameters
    ----------
    sentence
        Plain English; names nothing that is not in the evidence.
    history
        History items that raised the score, most first, at most 5 of the latest 20.
    shared
        Attribute values that the item shares with those, rarer ones first, at most 5.
    words
        Words of the typed query that the item's text has.
    sources
        Components that proposed the item or moved its score, as in `Recommendation`.
    worded
        Whether a language model wrote the sentence; else it is made by a template.
    """

    sentence: str
    history: tuple[Influence, ...] = ()
    shared: tuple[Shared, ...] = ()
    words: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    worded: bool = False


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item. Rank starts at 1; a higher score is better, comparable within one answer only.

    Scores fall with the rank, save where pins, caps or diversity placed an item otherwise. `degraded`: the
    language model was left out, to keep the request's budget or since its inference server gave no scores.
    """

    item: Item
    rank: int
    score: float
    sources: tuple[Source, ...] = ()
    reason: Reason | None = None
    degraded: bool = False

    @property
    def item_id(self) -> str:
        """Id of the recommended item."""
        return self.item.item_id

    @property
    def title(self) -> str:
        """Title of the recommended item."""
        return self.item.title
