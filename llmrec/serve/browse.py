"""What a page or an app needs around recommendations: items by title, attributes, seeds, stages, users.

The verbs take a `Service`, as its own methods do, and know no transport.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmrec import __version__
from llmrec.errors import FetchError, ModelError
from llmrec.serve import models as m
from llmrec.serve.config import Role
from llmrec.serve.service import Service, request_of
from llmrec.types import Request

logger = logging.getLogger(__name__)

LanguageModel = Literal["none", "left out", "takes part"]
"""`left out`: there is one, and held-out events gave it the weight 0."""


class Query(BaseModel):
    """Values of a query string."""

    model_config = ConfigDict(extra="forbid")


class ItemsQuery(Query):
    """Which items to list."""

    prefix: str = Field("", max_length=500, description="beginnings of words of the title")
    k: int = Field(10, ge=1, description="how many at most", json_schema_extra={m.MARK: "max_k"})


class UsersQuery(Query):
    """Which users to list."""

    prefix: str = Field("", max_length=500, description="beginning of the id; case counts")
    k: int = Field(10, ge=1, description="how many at most", json_schema_extra={m.MARK: "max_k"})


class HistoryQuery(Query):
    """How much of a history to show."""

    k: int = Field(10, ge=1, description="how many at most", json_schema_extra={m.MARK: "max_k"})


class FoundItem(m.Strict):
    """An item by its name."""

    item_id: str
    title: str
    attributes: dict[str, m.Shown] = Field({}, description="those that it has")


class FoundItems(m.Strict):
    """Items, those that fit best first."""

    items: list[FoundItem]


class UsersResponse(m.Strict):
    """Ids of users with stored events."""

    users: list[str]


class Past(m.Strict):
    """An event of a user; the title is empty where the catalogue does not know the item."""

    item_id: str
    title: str
    timestamp: int | None = None


class HistoryResponse(m.Strict):
    """The latest events of a user, oldest first."""

    events: list[Past]


class Count(m.Strict):
    """A value of an attribute, and how many items have it."""

    value: m.Shown
    items: int


class AttributeOut(m.Strict):
    """What `where` can ask of an attribute: kind, range, the most frequent values among active items."""

    kind: str
    items: int = Field(description="how many have it")
    different: int = Field(description="how many values there are")
    frequent: list[Count]
    min: float | None = None
    max: float | None = None


class AttributesResponse(m.Strict):
    """The attributes of the catalogue, by name."""

    attributes: dict[str, AttributeOut]


class SeedsRequest(m.Strict):
    """What is known of somebody so far, to find out more."""

    k: int = Field(8, ge=1, description="how many at most", json_schema_extra={m.MARK: "max_k"})
    chosen: m.Ids = Field([], description="ids they like", json_schema_extra={m.MARK: "max_history"})
    passed: m.Ids = Field(
        [],
        description="ids they were asked about and did not choose",
        json_schema_extra={m.MARK: "max_history"},
    )
    where: dict[str, Any] | None = Field(None, description="conditions on item attributes")


class Stage(m.Strict):
    """What one stage would answer, and the milliseconds it took, reasons included if they were asked for."""

    name: Literal["retrieval", "language model", "default"]
    ms: float
    items: list[m.Recommended]


class StagesResponse(m.Strict):
    """What retrieval alone, the language model alone, and both together (`default`: what is served) answer.

    Without a language model its stage and the weight are missing; with the weight 0 it is left out of what
    is served.
    """

    stages: list[Stage]
    lm_weight: float | None = None


class About(m.Strict):
    """What is served here, and what the one who asks may do."""

    version: str
    items: int
    language_model: LanguageModel
    role: Role
    limits: dict[str, int]
    components: dict[str, str] = Field(description="what each source of a recommendation looks at")


def find_items(service: Service, asked: ItemsQuery) -> FoundItems:
    """Return items whose titles have words that begin as those typed do, the popular ones first."""
    m.check(asked, service.config)
    found = service.recommender.complete(asked.prefix, asked.k)
    return FoundItems(
        items=[
            FoundItem(item_id=i.item_id, title=i.title, attributes=m.plain(dict(i.attributes))) for i in found
        ]
    )


def attributes(service: Service) -> AttributesResponse:
    """Return what conditions can name."""
    return AttributesResponse(
        attributes={name: AttributeOut(**about) for name, about in service.attributes().items()}
    )


def seeds(service: Service, body: SeedsRequest) -> m.ItemsResponse:
    """Return popular items that are unlike each other, to ask somebody about."""
    m.check(body, service.config)
    found = service.recommender.seeds(body.k, body.chosen, body.passed, body.where)
    return m.ItemsResponse(items=[m.Recommended.of(r) for r in found])


def stages(service: Service, body: m.RecommendRequest) -> StagesResponse:
    """Return what each stage would answer, with the time it took."""
    m.check(body, service.config)
    request = request_of(body)
    weight = _lm_weight(service, request)
    made, began = [], time.perf_counter()
    for name, found in service.recommender.each_stage(request, lm=weight is not None):
        took = (time.perf_counter() - began) * 1e3
        items = [m.Recommended.of(r) for r in found]
        made.append(Stage.model_validate(dict(name=name, ms=took, items=items)))
        began = time.perf_counter()
    return StagesResponse(stages=made, lm_weight=weight)


def _lm_weight(service: Service, request: Request) -> float | None:
    """The language model's weight; None where there is none, or one that is left out and cannot be loaded."""
    if service.lm_is_missing and request.adapter is None:
        return None
    try:
        # Loads the model, if there is one: no part of the time of an answer.
        return service.recommender.lm_weight(request)
    except (ImportError, FetchError, ModelError) as missing:
        if service.recommender.asks_lm(request):
            raise
        service.lm_is_missing = True
        logger.warning("stages are shown without the language model, which is left out: %s", missing)
        return None


def users(service: Service, asked: UsersQuery) -> UsersResponse:
    """Return ids of users with stored events."""
    m.check(asked, service.config)
    return UsersResponse(users=service.recommender.users(asked.prefix, asked.k))


def history(service: Service, user_id: str, asked: HistoryQuery) -> HistoryResponse:
    """Return the latest events of a user; none for an unknown one."""
    m.check(asked, service.config)
    catalog = service.recommender.catalog
    return HistoryResponse(
        events=[
            Past(
                item_id=e.item_id,
                title=catalog.titles[catalog.code(e.item_id)] if e.item_id in catalog else "",
                timestamp=e.timestamp,
            )
            for e in service.recommender.history(user_id, asked.k)
        ]
    )


def about(service: Service, role: Role, components: dict[str, str]) -> About:
    """Return what is served."""
    rec, config = service.recommender, service.config
    state: LanguageModel = "none"
    if rec.has_language_model:
        state = "takes part" if rec.recipe.uses_lm else "left out"
    return About(
        version=__version__,
        items=int(rec.catalog.active.sum()),
        language_model=state,
        role=role,
        limits={name: getattr(config, name) for name in ("max_k", "max_history", "max_candidates")},
        components=components,
    )
