"""What the frameworks share: a request made of defaults and a call, items as documents, reordering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmrec.errors import RequestError
from llmrec.recommender import Recommender
from llmrec.serve.models import Document, plain
from llmrec.serve.relevance import by_relevance
from llmrec.text import query_text
from llmrec.types import Recommendation, Request, as_id

D = TypeVar("D")

RULES = ("caps", "diversity", "exclude", "explain", "pins", "seen")
"""Fields of `Request` besides `user`, `history`, `query`, `k` and `where`, which adapters name one by one."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Whom an adapter asks for: a user or a history, which a call may replace.

    Raises
    ------
    RequestError
        If both are given.
    """

    user: str | None = None
    history: Sequence[str] | None = None

    def __post_init__(self) -> None:
        Request(user=self.user, history=self.history)

    def or_else(self, user: str | None, history: Sequence[str] | None) -> Asker:
        """Return who asks in a call: whoever it names, in place of the user as well as of the history."""
        return self if user is None and history is None else Asker(user, history)


@dataclass(frozen=True, slots=True)
class Defaults:
    """A request without its words, from which each call departs.

    Parameters
    ----------
    rules
        Further fields of `Request`, see `RULES`.

    Raises
    ------
    RequestError
        If a field is unknown or invalid.
    """

    user: str | None = None
    history: Sequence[str] | None = None
    k: int = 10
    where: Mapping[str, Any] | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.request(None)

    def request(
        self,
        query: str | None,
        user: str | None = None,
        history: Sequence[str] | None = None,
        k: int | None = None,
        where: Mapping[str, Any] | None = None,
        **rules: Any,
    ) -> Request:
        """Make the request of a call; what it leaves out, or gives as None, is as in the defaults.

        Who searches by words wants to find: seen items may come back then, as they do from
        `Recommender.search`, unless the rules have ``seen``.
        """
        asker = Asker(self.user, self.history).or_else(user, history)
        query = query if query_text(query) else None
        rules = {**self.rules, **rules}
        unknown = sorted(set(rules) - set(RULES))
        if unknown:
            known = ", ".join(("user", "history", "k", "where", *RULES))
            raise RequestError(f"unknown fields of a request: {', '.join(unknown)}; known are {known}")
        rules.setdefault("seen", "include" if query else "auto")
        return Request(
            user=asker.user,
            history=asker.history,
            query=query,
            k=self.k if k is None else k,
            where=self.where if where is None else where,
            **rules,
        )


def described(found: Recommendation) -> dict[str, Any]:
    """An item as metadata of a document: plain values, which JSON can hold.

    Keys are item_id, title, rank, score, attributes, sources (each with name, rank and score), and reason, a
    sentence, where the request asked for one.
    """
    about: dict[str, Any] = {
        "item_id": found.item_id,
        "title": found.title,
        "rank": found.rank,
        "score": found.score,
        "attributes": plain(dict(found.item.attributes)),
        "sources": [{"name": s.name, "rank": s.rank, "score": s.score} for s in found.sources],
    }
    if found.reason is not None:
        about["reason"] = found.reason.sentence
    return about


def as_documents(
    recommender: Recommender, request: Request, make: Callable[[Recommendation, str, dict[str, Any]], D]
) -> list[D]:
    """Answer a request with documents of a framework, best first.

    Parameters
    ----------
    make
        Makes one of a recommendation, the item in words, and its metadata.
    """
    found = recommender.recommend(request)
    catalog = recommender.catalog
    return [make(one, catalog.line(catalog.code(one.item_id)), described(one)) for one in found]


def reordered(
    recommender: Recommender,
    documents: Sequence[tuple[object, str | None]],
    query: str,
    asker: Asker,
    limit: int | None = None,
) -> list[tuple[int, float]]:
    """Order documents by relevance, the most relevant first, see `by_relevance`.

    Parameters
    ----------
    documents
        For each the id that its metadata names, and its text. Those of the catalogue are known by id, all
        others are read.
    limit
        Return no more than so many.

    Returns
    -------
    list
        Position in `documents` and relevance in [0, 1].

    Raises
    ------
    RequestError
        If there is neither a query nor a user nor a history, or a document has neither text nor a known id.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"at least 1 document must remain, got {limit}")
    if not documents:
        return []
    given = []
    for row, (item_id, text) in enumerate(documents):
        known = as_id(item_id, "id") if _is_id(item_id) else None
        if known is not None and known in recommender.catalog:
            given.append(Document(id=known))
        elif text is not None and text.strip():
            given.append(Document(text=text))
        else:
            raise RequestError(
                f"document {row} has no text, and its id {item_id!r} is not in the catalogue; "
                "give a text, or the id of an item in the metadata"
            )
    return by_relevance(recommender, given, query, asker.user, asker.history)[:limit]


def _is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)
