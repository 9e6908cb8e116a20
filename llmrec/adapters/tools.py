"""What a chat model may ask a recommender: four verbs, their arguments, and how it reads the answer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model

from llmrec.adapters.common import Asker, described
from llmrec.catalog import Catalog
from llmrec.errors import RequestError
from llmrec.recommender import Recommender
from llmrec.serve.models import read
from llmrec.serve.summary import summarise
from llmrec.types import Recommendation, Request

MAX_K = 100
"""Most items that a model gets at once."""
MAX_IDS = 100
"""Most item ids that a model gives in one list."""
MAX_CONDITIONS = 20
EXAMPLES = 8
"""Values of an attribute that are named to the model, the most frequent ones."""
LONGEST_EXAMPLE = 60
"""Longest value that is named to the model, in characters."""
_COMPARED = 1_000
"""Values of an attribute among which a misspelt one is looked for, the most frequent ones."""


class Arguments(BaseModel):
    """Arguments of a call: no others, and of no other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _value(value: Any) -> Any:
    each = value if isinstance(value, list) else [value]
    if not each or not all(isinstance(one, str | int | float) for one in each):
        raise ValueError("a text, a number, true or false, or a list of some of them is needed")
    return value


_PLAIN = [{"type": kind} for kind in ("string", "number", "boolean")]
Value = Annotated[
    Any,
    AfterValidator(_value),
    WithJsonSchema({"anyOf": [*_PLAIN, {"type": "array", "items": {"anyOf": _PLAIN[:2]}}]}),
]


class Condition(Arguments):
    """One condition on items. A list in place of a mapping, since strict schemas know no free keys."""

    attribute: str = Field(description="Name of the attribute.")
    operator: Literal["in", "not", "all", "gte", "gt", "lte", "lt", "exists", "match"] = Field(
        description="in: has one of the values; all: has each of them; not: has none of them; gte, gt, lte, "
        "lt: a number, or a date as 2020-05-31, at least, above, at most, below the value; exists: true or "
        "false; match: the text has this word."
    )
    value: Value = Field(description="One value, or a list of values for in, all and not.")


User = Annotated[
    str | None, Field(description="Id of a user whose stored history counts; null where history is given.")
]
Ids = Annotated[list[str], Field(max_length=MAX_IDS)]
History = Annotated[
    Ids | None,
    Field(description="Ids of items that the person chose, oldest first, in place of stored ones."),
]
Count = Annotated[
    Annotated[int, Field(ge=1, le=MAX_K)] | None, Field(description="How many items at most; null is 10.")
]
Where = Annotated[
    Annotated[list[Condition], Field(max_length=MAX_CONDITIONS)] | None,
    Field(description="Conditions on attributes, all of which hold."),
]


class Recommend(Arguments):
    """Arguments of `recommend`."""

    query: str | None = Field(None, description="A wish in words, e.g. 'a calm film for the family'.")
    user: User = None
    history: History = None
    k: Count = None
    where: Where = None
    exclude: Ids | None = Field(None, description="Ids never to return, e.g. those that were turned down.")
    explain: bool | None = Field(None, description="Whether each item gets a reason, in a sentence.")


class Search(Arguments):
    """Arguments of `search_items`."""

    query: str = Field(description="Words of titles or descriptions.")
    user: User = None
    k: Count = None
    where: Where = None


class Similar(Arguments):
    """Arguments of `similar_items`."""

    item_id: str = Field(description="Id of the item.")
    k: Count = None
    where: Where = None


class Rank(Arguments):
    """Arguments of `rank_items`."""

    item_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_IDS)] = Field(
        description="Item ids, each once."
    )
    user: User = None
    history: History = None
    query: str | None = Field(None, description="A wish in words.")


@dataclass(frozen=True, slots=True)
class Answer:
    """Items that a call found, best first, and where there are none what the model may try instead."""

    items: list[Recommendation]
    note: str = ""

    def as_json(self) -> str:
        """Return what a model reads: ``{"items": [{"item_id", "title", "rank", "score", "attributes"}]}``.

        Scores have four digits; where reasons were asked for, each item has its ``reason``; ``note`` stands
        beside the items if there is one.
        """
        items = [described(one) for one in self.items]
        for item in items:
            del item["sources"]
            item["score"] = float(f"{item['score']:.4g}")
        told = {"items": items} | ({"note": self.note} if self.note else {})
        return json.dumps(told, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb with its arguments and what it does; made in this module alone."""

    name: str
    description: str
    arguments: type[Arguments]
    answer: Callable[[Recommender, Any, Asker], list[Recommendation]]

    def run(self, recommender: Recommender, arguments: Mapping[str, Any], user: str | None = None) -> Answer:
        """Answer a call.

        Parameters
        ----------
        arguments
            As a model gave them.
        user
            Who asks, unless None; the arguments can name no other user then.

        Raises
        ------
        RequestError
            If the arguments do not fit, or name what is not there.
        """
        if user is not None and "user" in arguments:
            raise RequestError("user is no argument here: it is known who asks; leave it out")
        _check_text(arguments)
        given = read(self.arguments, dict(arguments))
        asker = Asker(user).or_else(getattr(given, "user", None), getattr(given, "history", None))
        found = self.answer(recommender, given, asker)
        return Answer(found, "" if found else _advice(recommender.catalog, getattr(given, "where", None)))

    def schema(self, catalog: Catalog, *, bound: bool = False) -> type[BaseModel]:
        """Return the arguments as a model that names the attributes of a catalogue.

        Its instances are no stricter than `arguments`: what is added later to the catalogue can be asked for.

        Parameters
        ----------
        bound
            Whether it is known who asks, so that there is no argument for it.
        """
        fields: dict[str, Any] = {
            name: (about.annotation, about)
            for name, about in self.arguments.model_fields.items()
            if not (bound and name == "user")
        }
        if "where" in fields:
            fields["where"] = _where(catalog)
        return create_model(self.name, __base__=Arguments, **fields)


def _check_text(arguments: Mapping[str, Any]) -> None:
    """Refuse half a surrogate pair, which JSON can write and no file or database can hold."""
    try:
        json.dumps(arguments, ensure_ascii=False, default=repr).encode()
    except UnicodeEncodeError as broken:
        raise RequestError(f"a text in the arguments holds what is no character: {broken}") from None


def _where(catalog: Catalog) -> tuple[Any, Any]:
    names = [*catalog.attributes, "title", "text"]
    attribute = Field(description="Name of the attribute.", json_schema_extra={"enum": list(names)})
    condition = create_model("Condition", __base__=Condition, attribute=(str, attribute))
    told = "; ".join(_told(name, about) for name, about in summarise(catalog).items())
    description = "Conditions on attributes, all of which hold." + (f" Attributes: {told}." if told else "")
    bounded = Annotated[list[condition], Field(max_length=MAX_CONDITIONS)]
    return bounded | None, Field(None, description=description)


def _told(name: str, about: Mapping[str, Any]) -> str:
    """Tell a model about an attribute, e.g. ``brand (string: Acme, Dune)``."""
    if about["kind"] == "number" and about["different"]:
        return f"{name} (number from {about['min']} to {about['max']})"
    values = [str(one["value"]) for one in about["frequent"]]
    # A value that is a sentence is nothing to choose by, and cut short it would match nothing.
    values = [value for value in values if len(value) <= LONGEST_EXAMPLE][:EXAMPLES]
    if values and about["different"] > len(values):
        values.append("...")
    return f"{name} ({about['kind']}{': ' if values else ''}{', '.join(values)})"


def where_of(conditions: Sequence[Condition] | None) -> dict[str, dict[str, Any]] | None:
    """Return conditions as the mapping that `Request` takes.

    Raises
    ------
    RequestError
        If two say the same of an attribute.
    """
    where: dict[str, dict[str, Any]] = {}
    for one in conditions or ():
        of_this = where.setdefault(one.attribute, {})
        if one.operator in of_this:
            raise RequestError(
                f"where: two conditions say {one.operator!r} of {one.attribute!r}; give one, with a list of "
                "values for in, all and not"
            )
        takes_list = one.operator in ("in", "all") and not isinstance(one.value, list)
        of_this[one.operator] = [one.value] if takes_list else one.value
    return where or None


def _advice(catalog: Catalog, conditions: Sequence[Condition] | None) -> str:
    """Tell a model why nothing was found, if it wanted values that no item has, and which there are."""
    missing = []
    for one in conditions or ():
        wanted = one.value if isinstance(one.value, list) else [one.value]
        if one.operator not in ("in", "all") or catalog.attributes.get(one.attribute) == "number":
            continue
        counts = catalog.counts(one.attribute)
        frequent = sorted(counts, key=lambda value: -counts[value])[:_COMPARED]
        known = {str(value).lower(): str(value) for value in frequent}
        for value in wanted:
            if value not in counts:
                close = difflib.get_close_matches(str(value).lower(), known, n=3)
                hint = f", but {', '.join(repr(known[name]) for name in close)}" if close else ""
                missing.append(f"no item has {one.attribute} {value!r}{hint}")
    return "; ".join(missing) or "nothing fits all of this; ask for less"


def _recommend(recommender: Recommender, given: Recommend, asker: Asker) -> list[Recommendation]:
    return recommender.recommend(
        Request(
            user=asker.user,
            history=asker.history,
            query=given.query,
            k=given.k or 10,
            where=where_of(given.where),
            exclude=given.exclude or (),
            explain=bool(given.explain),
        )
    )


def _search(recommender: Recommender, given: Search, asker: Asker) -> list[Recommendation]:
    return recommender.search(given.query, asker.user, given.k or 10, where_of(given.where))


def _similar(recommender: Recommender, given: Similar, asker: Asker) -> list[Recommendation]:
    return recommender.similar(given.item_id, given.k or 10, where_of(given.where))


def _rank(recommender: Recommender, given: Rank, asker: Asker) -> list[Recommendation]:
    return recommender.rank(given.item_ids, asker.user, asker.history, given.query)


_VERBS = (
    Verb(
        "recommend",
        "Recommend items to a user, for a history, for a wish in words, or for a wish and one of the others. "
        "Without any of them the answer is what is popular. Suggest only items that come back.",
        Recommend,
        _recommend,
    ),
    Verb(
        "search_items",
        "Find items by words, also those that a user chose before. Use it to turn titles into item ids.",
        Search,
        _search,
    ),
    Verb(
        "similar_items",
        "Find items like one item: by their texts, and by what people chose around it.",
        Similar,
        _similar,
    ),
    Verb(
        "rank_items",
        "Order items that you have already by how well they suit a user, a history or a wish. All come back.",
        Rank,
        _rank,
    ),
)
VERBS: Mapping[str, Verb] = {verb.name: verb for verb in _VERBS}
"""The verbs by name."""


def verb_of(name: object) -> Verb:
    """Return a verb by name; RequestError if there is none."""
    if not isinstance(name, str) or name not in VERBS:
        raise RequestError(f"there is no tool {name!r:.100}; there are {', '.join(VERBS)}")
    return VERBS[name]
