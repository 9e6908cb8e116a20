"""The HTTP app: routes around `Service`, errors as problem+json, and MCP at ``/mcp``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import BaseModel, RootModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Route

from llmrec import __version__
from llmrec.errors import (
    DataError,
    EngineError,
    LLMRecError,
    NotFoundError,
    OverloadError,
    RequestError,
    StoreError,
)
from llmrec.explain.meanings import MEANINGS
from llmrec.recommender import Recommender
from llmrec.serve import models as m
from llmrec.serve.browse_http import ItemId, UserId, browsing, page_routes
from llmrec.serve.config import ServeConfig
from llmrec.serve.document import complete
from llmrec.serve.gate import PROBLEM, App, Gate, Receive, Scope, Send, problem
from llmrec.serve.mcp import create_server
from llmrec.serve.metrics import CONTENT_TYPE, Metrics
from llmrec.serve.service import Service

logger = logging.getLogger(__name__)

IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=200, description="unique for what is sent, kept for a retry")
]


class _Texts(RootModel[list[m.TextScore]]):
    """Scores of texts, the best first."""


def create_app(
    recommender: Recommender, config: ServeConfig | None = None, *, counted: FilePath | None = None
) -> FastAPI:
    """Make the HTTP app of a recommender. It answers once its lifespan has begun; ``/ready`` says when.

    The app does not close the recommender.

    Parameters
    ----------
    recommender
        Fitted or loaded.
    config
        Limits, keys and batching; defaults if None.
    counted
        Folder in which the processes of one server leave what they count, so that each can tell of all.
    """
    config = config or ServeConfig()
    metrics = Metrics(counted)
    service = Service(recommender, config, metrics.on_batch)
    metrics.watch(service)
    mcp = _MCP(service, config)
    state: dict[str, Any] = {"ready": False, "why": "the model is being loaded"}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with mcp.running():
            warming = asyncio.create_task(_warm_up(service, state))
            sharing = asyncio.create_task(metrics.share())
            try:
                yield
            finally:
                sharing.cancel()
                await warming
                await asyncio.to_thread(service.close)

    app = _Documented(
        config,
        title="llmrec",
        version=__version__,
        summary="Recommendations from a log and a catalogue.",
        lifespan=lifespan,
        # Both would load scripts from elsewhere; we have a page of our own.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service, app.state.draining = service, False
    for router in (_asking(service), _reranking(service), _changing(service), _watching(metrics, state)):
        app.include_router(router)
    app.include_router(
        browsing(service, _writer, {name: meaning.clause for name, meaning in MEANINGS.items()})
    )
    app.router.routes.extend(page_routes())
    app.router.routes.append(Route("/mcp", endpoint=mcp, methods=["POST"], include_in_schema=False))
    app.add_exception_handler(LLMRecError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_http)
    app.add_middleware(
        Gate, config=config, on_done=metrics.on_done, draining=lambda: bool(app.state.draining)
    )
    return app


async def _warm_up(service: Service, state: dict[str, Any]) -> None:
    try:
        await asyncio.to_thread(service.warm_up)
    except Exception as error:
        logger.exception("the first request failed")
        state["why"] = f"the first request failed: {type(error).__name__}; see the log"
    else:
        state.update(ready=True, why="")


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), status, media_type="application/json")


# ---- routes -------------------------------------------------------------------------------------------


def _asking(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["recommend"])

    async def pooled(verb: Callable[[Any], BaseModel], body: BaseModel) -> Response:
        # Numbers become text in the thread too: vectors and long lists take a while.
        return await asyncio.wrap_future(service.submit(lambda: _json(verb(body))))

    @router.post("/recommend", response_model=m.ItemsResponse)
    async def recommend(body: m.RecommendRequest) -> Response:
        """Recommend items to a user, for a history, for a wish in words, or for nobody in particular."""
        if body.phrase:
            answered = service.phrasing.submit(lambda: _json(service.phrased(body)))
            return await asyncio.wrap_future(answered)
        answer = await asyncio.wrap_future(service.begin(body))
        return _json(answer)

    @router.post("/search", response_model=m.ItemsResponse)
    async def search(body: m.SearchRequest) -> Response:
        """Find items by words, in the order that suits who asks."""
        answer = await asyncio.wrap_future(service.begin(body))
        return _json(answer)

    @router.post("/similar", response_model=m.ItemsResponse)
    async def similar(body: m.SimilarRequest) -> Response:
        """Find items like one item."""
        return await pooled(service.similar, body)

    @router.post("/rank", response_model=m.ItemsResponse)
    async def rank(body: m.RankRequest) -> Response:
        """Order given items, best first; all of them come back."""
        return await pooled(service.rank, body)

    @router.post("/predict", response_model=m.PredictResponse)
    async def predict(body: m.PredictRequest) -> Response:
        """Give the probability that the next event is each item."""
        return await pooled(service.predict, body)

    @router.post("/embeddings", response_model=m.EmbeddingsResponse, tags=["compatible"])
    async def embeddings(body: m.EmbeddingsRequest) -> Response:
        """Turn texts into vectors; the format is that of OpenAI."""
        return await pooled(service.embed, body)

    return router


def _reranking(service: Service) -> APIRouter:
    router = APIRouter(tags=["compatible"])

    @router.post("/v1/rerank", response_model=m.RerankResponse, operation_id="rerank_v1")
    @router.post("/v2/rerank", response_model=m.RerankResponse, operation_id="rerank_v2")
    async def rerank(body: m.RerankRequest) -> Response:
        """Order documents by relevance; the format is that of Cohere and Jina."""
        return await asyncio.wrap_future(service.submit(lambda: _json(service.rerank(body))))

    @router.post("/rerank", response_model=list[m.TextScore])
    async def rerank_texts(body: m.TextsRequest) -> Response:
        """Order texts by relevance; the format is that of Text Embeddings Inference."""
        return await asyncio.wrap_future(service.submit(lambda: _json(_Texts(service.rerank_texts(body)))))

    return router


async def _writer(request: Request) -> None:
    if request.state.role != "write":
        raise HTTPException(403, "this key may read only; storing and deleting needs one with role write")


def _changing(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["change"], dependencies=[Depends(_writer)])

    @router.post("/events", status_code=201, response_model=m.EventsResponse)
    async def store(body: m.EventIn | list[m.EventIn], idempotency_key: IdempotencyKey = None) -> Response:
        """Store one event or many; they count in the next request.

        With a key, or ids in the events, it is safe to send the same request again when no answer came.
        """
        events = body if isinstance(body, list) else [body]
        return _json(await asyncio.wrap_future(service.submit(service.store, events, idempotency_key)), 201)

    @router.put("/items/{item_id:any}", response_model=m.ItemOut, responses={201: {"model": m.ItemOut}})
    async def put_item(item_id: ItemId, body: m.ItemIn) -> Response:
        """Add an item (201), or replace the one with this id (200); recommendable at once."""
        item, new = await asyncio.wrap_future(service.submit(service.put_item, item_id, body))
        return _json(item, 201 if new else 200)

    @router.delete("/items/{item_id:any}", status_code=204)
    async def remove_item(item_id: ItemId) -> None:
        """Never return an item again; its events stay."""
        await asyncio.wrap_future(service.submit(service.remove_item, item_id))

    @router.delete("/users/{user_id:any}", response_model=m.EventsResponse)
    async def forget(user_id: UserId) -> Response:
        """Erase all events of a user; the answer says how many there were."""
        return _json(await asyncio.wrap_future(service.submit(service.forget, user_id)))

    return router


def _watching(metrics: Metrics, state: Mapping[str, Any]) -> APIRouter:
    router = APIRouter(tags=["operate"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok", "version": __version__}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """Say that requests are answered at full speed; 503 until then."""
        if not state["ready"]:
            raise HTTPException(503, state["why"], headers={"Retry-After": "1"})
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def show() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router


# ---- MCP ----------------------------------------------------------------------------------------------


LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Names by which this machine calls itself."""


class _MCP:
    """The MCP servers as one endpoint: a key that may only read sees no tool that writes."""

    def __init__(self, service: Service, config: ServeConfig) -> None:
        self._servers = {writable: create_server(service, writable=writable) for writable in (False, True)}
        # Without keys the SDK refuses other names and origins; who has a key may come from anywhere.
        guard = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        if not config.keys:
            names = [f"{name}{port}" for name in LOCAL for port in ("", ":*")]
            guard = TransportSecuritySettings(
                allowed_hosts=names, allowed_origins=[f"http://{name}" for name in names]
            )
        self._apps: dict[bool, App] = {
            writable: server.streamable_http_app(
                stateless_http=True,
                json_response=True,
                max_request_body_size=config.max_body,
                transport_security=guard,
            )
            for writable, server in self._servers.items()
        }

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the session managers."""
        async with AsyncExitStack() as stack:
            for server in self._servers.values():
                await stack.enter_async_context(server.session_manager.run())
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._apps[scope["state"]["role"] == "write"](scope, receive, send)


# ---- errors -------------------------------------------------------------------------------------------


def _problem(
    request: Request,
    status: int,
    detail: str,
    code: str,
    headers: Mapping[str, str] | None = None,
    errors: list[dict[str, str]] | None = None,
) -> Response:
    body = problem(status, detail, code, request.state.request_id, errors)
    return Response(body, status, headers, media_type=PROBLEM)


async def _on_error(request: Request, error: Exception) -> Response:
    code = type(error).__name__
    match error:
        case OverloadError():
            return _problem(request, 503, str(error), code, {"Retry-After": str(error.retry_after)})
        case NotFoundError():
            return _problem(request, 404, str(error), code)
        case RequestError() | DataError():
            return _problem(request, 422, str(error), code)
        case StoreError() | EngineError():  # where they are concerns nobody outside
            logger.error("request %s: %s", request.state.request_id, error)
            what = "event store" if isinstance(error, StoreError) else "language model"
            detail = f"the {what} cannot be used just now; the log of the server says why"
            return _problem(request, 503, detail, code, {"Retry-After": "1"})
    # The rest is about this server's own files and models.
    raise error


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [{"at": "/".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
    detail = f"{len(found)} problem(s) in the request: " + "; ".join(
        f"{one['at']}: {one['message']}" for one in found[:3]
    )
    if found and found[0]["at"] == "body" and "json" not in request.headers.get("content-type", ""):
        detail = f"the body is read as JSON under the header content-type: application/json; {detail}"
    return _problem(request, 422, detail, "invalid", errors=found[:50])


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    return _problem(request, error.status_code, error.detail, code, error.headers)


# ---- the OpenAPI document -----------------------------------------------------------------------------


class _Documented(FastAPI):
    """An app whose OpenAPI document names the limits, the keys and the errors."""

    def __init__(self, config: ServeConfig, **settings: Any) -> None:
        super().__init__(**settings)
        self._config = config

    def openapi(self) -> dict[str, Any]:
        """Return the document."""
        if self.openapi_schema is None:
            made = get_openapi(
                title=self.title, version=self.version, summary=self.summary, routes=self.routes
            )
            self.openapi_schema = complete(m.bounded(made, self._config))
        return self.openapi_schema
