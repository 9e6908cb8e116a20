"""A client of `llmrec serve`, blocking and asynchronous: the verbs of `Recommender` over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from llmrec.errors import LLMRecError, NotFoundError, OverloadError, RequestError
from llmrec.serve import models as m
from llmrec.types import AttributeValue, Item

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T", bound=BaseModel)
Call = tuple[str, str, Any]
"""Method, path and JSON body."""


def _http() -> Any:
    try:
        import httpx2
    except ImportError as missing:
        raise ImportError('the client needs: pip install "llmrec[serve]"') from missing
    return httpx2


class _Calls:
    """How each verb is written as a call; what the two clients share."""

    @staticmethod
    def ask(path: str, model: type[BaseModel], fields: Mapping[str, Any]) -> Call:
        """A request with a body, checked before it is sent."""
        try:
            body = model.model_validate(dict(fields))
        except ValidationError as invalid:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in invalid.errors())
            raise RequestError(f"the request is invalid: {problems}") from None
        return "POST", path, body.model_dump(exclude_unset=True)

    @classmethod
    def observe(cls, user: str, item: str, timestamp: int | None, weight: float) -> Call:
        """An event."""
        event = dict(user_id=user, item_id=item, timestamp=timestamp, weight=weight)
        return cls.ask("/v1/events", m.EventIn, event)

    @staticmethod
    def put_item(item: Item) -> Call:
        """An item."""
        body = m.ItemIn(title=item.title, text=item.text, attributes=m.plain(dict(item.attributes)))
        return "PUT", f"/v1/items/{quote(item.item_id, safe='')}", body.model_dump()

    @staticmethod
    def remove_item(item_id: str) -> Call:
        """The end of an item."""
        return "DELETE", f"/v1/items/{quote(item_id, safe='')}", None

    @staticmethod
    def forget(user: str) -> Call:
        """The end of a user's events."""
        return "DELETE", f"/v1/users/{quote(user, safe='')}", None


def _settings(url: str, key: str | None, timeout: float, transport: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"base_url": url, "headers": headers, "timeout": timeout, "transport": transport}


def _read(answer: httpx2.Response, model: type[T] | None) -> T | None:
    """Return the body of a good answer; raise what a bad one says."""
    if answer.is_success:
        return model.model_validate_json(answer.content) if model is not None else None
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


class Client:
    """A blocking client. Fields of a verb are those of the request models in `llmrec.serve.models`.

    Every verb raises `RequestError` for what the server refuses, `NotFoundError` for an unknown item in a
    path, `OverloadError` with `retry_after` where it is busy, and the errors of httpx2 where it is not there.

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

    def _call(self, call: Call, model: type[T]) -> T:
        method, path, body = call
        answer = _read(self._http.request(method, path, json=body), model)
        assert answer is not None
        return answer

    def recommend(self, **fields: Any) -> m.ItemsResponse:
        """Recommend items; fields of `RecommendRequest`."""
        return self._call(_Calls.ask("/v1/recommend", m.RecommendRequest, fields), m.ItemsResponse)

    def search(self, query: str, **fields: Any) -> m.ItemsResponse:
        """Find items by words; fields of `SearchRequest`."""
        return self._call(
            _Calls.ask("/v1/search", m.SearchRequest, {"query": query, **fields}), m.ItemsResponse
        )

    def similar(self, item_id: str, **fields: Any) -> m.ItemsResponse:
        """Find items like one item; fields of `SimilarRequest`."""
        asked = {"item_id": item_id, **fields}
        return self._call(_Calls.ask("/v1/similar", m.SimilarRequest, asked), m.ItemsResponse)

    def rank(self, items: Sequence[str], **fields: Any) -> m.ItemsResponse:
        """Order items; fields of `RankRequest`."""
        asked = {"items": list(items), **fields}
        return self._call(_Calls.ask("/v1/rank", m.RankRequest, asked), m.ItemsResponse)

    def predict(self, items: Sequence[str], **fields: Any) -> dict[str, float]:
        """Return the probability of each item to be the next; fields of `PredictRequest`."""
        asked = {"items": list(items), **fields}
        return self._call(_Calls.ask("/v1/predict", m.PredictRequest, asked), m.PredictResponse).probabilities

    def rerank(
        self, query: str, documents: Sequence[str | Mapping[str, str]], **fields: Any
    ) -> m.RerankResponse:
        """Order documents by relevance; fields of `RerankRequest`."""
        asked = {"query": query, "documents": list(documents), **fields}
        return self._call(_Calls.ask("/v2/rerank", m.RerankRequest, asked), m.RerankResponse)

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return a unit vector for each text."""
        call = _Calls.ask("/v1/embeddings", m.EmbeddingsRequest, {"input": list(texts)})
        return _vectors(self._call(call, m.EmbeddingsResponse))

    def observe(self, user: str, item: str, timestamp: int | None = None, weight: float = 1.0) -> None:
        """Store an event; without a time stamp it happened now."""
        self._call(_Calls.observe(user, item, timestamp, weight), m.EventsResponse)

    def put_item(self, item: Item) -> Item:
        """Add or replace an item; return it as the catalogue keeps it."""
        return _item(self._call(_Calls.put_item(item), m.ItemOut))

    def remove_item(self, item_id: str) -> None:
        """Never return an item again."""
        method, path, _ = _Calls.remove_item(item_id)
        _read(self._http.request(method, path), None)

    def forget(self, user: str) -> int:
        """Erase a user's events; return how many there were."""
        return self._call(_Calls.forget(user), m.EventsResponse).events


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

    async def _call(self, call: Call, model: type[T]) -> T:
        method, path, body = call
        answer = _read(await self._http.request(method, path, json=body), model)
        assert answer is not None
        return answer

    async def recommend(self, **fields: Any) -> m.ItemsResponse:
        """Recommend items; fields of `RecommendRequest`."""
        return await self._call(_Calls.ask("/v1/recommend", m.RecommendRequest, fields), m.ItemsResponse)

    async def search(self, query: str, **fields: Any) -> m.ItemsResponse:
        """Find items by words; fields of `SearchRequest`."""
        asked = {"query": query, **fields}
        return await self._call(_Calls.ask("/v1/search", m.SearchRequest, asked), m.ItemsResponse)

    async def similar(self, item_id: str, **fields: Any) -> m.ItemsResponse:
        """Find items like one item; fields of `SimilarRequest`."""
        asked = {"item_id": item_id, **fields}
        return await self._call(_Calls.ask("/v1/similar", m.SimilarRequest, asked), m.ItemsResponse)

    async def rank(self, items: Sequence[str], **fields: Any) -> m.ItemsResponse:
        """Order items; fields of `RankRequest`."""
        asked = {"items": list(items), **fields}
        return await self._call(_Calls.ask("/v1/rank", m.RankRequest, asked), m.ItemsResponse)

    async def predict(self, items: Sequence[str], **fields: Any) -> dict[str, float]:
        """Return the probability of each item to be the next; fields of `PredictRequest`."""
        asked = {"items": list(items), **fields}
        answer = await self._call(_Calls.ask("/v1/predict", m.PredictRequest, asked), m.PredictResponse)
        return answer.probabilities

    async def rerank(
        self, query: str, documents: Sequence[str | Mapping[str, str]], **fields: Any
    ) -> m.RerankResponse:
        """Order documents by relevance; fields of `RerankRequest`."""
        asked = {"query": query, "documents": list(documents), **fields}
        return await self._call(_Calls.ask("/v2/rerank", m.RerankRequest, asked), m.RerankResponse)

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return a unit vector for each text."""
        call = _Calls.ask("/v1/embeddings", m.EmbeddingsRequest, {"input": list(texts)})
        return _vectors(await self._call(call, m.EmbeddingsResponse))

    async def observe(self, user: str, item: str, timestamp: int | None = None, weight: float = 1.0) -> None:
        """Store an event; without a time stamp it happened now."""
        await self._call(_Calls.observe(user, item, timestamp, weight), m.EventsResponse)

    async def put_item(self, item: Item) -> Item:
        """Add or replace an item; return it as the catalogue keeps it."""
        return _item(await self._call(_Calls.put_item(item), m.ItemOut))

    async def remove_item(self, item_id: str) -> None:
        """Never return an item again."""
        method, path, _ = _Calls.remove_item(item_id)
        _read(await self._http.request(method, path), None)

    async def forget(self, user: str) -> int:
        """Erase a user's events; return how many there were."""
        return (await self._call(_Calls.forget(user), m.EventsResponse)).events


def _vectors(answer: m.EmbeddingsResponse) -> list[list[float]]:
    return [one.embedding for one in answer.data if isinstance(one.embedding, list)]


def _item(kept: m.ItemOut) -> Item:
    attributes: dict[str, AttributeValue] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in kept.attributes.items()
    }
    return Item(kept.item_id, kept.title, kept.text, attributes)
