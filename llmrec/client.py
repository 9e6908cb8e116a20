"""A client of `llmrec serve`, blocking and asynchronous: the verbs of `Recommender` over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from llmrec.errors import LLMRecError, NotFoundError, OverloadError, RequestError
from llmrec.events import in_seconds
from llmrec.serve import browse as b
from llmrec.serve import models as m
from llmrec.types import Event, Item, as_id, as_ids

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    """A call as it is sent, and what its answer is read as (the type of T)."""

    answer: type[T]
    path: str
    body: BaseModel | None = None
    method: str = "POST"

    def sent(self) -> dict[str, Any]:
        """Arguments of httpx2's `request`."""
        sent: dict[str, Any] = {"method": self.method, "url": self.path}
        if self.body is None:
            return sent
        body = json.dumps(self.body.model_dump(exclude_unset=True), ensure_ascii=False, allow_nan=False)
        try:
            return sent | {"content": body.encode(), "headers": {"Content-Type": "application/json"}}
        except UnicodeEncodeError:
            raise RequestError("a text holds half of a surrogate pair, which cannot be sent") from None

    def read(self, answer: httpx2.Response) -> T:
        """Return what a good answer holds; raise what a bad one says."""
        if answer.is_success:
            try:
                # A newer server may say more than this client knows.
                return TypeAdapter(self.answer).validate_json(answer.content or b"null", extra="ignore")
            except ValidationError as other:
                shown = answer.text[:200]
                raise LLMRecError(f"{answer.url} gave no answer of a recommender: {shown}") from other
        try:
            problem = m.Problem.model_validate_json(answer.content)
        except ValidationError:
            raise LLMRecError(f"{answer.url} answered {answer.status_code}: {answer.text[:200]}") from None
        match answer.status_code:
            case 503:
                retry_after = answer.headers.get("retry-after", "")
                raise OverloadError(problem.detail, int(retry_after) if retry_after.isdigit() else 1)
            case 404:
                raise NotFoundError(problem.detail)
            case status if status < 500:
                raise RequestError(problem.detail)
        raise LLMRecError(f"{problem.detail} (status {problem.status})")


# ---- the verbs as calls: what both clients share --------------------------------------------------------


def _items(path: str, model: type[BaseModel], fields: Mapping[str, Any]) -> _Call[m.ItemsResponse]:
    return _Call(m.ItemsResponse, path, m.read(model, _lists(fields)))


_IDS = ("history", "exclude", "pins", "items", "chosen", "passed")


def _lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same in JSON's terms, ids as texts: sets and numbers are taken here as by the library."""
    return {name: value if value is None else _sent(name, value) for name, value in fields.items()}


def _sent(name: str, value: Any) -> Any:
    if name in ("user", "item_id"):
        return as_id(value, name)
    if name in _IDS:
        given = as_ids(value, name, events=name == "history", ordered=name != "exclude")
        return [one.item_id if isinstance(one, Event) else one for one in given]
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list | set | frozenset) else value


def _rank(items: Sequence[str | Item], fields: Mapping[str, Any]) -> _Call[m.ItemsResponse]:
    if isinstance(items, str | Item):
        raise RequestError(f"rank takes a list of ids and items, got {items!r:.100}")
    sent = [
        {"item_id": as_id(one.item_id, "item_id"), **_values(one)}
        if isinstance(one, Item)
        else as_id(one, "items")
        for one in items
    ]
    return _Call(m.ItemsResponse, "/v1/rank", m.read(m.RankRequest, {"items": sent, **_lists(fields)}))


def _stages(fields: Mapping[str, Any]) -> _Call[b.StagesResponse]:
    return _Call(b.StagesResponse, "/v1/stages", m.read(m.RecommendRequest, _lists(fields)))


def _complete(text: str, k: int) -> _Call[b.FoundItems]:
    return _Call(b.FoundItems, f"/v1/items?prefix={_quoted(text)}&k={k}", method="GET")


def _attributes() -> _Call[b.AttributesResponse]:
    return _Call(b.AttributesResponse, "/v1/attributes", method="GET")


def _predict(items: Sequence[str], fields: Mapping[str, Any]) -> _Call[m.PredictResponse]:
    asked = _lists({"items": items, **fields})
    return _Call(m.PredictResponse, "/v1/predict", m.read(m.PredictRequest, asked))


def _rerank(query: str, documents: Sequence[Any], fields: Mapping[str, Any]) -> _Call[m.RerankResponse]:
    asked = {"query": query, "documents": list(documents), **_lists(fields)}
    return _Call(m.RerankResponse, "/v2/rerank", m.read(m.RerankRequest, asked))


def _embed(texts: Sequence[str]) -> _Call[m.EmbeddingsResponse]:
    if isinstance(texts, str):
        raise RequestError(f"embed takes a list of texts, got one: {texts!r:.100}")
    asked = m.read(m.EmbeddingsRequest, {"input": list(texts)})
    return _Call(m.EmbeddingsResponse, "/v1/embeddings", asked)


def _observe(events: Iterable[Event]) -> _Call[m.EventsResponse]:
    if isinstance(events, Event):
        raise RequestError("expected a list of events, got a single one")
    given = list(events)
    wrong = next((one for one in given if not isinstance(one, Event)), None)
    if wrong is not None:
        raise RequestError(f"expected events, got {wrong!r:.100}; make them with llmrec.Event")
    return _Call(m.EventsResponse, "/v1/events", m.read(m.EventsIn, [_event(one) for one in given]))


def _event(event: Event) -> dict[str, Any]:
    values = {
        **asdict(event),
        "user_id": as_id(event.user_id, "user"),
        "item_id": as_id(event.item_id, "item"),
        "timestamp": in_seconds(event.timestamp),
    }
    return {name: value for name, value in values.items() if value is not None}


def _new(answer: m.EventsResponse) -> int:
    return answer.events - (answer.repeated or 0)


def _history(user: str, limit: int) -> _Call[b.HistoryResponse]:
    return _Call(b.HistoryResponse, f"/v1/users/{_segment(user)}/history?k={limit}", method="GET")


def _put_item(item: Item) -> _Call[m.ItemOut]:
    path = f"/v1/items/{_segment(item.item_id)}"
    return _Call(m.ItemOut, path, m.read(m.ItemIn, _values(item)), "PUT")


def _remove_item(item_id: str) -> _Call[None]:
    return _Call(type(None), f"/v1/items/{_segment(item_id)}", method="DELETE")


def _forget(user: str) -> _Call[m.EventsResponse]:
    return _Call(m.EventsResponse, f"/v1/users/{_segment(user)}", method="DELETE")


def _segment(given: object) -> str:
    """Return an id as one part of a path. Dots alone would be read as this folder and the one above."""
    text = as_id(given, "id")
    return _quoted(text) if text.strip(".") else text.replace(".", "%2E")


def _quoted(text: str) -> str:
    try:
        return quote(text, safe="")
    except UnicodeEncodeError:
        raise RequestError(f"{text!r:.100} holds half of a surrogate pair, which cannot be sent") from None


def _values(item: Item) -> dict[str, Any]:
    return {"title": item.title, "text": item.text, "attributes": m.plain(dict(item.attributes))}


def _vectors(answer: m.EmbeddingsResponse) -> list[list[float]]:
    return [one.embedding for one in answer.data if isinstance(one.embedding, list)]


def _http() -> Any:
    try:
        import httpx2
    except ImportError as missing:
        raise ImportError('the client needs: pip install "llmrec[serve]"') from missing
    return httpx2


def _settings(url: str, key: str | None, timeout: float, transport: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    return {"base_url": url, "headers": headers, "timeout": timeout, "transport": transport}


# ---- the clients ----------------------------------------------------------------------------------------


class Client:
    """A blocking client. Fields of a verb are those of the request models in `llmrec.serve.models`.

    Every verb raises `RequestError` for what the server refuses, `NotFoundError` for an unknown item in a
    path, `OverloadError` with `retry_after` where it is busy, `LLMRecError` for what is no answer of a
    recommender, and the errors of httpx2 where nothing is there.

    Parameters
    ----------
    url
        Of the server, e.g. ``http://127.0.0.1:8000``.
    key
        API key.
    timeout
        Seconds.
    transport
        Of httpx2, for tests and proxies.
    """

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = 30.0, transport: Any = None
    ) -> None:
        self._http: httpx2.Client = _http().Client(**_settings(url, key, timeout, transport))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _ask(self, call: _Call[T]) -> T:
        return call.read(self._http.request(**call.sent()))

    def recommend(self, **fields: Any) -> m.ItemsResponse:
        """Recommend items; fields of `RecommendRequest`."""
        return self._ask(_items("/v1/recommend", m.RecommendRequest, fields))

    def search(self, query: str, **fields: Any) -> m.ItemsResponse:
        """Find items by words; fields of `SearchRequest`."""
        return self._ask(_items("/v1/search", m.SearchRequest, {"query": query, **fields}))

    def similar(self, item_id: str, **fields: Any) -> m.ItemsResponse:
        """Find items like one item; fields of `SimilarRequest`."""
        return self._ask(_items("/v1/similar", m.SimilarRequest, {"item_id": item_id, **fields}))

    def stages(self, **fields: Any) -> b.StagesResponse:
        """Return what retrieval, the language model and both together answer; as `recommend`."""
        return self._ask(_stages(fields))

    def seeds(self, **fields: Any) -> m.ItemsResponse:
        """Choose items to ask a newcomer about; fields of `llmrec.serve.browse.SeedsRequest`."""
        return self._ask(_items("/v1/seeds", b.SeedsRequest, fields))

    def complete(self, text: str, k: int = 10) -> list[b.FoundItem]:
        """Find items whose titles have words that begin as those typed do."""
        return self._ask(_complete(text, k)).items

    def attributes(self) -> dict[str, b.AttributeOut]:
        """Return what `where` can name, by attribute."""
        return self._ask(_attributes()).attributes

    def rank(self, items: Sequence[str | Item], **fields: Any) -> m.ItemsResponse:
        """Order items, also such as are not in the catalogue; fields of `RankRequest`."""
        return self._ask(_rank(items, fields))

    def predict(self, items: Sequence[str], **fields: Any) -> dict[str, float]:
        """Return the probability of each item to be the next; fields of `PredictRequest`."""
        return self._ask(_predict(items, fields)).probabilities

    def rerank(
        self, query: str, documents: Sequence[str | Mapping[str, str]], **fields: Any
    ) -> m.RerankResponse:
        """Order documents by relevance; fields of `RerankRequest`."""
        return self._ask(_rerank(query, documents, fields))

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return a unit vector for each text."""
        return _vectors(self._ask(_embed(texts)))

    def observe(
        self,
        user: str,
        item: str,
        timestamp: int | None = None,
        weight: float = 1.0,
        event_id: str | None = None,
        event: str | None = None,
    ) -> bool:
        """Store an event; without a time stamp it happened now. Return whether its `event_id` was new.

        With an `event_id` it is safe to call again when no answer came. `event` is its type, which counts as
        `data.event_weights` of the server has it.
        """
        return self.observe_many([Event(user, item, timestamp, weight, event_id, event)]) == 1

    def observe_many(self, events: Iterable[Event]) -> int:
        """Store events in the order given, all of them or none; return how many were new."""
        return _new(self._ask(_observe(events)))

    def history(self, user: str, limit: int = 10) -> list[b.Past]:
        """Return the latest events of a user with their titles, oldest first; none for an unknown one."""
        return self._ask(_history(user, limit)).events

    def put_item(self, item: Item) -> Item:
        """Add or replace an item; return it as the catalogue keeps it."""
        kept = self._ask(_put_item(item))
        return m.item_of(kept.item_id, kept)

    def remove_item(self, item_id: str) -> None:
        """Never return an item again."""
        self._ask(_remove_item(item_id))

    def forget(self, user: str) -> int:
        """Erase a user's events; return how many there were."""
        return self._ask(_forget(user)).events


class AsyncClient:
    """The same as `Client` for asynchronous programs."""

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = 30.0, transport: Any = None
    ) -> None:
        self._http: httpx2.AsyncClient = _http().AsyncClient(**_settings(url, key, timeout, transport))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _ask(self, call: _Call[T]) -> T:
        return call.read(await self._http.request(**call.sent()))

    async def recommend(self, **fields: Any) -> m.ItemsResponse:
        """Recommend items; fields of `RecommendRequest`."""
        return await self._ask(_items("/v1/recommend", m.RecommendRequest, fields))

    async def search(self, query: str, **fields: Any) -> m.ItemsResponse:
        """Find items by words; fields of `SearchRequest`."""
        return await self._ask(_items("/v1/search", m.SearchRequest, {"query": query, **fields}))

    async def similar(self, item_id: str, **fields: Any) -> m.ItemsResponse:
        """Find items like one item; fields of `SimilarRequest`."""
        return await self._ask(_items("/v1/similar", m.SimilarRequest, {"item_id": item_id, **fields}))

    async def stages(self, **fields: Any) -> b.StagesResponse:
        """Return what retrieval, the language model and both together answer; as `recommend`."""
        return await self._ask(_stages(fields))

    async def seeds(self, **fields: Any) -> m.ItemsResponse:
        """Choose items to ask a newcomer about; fields of `llmrec.serve.browse.SeedsRequest`."""
        return await self._ask(_items("/v1/seeds", b.SeedsRequest, fields))

    async def complete(self, text: str, k: int = 10) -> list[b.FoundItem]:
        """Find items whose titles have words that begin as those typed do."""
        return (await self._ask(_complete(text, k))).items

    async def attributes(self) -> dict[str, b.AttributeOut]:
        """Return what `where` can name, by attribute."""
        return (await self._ask(_attributes())).attributes

    async def rank(self, items: Sequence[str | Item], **fields: Any) -> m.ItemsResponse:
        """Order items, also such as are not in the catalogue; fields of `RankRequest`."""
        return await self._ask(_rank(items, fields))

    async def predict(self, items: Sequence[str], **fields: Any) -> dict[str, float]:
        """Return the probability of each item to be the next; fields of `PredictRequest`."""
        return (await self._ask(_predict(items, fields))).probabilities

    async def rerank(
        self, query: str, documents: Sequence[str | Mapping[str, str]], **fields: Any
    ) -> m.RerankResponse:
        """Order documents by relevance; fields of `RerankRequest`."""
        return await self._ask(_rerank(query, documents, fields))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return a unit vector for each text."""
        return _vectors(await self._ask(_embed(texts)))

    async def observe(
        self,
        user: str,
        item: str,
        timestamp: int | None = None,
        weight: float = 1.0,
        event_id: str | None = None,
        event: str | None = None,
    ) -> bool:
        """Store an event; without a time stamp it happened now. Return whether its `event_id` was new.

        With an `event_id` it is safe to call again when no answer came. `event` is its type, which counts as
        `data.event_weights` of the server has it.
        """
        return await self.observe_many([Event(user, item, timestamp, weight, event_id, event)]) == 1

    async def observe_many(self, events: Iterable[Event]) -> int:
        """Store events in the order given, all of them or none; return how many were new."""
        return _new(await self._ask(_observe(events)))

    async def history(self, user: str, limit: int = 10) -> list[b.Past]:
        """Return the latest events of a user with their titles, oldest first; none for an unknown one."""
        return (await self._ask(_history(user, limit))).events

    async def put_item(self, item: Item) -> Item:
        """Add or replace an item; return it as the catalogue keeps it."""
        kept = await self._ask(_put_item(item))
        return m.item_of(kept.item_id, kept)

    async def remove_item(self, item_id: str) -> None:
        """Never return an item again."""
        await self._ask(_remove_item(item_id))

    async def forget(self, user: str) -> int:
        """Erase a user's events; return how many there were."""
        return (await self._ask(_forget(user))).events
