"""What the adapters share: requests, reordering, and the tools of chat models, without any framework."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrec import Event, Item, Recommender, Request
from llmrec.adapters.common import Asker, Defaults, described, reordered
from llmrec.adapters.openai_tools import OpenAITools
from llmrec.adapters.tools import MAX_IDS, MAX_K, VERBS
from llmrec.errors import RequestError, StoreError
from llmrec.testing import toy_data

ITEMS, EVENTS = toy_data()
FRAMEWORKS = ("langchain_core", "llama_index", "haystack")


@pytest.fixture(scope="module")
def rec():
    return Recommender.fit(ITEMS, EVENTS, {"encoder": {"name": "light", "dim": 16}})


@pytest.fixture(scope="module")
def tools(rec):
    return OpenAITools(rec)


def ids(items):
    return [one["item_id"] if isinstance(one, dict) else one.item_id for one in items]


def call(tools, name, **arguments):
    """Dispatch a call; return its items, or the text of its error."""
    answer = json.loads(tools.dispatch(name, json.dumps(arguments)))
    assert set(answer) - {"note"} in ({"items"}, {"error"})
    return answer.get("items", answer.get("error"))


def condition(attribute, operator, value):
    return {"attribute": attribute, "operator": operator, "value": value}


# ---- requests ------------------------------------------------------------------------------------------


def test_a_call_departs_from_the_defaults_and_whoever_it_names_replaces_user_and_history():
    defaults = Defaults("u1", k=3, where={"year": 1990}, rules={"diversity": 0.5})
    assert defaults.request("") == Request(user="u1", k=3, where={"year": 1990}, diversity=0.5)
    assert defaults.request(None, history=["i1"], k=5, where={}, diversity=0.0) == Request(
        history=["i1"], k=5, where={}
    )
    assert Defaults(history=["i1"]).request("x", user="u2") == Request(user="u2", query="x", seen="include")
    assert Defaults(rules={"seen": "exclude"}).request("x").seen == "exclude"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"user": "u1", "history": ["i1"]}, "either user .* or history"),
        ({"k": 0}, "at least 1, got 0"),
        ({"rules": {"colour": "red", "kk": 1}}, "unknown fields of a request: colour, kk; known are user"),
        ({"rules": {"user": "u2"}}, "unknown fields of a request: user"),
        ({"history": "i1"}, "got one string"),
    ],
)
def test_wrong_defaults_are_refused_when_they_are_made(fields, words):
    with pytest.raises(RequestError, match=words):
        Defaults(**fields)


def test_metadata_is_plain_json(rec):
    found = rec.recommend(user="u1", k=2, explain=True)[0]
    about = described(found)
    assert json.loads(json.dumps(about)) == about
    assert about["attributes"]["genres"] == list(found.item.attributes["genres"])
    assert about["reason"] == found.reason.sentence
    assert [tuple(source.values()) for source in about["sources"]] == [
        (s.name, s.rank, s.score) for s in found.sources
    ]


# ---- reordering ----------------------------------------------------------------------------------------


def test_items_known_by_id_are_ranked_as_the_recommender_ranks_them(rec):
    given = ["i7", "i3", "i30", "i3", "i12"]
    order = reordered(rec, [(item_id, "a text that is not read") for item_id in given], "", Asker("u1"))
    expected = ids(rec.rank(["i7", "i3", "i30", "i12"], user="u1"))
    assert list(dict.fromkeys(given[row] for row, _ in order)) == expected
    assert sorted(row for row, _ in order) == [0, 1, 2, 3, 4] and all(0 <= s <= 1 for _, s in order)
    # The two of one item stand together, in the order in which they came.
    rows = [row for row, _ in order]
    assert rows.index(3) == rows.index(1) + 1
    assert reordered(rec, [(i, None) for i in given], "", Asker("u1"), 2) == order[:2]


def test_words_among_them_are_read(rec):
    title = rec.catalog.titles[rec.catalog.code("i5")]
    given = [("nobody's id", "Winter Piano"), (None, title), ("i9", None), ({}, "something else")]
    order = reordered(rec, given, title, Asker())
    assert order[0] == (1, pytest.approx(1.0, abs=1e-5)) and len(order) == 4
    assert [s for _, s in order] == sorted((s for _, s in order), reverse=True)


def test_what_cannot_be_reordered_is_refused(rec):
    assert reordered(rec, [], "", Asker()) == []
    with pytest.raises(RequestError, match="relevant to what"):
        reordered(rec, [("i1", None)], " ", Asker())
    for text in (None, " "):
        with pytest.raises(RequestError, match="document 1 has no text, and its id 'x' is not in"):
            reordered(rec, [("i1", None), ("x", text)], "words", Asker())
    with pytest.raises(RequestError, match="at least 1 document must remain, got 0"):
        reordered(rec, [("i1", None)], "words", Asker(), 0)


# ---- tools: schemas ------------------------------------------------------------------------------------

STRICT = {"type", "properties", "required", "additionalProperties", "description", "enum", "anyOf", "items"}
BOUNDS = {"minimum", "maximum", "minItems", "maxItems"}


def parts(schema):
    """Every schema within a schema."""
    yield schema
    for value in schema.get("properties", {}).values():
        yield from parts(value)
    for value in [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]:
        yield from parts(value)


@pytest.mark.parametrize("user", [None, "u1"])
def test_schemas_are_those_of_strict_mode(rec, user):
    jsonschema = pytest.importorskip("jsonschema")
    openai = pytest.importorskip("openai.lib._pydantic")
    for tool in OpenAITools(rec, user).schemas():
        schema = tool["function"]["parameters"]
        jsonschema.Draft202012Validator.check_schema(schema)
        for part in parts(schema):
            assert set(part) <= STRICT | BOUNDS, part
            if part.get("type") == "object":
                assert part["required"] == list(part["properties"])
                assert part["additionalProperties"] is False
        # OpenAI's own client has nothing to mend.
        mended = openai._ensure_strict_json_schema(json.loads(json.dumps(schema)), path=(), root=schema)
        assert mended == schema
        assert tool["function"]["strict"] is True and tool["type"] == "function"


def test_schemas_bound_lists_and_numbers_and_name_the_attributes(tools):
    recommend, *others = (tool["function"] for tool in tools.schemas())
    assert {recommend["name"], *(o["name"] for o in others)} == set(VERBS)
    properties = recommend["parameters"]["properties"]
    count, nothing = properties["k"]["anyOf"]
    assert (count["minimum"], count["maximum"], nothing) == (1, MAX_K, {"type": "null"})
    assert MAX_K == 100 and properties["history"]["anyOf"][0]["maxItems"] == MAX_IDS
    of = properties["where"]["anyOf"][0]["items"]["properties"]
    assert set(of["attribute"]["enum"]) == {"genres", "year", "brand", "title", "text"}
    years = [item.attributes["year"] for item in ITEMS]
    told = properties["where"]["description"]
    assert f"year (number from {min(years)} to {max(years)})" in told
    assert "brand (string: Acme, Borealis, Corvid, Dune)" in told


def test_the_responses_format_has_the_same_function_one_level_up(tools):
    for chat, flat in zip(tools.schemas(), tools.schemas("responses"), strict=True):
        assert flat == {"type": "function", **chat["function"]}


# ---- tools: calls --------------------------------------------------------------------------------------


def test_calls_answer_as_the_recommender_does(rec, tools):
    assert ids(call(tools, "recommend", user="u1", k=4)) == ids(rec.recommend(user="u1", k=4))
    assert ids(call(tools, "recommend", history=["i4"], query="piano", exclude=["i5"])) == ids(
        rec.recommend(history=["i4"], query="piano", exclude=["i5"])
    )
    assert ids(call(tools, "search_items", query="piano", user="u1")) == ids(rec.search("piano", "u1"))
    assert ids(call(tools, "similar_items", item_id="i4", k=3)) == ids(rec.similar("i4", 3))
    given = ["i9", "i2", "i30"]
    assert ids(call(tools, "rank_items", item_ids=given, user="u1")) == ids(rec.rank(given, "u1"))
    # Strict mode fills what it leaves out with null, other models leave it out, some send nothing at all.
    nothing = dict.fromkeys(VERBS["recommend"].arguments.model_fields)
    popular = ids(rec.recommend())
    assert ids(call(tools, "recommend", **nothing)) == popular
    assert ids(json.loads(tools.dispatch("recommend", ""))["items"]) == popular


def test_an_item_is_told_with_its_attributes_and_on_request_with_a_reason(rec, tools):
    first = call(tools, "recommend", user="u1", k=1, explain=True)[0]
    found = rec.recommend(user="u1", k=1, explain=True)[0]
    assert set(first) == {"item_id", "title", "rank", "score", "attributes", "reason"}
    assert first["reason"] == found.reason.sentence and first["score"] == pytest.approx(found.score, rel=1e-3)
    assert "reason" not in call(tools, "recommend", user="u1", k=1)[0]


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        ([condition("brand", "in", "Acme")], lambda a: a["brand"] == "Acme"),
        ([condition("year", "in", [1994, 2006])], lambda a: a["year"] in (1994, 2006)),
        ([condition("genres", "all", ["Drama", "Crime"])], lambda a: {"Drama", "Crime"} <= {*a["genres"]}),
        ([condition("genres", "all", "Drama")], lambda a: "Drama" in a["genres"]),
        ([condition("genres", "not", ["Drama", "Crime"])], lambda a: not {"Drama", "Crime"} & {*a["genres"]}),
        (
            [
                condition("year", "gte", 1970),
                condition("year", "lt", 1990.5),
                condition("brand", "not", "Acme"),
            ],
            lambda a: 1970 <= a["year"] < 1990.5 and a["brand"] != "Acme",
        ),
        ([condition("brand", "exists", False)], lambda a: False),
    ],
)
def test_conditions_hold(tools, conditions, holds):
    found = call(tools, "recommend", where=conditions, k=100)
    assert set(ids(found)) == {item.item_id for item in ITEMS if holds(item.attributes)}


def test_where_nothing_is_found_a_note_says_what_to_try(tools):
    def note(*where):
        answer = json.loads(tools.dispatch("recommend", json.dumps({"where": where})))
        assert answer["items"] == []
        return answer["note"]

    assert note(condition("brand", "in", ["acmee", "Zz"])) == (
        "no item has brand 'acmee', but 'Acme'; no item has brand 'Zz'"
    )
    assert (
        note(condition("genres", "all", ["Drama", "romanc"])) == "no item has genres 'romanc', but 'Romance'"
    )
    for one in (
        condition("year", "in", 1),
        condition("year", "gt", 3000),
        condition("brand", "exists", False),
    ):
        assert note(one) == "nothing fits all of this; ask for less"
    found = json.loads(tools.dispatch("recommend", "{}"))
    assert found["items"] and "note" not in found


def test_who_is_known_to_ask_is_the_only_one_to_ask(rec):
    bound = OpenAITools(rec, user="u1")
    assert ids(call(bound, "recommend", k=4)) == ids(rec.recommend(user="u1", k=4))
    assert ids(call(bound, "rank_items", item_ids=["i9", "i2"])) == ids(rec.rank(["i9", "i2"], "u1"))
    assert ids(call(bound, "recommend", history=["i4"])) == ids(rec.recommend(history=["i4"]))
    for user in ("u2", None):
        assert "user is no argument here" in call(bound, "recommend", user=user)
    for tool in bound.schemas():
        assert "user" not in tool["function"]["parameters"]["properties"]


def test_what_is_added_later_can_be_asked_for():
    rec = Recommender.fit(ITEMS, EVENTS, {"encoder": {"name": "light", "dim": 16}})
    tools = OpenAITools(rec, names=["recommend"])
    tale = "a tale of many words " * 9
    rec.add_items([Item("new", "Velvet Comet", attributes={"colour": "red", "tale": tale, "pages": 7})])
    rec.add_items([Item("new", "Velvet Comet", attributes={"colour": "red", "tale": tale})])
    assert ids(call(tools, "recommend", where=[condition("colour", "in", "red")])) == ["new"]
    (tool,) = tools.schemas()
    told = tool["function"]["parameters"]["properties"]["where"]["description"]
    assert "colour (string: red); tale (string); pages (number)." in told


def test_where_things_are_concerns_no_language_model(rec, tools, monkeypatch, caplog):
    def closed(user, limit=None):
        raise StoreError("the event store /srv/events.sqlite is closed")

    monkeypatch.setattr(rec, "history", closed)
    answer = json.loads(tools.dispatch("recommend", '{"user": "u1"}'))
    assert answer == {"error": "this cannot be answered just now; the log says why"}
    assert "/srv/events.sqlite" in caplog.text


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("buy", "{}", "there is no tool 'buy'; there are recommend, search_items, similar_items, rank_items"),
        (None, "{}", "there is no tool None"),
        ([], "{}", "there is no tool []"),
        ("recommend", "{", "not valid JSON"),
        ("recommend", None, "arguments are JSON text, got NoneType"),
        ("recommend", "[1]", "must be a JSON object, got [1]"),
        ("recommend", "[" * 100_000, "not valid JSON"),
        ("recommend", '{"k": ' + "9" * 5000 + "}", "not valid JSON"),
        ("recommend", '{"k": NaN}', "NaN is no number"),
        ("recommend", '{"k": 101}', "k: Input should be less than or equal to 100"),
        ("recommend", '{"k": "5"}', "k: Input should be a valid integer"),
        ("recommend", '{"k": 0, "wish": 1}', "greater than or equal to 1; wish: Extra inputs"),
        ("recommend", '{"user": "u1", "history": []}', "give either user"),
        ("recommend", '{"user": "\\ud800"}', "holds what is no character"),
        ("recommend", '{"\\ud800": 1}', "holds what is no character"),
        ("recommend", '{"where": {"brand": "Acme"}}', "where: Input should be a valid list"),
        ("recommend", '{"history": ["x", "y"]}', "2 of 2 item ids are unknown: 'x', 'y'"),
        ("similar_items", "{}", "item_id: Field required"),
        ("similar_items", '{"item_id": "i333"}', "close ids are 'i33'"),
        ("search_items", '{"query": " "}', "search needs words"),
        ("rank_items", '{"item_ids": ["i1", "i1"]}', "given twice"),
    ],
)
def test_a_bad_call_is_told_what_is_wrong(tools, name, arguments, words):
    answer = json.loads(tools.dispatch(name, arguments).encode())
    assert set(answer) == {"error"} and words in answer["error"]


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (condition("yeer", "in", 1), "unknown attribute 'yeer'; known are genres, year, brand"),
        (condition("year", "gte", "old"), "'year' is a number, got 'old'"),
        (condition("year", "in", []), "a list of some of them is needed"),
        (condition("year", "in", {"a": 1}), "a list of some of them is needed"),
        (condition("year", "near", 1), "operator: Input should be 'in', 'not'"),
    ],
)
def test_a_bad_condition_is_told_what_is_wrong(tools, one, words):
    assert words in call(tools, "recommend", where=[one])


def test_two_conditions_that_say_the_same_are_refused(tools):
    where = [condition("genres", "in", "Drama"), condition("genres", "in", "Crime")]
    assert "two conditions say 'in' of 'genres'" in call(tools, "recommend", where=where)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
CONDITION = st.fixed_dictionaries(
    {
        "attribute": st.sampled_from(["genres", "year", "brand", "title", "text", "item_id", "nope"]) | JSON,
        "operator": st.sampled_from(["in", "not", "all", "gte", "gt", "lte", "lt", "exists", "match"]) | JSON,
        "value": JSON,
    }
)
FIELDS = {name: JSON for verb in VERBS.values() for name in verb.arguments.model_fields}
FIELDS |= {"where": st.lists(CONDITION, max_size=3) | JSON, "item_id": st.sampled_from(["i1", "i2"]) | JSON}
FIELDS |= dict.fromkeys(
    ["history", "item_ids", "exclude"], st.lists(st.sampled_from(["i1", "i2", "i3"])) | JSON
)
FIELDS |= {"user": st.sampled_from(["u1", None]) | JSON, "k": st.integers(-1, 102) | JSON}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(VERBS)), data=st.data(), raw=st.none() | st.text(max_size=30))
def test_no_call_of_a_model_raises(tools, name, data, raw):
    fields = {n: FIELDS[n] for n in VERBS[name].arguments.model_fields}
    arguments = data.draw(st.fixed_dictionaries({}, optional=fields) | JSON)
    sent = raw if raw is not None else json.dumps(arguments)
    answer = json.loads(tools.dispatch(name, sent).encode())
    assert (set(answer) == {"error"} and answer["error"]) or set(answer) in ({"items"}, {"items", "note"})


def test_an_unknown_name_of_a_tool_is_refused_when_it_is_offered(rec):
    with pytest.raises(RequestError, match="there is no tool 'buy'"):
        OpenAITools(rec, names=["recommend", "buy"])


def test_a_live_event_counts_in_the_next_call():
    rec = Recommender.fit(ITEMS, [*EVENTS, Event("x", "i0", 1)], {"encoder": {"name": "light", "dim": 16}})
    tools = OpenAITools(rec, user="fresh")
    rec.observe("fresh", "i7")
    assert ids(call(tools, "recommend", k=1)) == ids(rec.recommend(history=["i7"], k=1)) == ["i8"]


# ---- imports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "package"),
    list(zip(("langchain", "llamaindex", "haystack"), FRAMEWORKS, strict=True)),
)
def test_without_its_framework_an_adapter_names_the_extra(module, package):
    code = (
        f"import sys; sys.modules[{package!r}] = None; import llmrec.adapters.openai_tools\n"
        "roots = {m.partition('.')[0] for m in sys.modules}\n"
        f"loaded = sorted(roots & {{*{FRAMEWORKS!r}, 'torch', 'fastapi'}})\n"
        f"assert loaded == [{package!r}], loaded\n"
        f"try: import llmrec.adapters.{module}\n"
        "except ImportError as missing: print(missing)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(f'needs: pip install "llmrec[{module}]"'), done.stdout + done.stderr
