"""HTTP routes of what a page needs, and the page itself at ``/``."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from pydantic import BaseModel
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.routing import BaseRoute, Route

from llmrec.serve import browse as b
from llmrec.serve import models as m
from llmrec.serve.service import Service

ItemId = Annotated[m.Id, Path(description="item id; a slash in it is written %2F")]
UserId = Annotated[m.Id, Path(description="user id; a slash in it is written %2F")]


class _Any(PathConvertor):
    """Any text in a path; that of Starlette ends at a line end, and ids of users are never cleaned."""

    regex = "(?s:.*)"


register_url_convertor("any", _Any())

PAGES = {"/": "index.html", "/docs": "docs.html"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# Nothing but this server's own files; no script or style in the page; no text ever becomes markup.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept, and asked for again each time: a new version of the library shows at once.
    "Cache-Control": "no-cache",
}


def browsing(
    service: Service, writer: Callable[[Request], Awaitable[None]], components: Mapping[str, str]
) -> APIRouter:
    """Make the routes.

    Parameters
    ----------
    writer
        Refuses a request whose key may only read.
    components
        What each source of a recommendation looks at.
    """
    router = APIRouter(prefix="/v1", tags=["browse"])
    _add_catalogue(router, service, components)
    _add_people(router, service, writer)
    return router


async def _pooled(service: Service, verb: Callable[..., BaseModel], *arguments: Any) -> Response:
    def answered() -> Response:
        text = verb(service, *arguments).model_dump_json(exclude_none=True)
        return Response(text, media_type="application/json")

    return await asyncio.wrap_future(service.submit(answered))


def _add_catalogue(router: APIRouter, service: Service, components: Mapping[str, str]) -> None:
    @router.get("/about", response_model=b.About)
    async def about(request: Request) -> Response:
        """Say what is served, within which limits, and what this key may do."""
        return await _pooled(service, b.about, request.state.role, dict(components))

    @router.get("/attributes", response_model=b.AttributesResponse)
    async def attributes() -> Response:
        """List the attributes that conditions can name, with range and the most frequent values."""
        return await _pooled(service, b.attributes)

    @router.get("/items", response_model=b.FoundItems)
    async def find_items(asked: Annotated[b.ItemsQuery, Query()]) -> Response:
        """Search titles as they are typed: each word is the beginning of a word; popular items first."""
        return await _pooled(service, b.find_items, asked)

    @router.get("/items/{item_id:any}", response_model=m.ItemOut)
    async def item(item_id: ItemId) -> Response:
        """Show an item as the catalogue keeps it; a removed one is not active."""
        return await _pooled(service, Service.item, item_id)


def _add_people(router: APIRouter, service: Service, writer: Callable[[Request], Awaitable[None]]) -> None:
    @router.post("/seeds", response_model=m.ItemsResponse)
    async def seeds(body: b.SeedsRequest) -> Response:
        """Choose popular items unlike each other, to ask a newcomer about; each choice narrows the next."""
        return await _pooled(service, b.seeds, body)

    @router.post("/stages", response_model=b.StagesResponse)
    async def stages(body: m.RecommendRequest) -> Response:
        """Show what retrieval alone, the language model alone and both together answer, and how fast."""
        return await _pooled(service, b.stages, body)

    @router.get("/users/{user_id:any}/history", response_model=b.HistoryResponse)
    async def history(user_id: UserId, asked: Annotated[b.HistoryQuery, Query()]) -> Response:
        """Show the latest events of a user, oldest first; none for an unknown one."""
        return await _pooled(service, b.history, user_id, asked)

    # Who may only read has to know for whom.
    @router.get("/users", response_model=b.UsersResponse, tags=["change"], dependencies=[Depends(writer)])
    async def users(asked: Annotated[b.UsersQuery, Query()]) -> Response:
        """List ids of users with stored events."""
        return await _pooled(service, b.users, asked)


def page_routes() -> list[BaseRoute]:
    """Make the routes of the pages: ``/``, ``/docs``, and ``/page/NAME`` for each of their files."""
    folder = files("llmrec.serve") / "page"
    held = {file.name: file.read_bytes() for file in folder.iterdir() if _suffix(file.name) in TYPES}
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, content in held.items()}

    async def show(request: Request) -> Response:
        name = request.path_params.get("name", PAGES.get(request.url.path, ""))
        if name not in held:
            raise HTTPException(404, "Not Found")
        head = {**HEADERS, "ETag": tags[name]}
        if tags[name] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=head)
        return Response(held[name], headers=head, media_type=TYPES[_suffix(name)])

    return [
        *(Route(path, show, methods=["GET"], include_in_schema=False) for path in PAGES),
        Route("/page/{name}", show, methods=["GET"], include_in_schema=False),
    ]


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]
