"""What a server is asked and what it answers: the wire format of HTTP, of MCP and of the client.

Bounds that a server may set are marked ``x-limit``: `check` enforces them, and the OpenAPI document and
the schemas of MCP name their values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from llmrec.errors import RequestError
from llmrec.serve.config import ServeConfig
from llmrec.text import query_text
from llmrec.types import Item, Reason, Recommendation, Seen
from llmrec.weights import HEAVIEST

M = TypeVar("M", bound=BaseModel)

MARK = "x-limit"
"""Key in a field's schema; its value is the name of the setting that bounds the field."""

Whole = Annotated[StrictInt, Field(ge=-(2**53), le=2**53)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Value = StrictStr | StrictBool | Whole | Number | list[StrictStr]
"""What an item attribute may hold."""

Shown = StrictStr | StrictBool | StrictInt | Number | list[StrictStr]
"""What one holds: the catalogue may have larger whole numbers than a request may bring."""


def _storable(value: str) -> str:
    if "\0" in value:
        raise ValueError("the character NUL is in no id")
    return value


def _readable(value: str) -> str:
    if not query_text(value):
        raise ValueError("nothing of it can be seen")
    return value


Id = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_storable)]
Ids = list[Id]
NewId = Annotated[str, Field(min_length=1, max_length=500, pattern=r"\S"), AfterValidator(_storable)]
"""Of something that a request makes known: not blank."""


class Strict(BaseModel):
    """Values as they are, and no others: the format of this library's own endpoints."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Loose(BaseModel):
    """For formats of other services: fields that mean nothing here are left aside."""

    model_config = ConfigDict(extra="ignore")


class Asker(Strict):
    """Whom a request is for."""

    user: Id | None = Field(None, description="id of a user whose stored history counts")
    history: Ids | None = Field(
        None,
        description="item ids, oldest first, in place of a stored history; unknown ones do not count",
        json_schema_extra={MARK: "max_history"},
    )
    adapter: Id | None = Field(None, description="language model to use in place of the server's own")


class RecommendRequest(Asker):
    """A request for recommendations; everything may be left out."""

    query: str | None = Field(None, description="a wish in words")
    k: int = Field(10, ge=1, description="how many at most", json_schema_extra={MARK: "max_k"})
    where: dict[str, Any] | None = Field(None, description="conditions on item attributes")
    exclude: Ids = Field([], description="ids never to return", json_schema_extra={MARK: "max_candidates"})
    seen: Seen = Field("auto", description="whether items of the history may come back")
    caps: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        None, description="at most so many items of a value, by attribute"
    )
    pins: Ids = Field(
        [], description="ids that come first, in this order, k at most", json_schema_extra={MARK: "max_k"}
    )
    diversity: float = Field(0.0, ge=0, le=1, description="from 0, by score alone, to 1, as unlike as can be")
    explain: bool = Field(False, description="give a reason for each item")
    phrase: bool = Field(
        False,
        description="reasons in the language model's own words where these stay true, which takes seconds",
    )
    budget_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="answer without the language model where it would take longer",
    )
    now: Whole | None = Field(
        None, description="seconds since 1970: events after it do not count; without it all do"
    )


class SearchRequest(Asker):
    """Words to find items by; who asks makes the order personal."""

    query: Annotated[str, AfterValidator(_readable)] = Field(
        min_length=1, pattern=r"\S", description="what to look for, in words"
    )
    k: int = Field(10, ge=1, description="how many at most", json_schema_extra={MARK: "max_k"})
    where: dict[str, Any] | None = Field(None, description="conditions on item attributes")
    budget_ms: float | None = Field(None, gt=0, allow_inf_nan=False)


class SimilarRequest(Strict):
    """A request for items like one item."""

    item_id: Id
    k: int = Field(10, ge=1, description="how many at most", json_schema_extra={MARK: "max_k"})
    where: dict[str, Any] | None = Field(None, description="conditions on item attributes")


class PredictRequest(Asker):
    """Items to give probabilities for."""

    items: Ids = Field(json_schema_extra={MARK: "max_candidates"})


class SourceOut(Strict):
    """Which component found an item, at which rank (0 if it did not), and what it added to the score."""

    name: str
    rank: int
    score: float


class InfluenceOut(Strict):
    """A history item that raised an item's score, and by how much."""

    item_id: str
    title: str
    amount: float


class SharedOut(Strict):
    """An attribute value that an item shares with history items in evidence."""

    name: str
    value: Shown
    item_ids: list[str]


class ReasonOut(Strict):
    """Why an item is recommended: a sentence, and the evidence that it rests on."""

    sentence: str
    history: list[InfluenceOut] = []
    shared: list[SharedOut] = []
    words: list[str] = []
    worded: bool = Field(False, description="whether a language model wrote the sentence")

    @classmethod
    def of(cls, reason: Reason) -> ReasonOut:
        """Make one from what the library returns."""
        return cls(
            sentence=reason.sentence,
            history=[InfluenceOut(item_id=h.item_id, title=h.title, amount=h.amount) for h in reason.history],
            shared=[
                SharedOut(name=s.name, value=plain({"": s.value})[""], item_ids=list(s.item_ids))
                for s in reason.shared
            ],
            words=list(reason.words),
            worded=reason.worded,
        )


class Recommended(Strict):
    """One item of an answer. Rank starts at 1; scores compare within one answer only."""

    item_id: str
    title: str
    rank: int
    score: float
    attributes: dict[str, Shown] = {}
    sources: list[SourceOut] = []
    reason: ReasonOut | None = None

    @classmethod
    def of(cls, found: Recommendation) -> Recommended:
        """Make one from what the library returns."""
        return cls.model_construct(
            item_id=found.item_id,
            title=found.title,
            rank=found.rank,
            score=found.score,
            attributes=plain(dict(found.item.attributes)),
            sources=[
                SourceOut.model_construct(name=s.name, rank=s.rank, score=s.score) for s in found.sources
            ],
            reason=None if found.reason is None else ReasonOut.of(found.reason),
        )


class ItemsResponse(Strict):
    """Items, best first. `degraded`: without the language model, for the budget or as its server is gone."""

    items: list[Recommended]
    degraded: bool = False


class PredictResponse(Strict):
    """Probability that the next event is each item; over the whole catalogue they sum to 1."""

    probabilities: dict[str, float]


class EventIn(Strict):
    """One purchase, click or watch. Without a time stamp it happened now."""

    user_id: NewId
    item_id: Id
    timestamp: int | None = Field(None, ge=-(10**11), le=10**11, description="seconds since 1970")
    weight: float = Field(1.0, gt=0, le=HEAVIEST, allow_inf_nan=False)
    event_id: NewId | None = Field(None, description="unique for the user: sent again it is not stored again")
    event: str | None = Field(
        None, min_length=1, max_length=200, description="its type, which counts as data.event_weights has it"
    )


class EventsIn(RootModel[list[EventIn]]):
    """Several events."""


class EventsResponse(Strict):
    """How many events were stored, or erased.

    `repeated`: how many of them had been stored before, or are of a type that does not count.
    """

    events: int
    repeated: int | None = None


class ItemIn(Strict):
    """An item without its id."""

    title: str = Field(min_length=1, pattern=r"\S")
    text: str = ""
    attributes: dict[str, Value] = Field({}, description="of the kinds that the catalogue has")


class UnlistedItem(ItemIn):
    """An item that need not be in the catalogue; for one request it is, known by its text."""

    item_id: Id

    def given(self) -> Item:
        """As the library takes it."""
        return item_of(self.item_id, self)


class RankRequest(Asker):
    """Items to order."""

    items: list[Id | UnlistedItem] = Field(
        description="ids, or items that need not be in the catalogue; each id once",
        json_schema_extra={MARK: "max_candidates"},
    )
    query: str | None = Field(None, description="a wish in words")


class ItemOut(Strict):
    """An item as the catalogue keeps it: cleaned of control and template characters."""

    item_id: str
    title: str
    text: str = ""
    attributes: dict[str, Shown] = {}
    active: bool = Field(True, description="False for a removed item")


class Document(Loose):
    """Words, or the id of an item of the catalogue; words win where both are given."""

    text: str | None = None
    id: str | None = None


class RerankRequest(Loose):
    """Documents to order, in the format of Cohere and Jina; `user` and `history` are extensions."""

    model: str = "llmrec"
    query: str = ""
    documents: list[str | Document] = Field(
        description="texts, or ids of the catalogue", json_schema_extra={MARK: "max_candidates"}
    )
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False
    user: str | None = None
    history: list[str] | None = Field(None, json_schema_extra={MARK: "max_history"})


class DocumentOut(Strict):
    """A document that was asked for."""

    text: str
    id: str | None = None


class RerankResult(Strict):
    """Position of a document in the request, and its relevance in [0, 1]."""

    index: int
    relevance_score: float
    document: DocumentOut | None = None


class RerankResponse(Strict):
    """Documents, the most relevant first."""

    id: str
    model: str
    results: list[RerankResult]
    meta: dict[str, Any] = {}
    usage: dict[str, int] = {}


class TextsRequest(Loose):
    """Texts to order, in the format of Text Embeddings Inference; `user` and `history` are extensions."""

    query: str = ""
    texts: list[str] = Field(json_schema_extra={MARK: "max_candidates"})
    return_text: bool = False
    user: str | None = None
    history: list[str] | None = Field(None, json_schema_extra={MARK: "max_history"})


class TextScore(Strict):
    """Position of a text in the request, and its relevance in [0, 1]."""

    index: int
    score: float
    text: str | None = None


class EmbeddingsRequest(Loose):
    """Texts to turn into vectors, in the format of OpenAI."""

    input: str | list[str] = Field(json_schema_extra={MARK: "max_candidates"})
    model: str = "llmrec"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="only the encoder's own length is known")


class Embedding(Strict):
    """One unit vector: numbers, or float32 little-endian in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(Strict):
    """Vectors in the order of the texts; `usage` counts words, since encoders count tokens each their way."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: dict[str, int]


class Problem(BaseModel):
    """An error, RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="name of the error in the library, or of the rule of HTTP")
    request_id: str = ""
    errors: list[dict[str, str]] | None = Field(None, description="where the request breaks its schema")


def item_of(item_id: str, body: ItemIn | ItemOut) -> Item:
    """An item as the library takes it."""
    attributes = {n: tuple(v) if isinstance(v, list) else v for n, v in body.attributes.items()}
    return Item(item_id, body.title, body.text, attributes)


def plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes as JSON has them: lists in place of tuples."""
    return {n: list(v) if isinstance(v, tuple) else v for n, v in attributes.items()}


def read(model: type[M], values: Any) -> M:
    """Make a request from plain values.

    Raises
    ------
    RequestError
        With every problem at once.
    """
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        raise RequestError(f"the request is invalid: {problems(invalid)}") from None


def problems(invalid: ValidationError) -> str:
    """Every problem of a request in words, with the field that has it."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in invalid.errors())


def limited(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield the fields that a setting bounds, with its name."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and isinstance(setting := extra.get(MARK), str):
            yield name, setting


def check(request: BaseModel, config: ServeConfig) -> None:
    """Enforce the bounds that a server sets.

    Raises
    ------
    RequestError
        If a number or a list is beyond its bound.
    """
    for name, setting in limited(type(request)):
        value, bound = getattr(request, name), getattr(config, setting)
        if isinstance(value, int) and value > bound:
            raise RequestError(f"{name} may be {bound:,} at most, got {value:,}")
        if isinstance(value, list) and len(value) > bound:
            raise RequestError(f"{name} may hold {bound:,} entries at most, got {len(value):,}")


def bounded(schema: Any, config: ServeConfig) -> Any:
    """Return a JSON schema in which the marks of `MARK` became ``maximum`` or ``maxItems``."""
    if isinstance(schema, list):
        return [bounded(part, config) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: bounded(part, config) for key, part in schema.items() if key != MARK}
    if MARK in schema:
        bound = getattr(config, schema[MARK])
        for part in result.get("anyOf", [result]):
            if part.get("type") == "integer":
                part["maximum"] = bound
            elif part.get("type") == "array":
                part["maxItems"] = bound
    return result
