"""The MCP server: tools, resources and a prompt with which a chat app recommends from the catalogue."""

# Without `from __future__ import annotations`: the SDK reads the annotations of the tools, and those of
# numbers and lists hold bounds from the configuration, which are known only inside the function.

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceNotFoundError, ToolError
from mcp.server.mcpserver.resources.templates import ResourceSecurity
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from llmrec import __version__
from llmrec.errors import LLMRecError, NotFoundError, told
from llmrec.explain.meanings import MEANINGS
from llmrec.prompt import Prompt
from llmrec.recommender import Recommender
from llmrec.serve import browse as b
from llmrec.serve import models as m
from llmrec.serve.config import ServeConfig
from llmrec.serve.service import Service

logger = logging.getLogger(__name__)

INSTRUCTIONS = """\
Recommendations from one catalogue, learned from what people chose. Every item that comes back is in the
catalogue; suggest no others. Items are named by item_id: find the ids of titles with search_items. The
resource llmrec://attributes lists what `where` can name."""

READ = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)
WRITE = ToolAnnotations(
    read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=False
)

User = Annotated[str | None, Field(description="Id of a user whose stored history counts.")]
Words = Annotated[str | None, Field(description="A wish in words, e.g. 'a calm film for the family'.")]
Where = Annotated[
    dict[str, Any] | None,
    Field(
        description="Conditions on attributes, all of which hold. "
        'Examples: {"genres": "Comedy"}, {"year": {"gte": 1990, "lt": 2000}}, {"brand": ["Acme", "Dune"]}, '
        '{"genres": {"not": "Horror"}}, {"any": [{"year": 1994}, {"brand": "Acme"}]}.'
    ),
]


Caps = Annotated[
    dict[str, int] | None,
    Field(description='At most so many items of a value, by attribute, e.g. {"brand": 2}.'),
]
Diversity = Annotated[
    float, Field(ge=0, le=1, description="From 0, the best items, to 1, items as unlike as can be.")
]
Explain = Annotated[bool, Field(description="Give a reason for each item, in a sentence.")]


class FoundItem(BaseModel):
    """An item, its rank from 1, and a score that compares within this answer only; a reason if asked for."""

    item_id: str
    title: str
    rank: int
    score: float
    attributes: dict[str, m.Shown]
    reason: str | None = None


class Found(BaseModel):
    """Items, best first."""

    items: list[FoundItem]


class Evidence(m.SourceOut):
    """What one component found and added to the score; `meaning` says what it looks at."""

    meaning: str


class ExplainedItem(FoundItem):
    """An item with what each component added to its score, the largest part first."""

    sources: list[Evidence]


class Explained(BaseModel):
    """Items, best first, with the evidence for each."""

    items: list[ExplainedItem]


class Stored(BaseModel):
    """How many events were stored."""

    events: int


def create_server(recommender: Recommender | Service, *, writable: bool = True) -> MCPServer:
    """Make the MCP server of a recommender.

    Parameters
    ----------
    recommender
        A recommender, or a service whose batches and limits are shared.
    writable
        Whether there is a tool that stores events.
    """
    service = recommender if isinstance(recommender, Service) else Service(recommender)
    server = MCPServer(
        "llmrec", title="Recommendations", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING"
    )
    _add_finding(server, service)
    _add_asking(server, service)
    _add_ordering(server, service)
    if writable:
        _add_writing(server, service)
    _add_resources(server, service)
    _add_prompt(server)
    return server


def _history(limits: ServeConfig) -> Any:
    description = "Ids of chosen items, oldest first; not with user."
    return Field(max_length=limits.max_history, description=description)


def _add_finding(server: MCPServer, service: Service) -> None:
    limits = service.config
    Count = Annotated[int, Field(ge=1, le=limits.max_k, description="How many items at most.")]
    History = Annotated[list[m.Id] | None, _history(limits)]
    Exclude = Annotated[
        list[m.Id], Field(max_length=limits.max_candidates, description="Ids never to return.")
    ]

    @server.tool(title="Recommend items", annotations=READ)
    async def recommend(
        user: User = None,
        history: History = None,
        query: Words = None,
        k: Count = 10,
        where: Where = None,
        exclude: Exclude = [],  # noqa: B006 - the SDK puts it into the schema; it is never changed
        caps: Caps = None,
        diversity: Diversity = 0.0,
        explain: Explain = False,
    ) -> Found:
        """Recommend items to a user, for a history, for a wish in words, or for a wish and one of the others.

        Without any of them the answer is what is popular. Items of the history come back only where people
        choose the same thing again.
        """
        body: dict[str, Any] = dict(user=user, history=history, query=query, k=k, where=where)
        body |= dict(exclude=exclude, caps=caps, diversity=diversity, explain=explain)
        with _told():
            return _found(await _answer(service, m.read(m.RecommendRequest, body)))

    @server.tool(title="Search the catalogue", annotations=READ)
    async def search_items(
        query: Annotated[str, Field(min_length=1, description="Words of titles or descriptions.")],
        user: User = None,
        k: Count = 10,
        where: Where = None,
    ) -> Found:
        """Find items by words, also those that a user chose before. Use it to turn titles into item ids."""
        with _told():
            body = m.read(m.SearchRequest, dict(query=query, user=user, k=k, where=where))
            return _found(await _answer(service, body))

    @server.tool(title="Items like one item", annotations=READ)
    async def similar_items(
        item_id: Annotated[m.Id, Field(description="Id of the item.")], k: Count = 10, where: Where = None
    ) -> Found:
        """Find items like one item: by their texts, and by what people chose around it."""
        with _told():
            body = m.read(m.SimilarRequest, dict(item_id=item_id, k=k, where=where))
            return _found(await _pooled(service, service.similar, body))


def _add_asking(server: MCPServer, service: Service) -> None:
    limits = service.config
    Count = Annotated[int, Field(ge=1, le=limits.max_k, description="How many items at most.")]
    Said = Annotated[list[m.Id], Field(max_length=limits.max_history, description="Ids of items.")]

    @server.tool(title="Items to ask about", annotations=READ)
    async def items_to_ask_about(
        chosen: Said = [],  # noqa: B006 - the SDK puts it into the schema; it is never changed
        passed: Said = [],  # noqa: B006
        k: Count = 5,
        where: Where = None,
    ) -> Found:
        """Get to know somebody of whom nothing is known: popular items unlike each other, to ask about.

        Ask which of them they like. Call again with everything they liked in chosen and everything they
        turned down in passed: each answer narrows what comes next. Two or three rounds are enough; then
        call recommend with chosen as the history.
        """
        with _told():
            body = m.read(b.SeedsRequest, dict(chosen=chosen, passed=passed, k=k, where=where))
            return _found(await _pooled(service, b.seeds, service, body))


def _add_ordering(server: MCPServer, service: Service) -> None:
    limits = service.config
    Items = Annotated[
        list[m.Id], Field(min_length=1, max_length=limits.max_candidates, description="Item ids, each once.")
    ]
    History = Annotated[list[m.Id] | None, _history(limits)]

    @server.tool(title="Order given items", annotations=READ)
    async def rank_items(
        item_ids: Items, user: User = None, history: History = None, query: Words = None
    ) -> Found:
        """Order items you have already by how well they suit a user, a history or a wish. All come back."""
        body = dict(items=item_ids, user=user, history=history, query=query)
        with _told():
            return _found(await _pooled(service, service.rank, m.read(m.RankRequest, body)))

    @server.tool(title="Explain items", annotations=READ)
    async def explain(
        item_ids: Items, user: User = None, history: History = None, query: Words = None
    ) -> Explained:
        """Show the evidence for items: which components speak for each and how much they add to its score.

        Each source has a meaning in words. An item without sources has nothing that speaks for it. Say no
        more than the evidence does.
        """
        body = dict(items=item_ids, user=user, history=history, query=query)
        with _told():
            ranked = await _pooled(service, service.rank, m.read(m.RankRequest, body))
        return Explained(items=[_explained(r) for r in ranked.items])


def _add_writing(server: MCPServer, service: Service) -> None:
    @server.tool(title="Record a choice", annotations=WRITE)
    async def record_event(
        user: Annotated[m.Id, Field(description="Id of the user.")],
        item_id: Annotated[m.Id, Field(description="Id of the item that the user chose.")],
        event: Annotated[
            str | None, Field(description="What it was, as the shop's log calls it, like purchase or view.")
        ] = None,
    ) -> Stored:
        """Store that a user chose an item just now; it counts in the next recommendation.

        Only for what the user says they took, bought or watched, never for what was merely suggested.
        """
        with _told():
            chosen = m.read(m.EventIn, dict(user_id=user, item_id=item_id, event=event))
            found = await _pooled(service, service.store, [chosen])
            return Stored(events=found.events - (found.repeated or 0))


def _add_resources(server: MCPServer, service: Service) -> None:
    # An id is a key of the catalogue and no path: dots and slashes in it are harmless.
    @server.resource(
        "llmrec://items/{+item_id}",
        title="Item",
        mime_type="application/json",
        security=ResourceSecurity(exempt_params={"item_id"}),
    )
    def item(item_id: str) -> str:
        """One item of the catalogue with its attributes."""
        try:
            return service.item(item_id).model_dump_json()
        except NotFoundError as unknown:
            raise ResourceNotFoundError(str(unknown)) from None

    @server.resource("llmrec://attributes", title="Attributes of items", mime_type="application/json")
    def attributes() -> str:
        """The attributes that `where` can name: kind, range, and the most frequent values."""
        return json.dumps(service.attributes(), ensure_ascii=False)


def _add_prompt(server: MCPServer) -> None:
    before, after = Prompt.load("conversation").around("wish")

    @server.prompt(title="Find something I will like")
    def recommendation_conversation(wish: str = "nothing yet") -> str:
        """Begin a conversation that ends in recommendations from the catalogue."""
        return f"{before} {wish}\n\n{after}"


async def _answer(service: Service, body: m.RecommendRequest | m.SearchRequest) -> m.ItemsResponse:
    """Queue a request with those of other transports."""
    return await asyncio.wrap_future(service.begin(body))


async def _pooled(service: Service, verb: Any, *given: Any) -> Any:
    """Run a verb in the service's pool, so that its limits hold here too."""
    return await asyncio.wrap_future(service.submit(verb, *given))


@contextmanager
def _told() -> Iterator[None]:
    """Tell the model what is wrong with its call, in the library's words."""
    try:
        yield
    except LLMRecError as error:
        raise ToolError(told(error)) from error


def _explained(item: m.Recommended) -> ExplainedItem:
    values = item.model_dump()
    # A component of one's own is known by its name alone.
    values["sources"] = [{**s, "meaning": _meaning(s["name"])} for s in values["sources"]]
    return ExplainedItem.model_validate(values)


def _meaning(source: str) -> str:
    return MEANINGS[source].clause if source in MEANINGS else source


def _found(answer: m.ItemsResponse) -> Found:
    return Found(items=[FoundItem.model_validate(_plain(item)) for item in answer.items])


def _plain(item: m.Recommended) -> dict[str, Any]:
    """Fields of an item, its reason as a sentence."""
    return item.model_dump() | {"reason": item.reason.sentence if item.reason is not None else None}
