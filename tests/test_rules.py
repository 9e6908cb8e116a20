from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmrec.catalog import Catalog
from llmrec.errors import RequestError
from llmrec.rules import compile_where
from llmrec.types import Item

ITEMS = [
    Item(
        "1",
        "Toy Story",
        "Toys come alive",
        {"genres": ("Comedy", "Kids"), "year": 1995, "brand": "A", "new": True},
    ),
    Item("2", "Heat", "", {"genres": ("Crime",), "year": 1995, "brand": "a b", "price": 9.5}),
    Item(
        "3", "Alien", "In space", {"genres": ("Horror", "Sci-Fi"), "year": 1979, "new": False, "price": 20.0}
    ),
    Item("4", "C++ in a day", "Learn c++!", {"brand": "B-52", "price": 0.0}),
    Item("5", "Nothing known"),
]
CATALOG = Catalog.load(ITEMS)
FIELDS = {
    "genres": tuple,
    "year": float,
    "price": float,
    "brand": str,
    "new": bool,
    "title": str,
    "item_id": str,
}


def value_of(item, name):
    if name in ("item_id", "title", "text"):
        return getattr(item, name) or None
    return item.attributes.get(name)


def meets(item, where):
    """The grammar, word by word, one item at a time."""
    return all(
        any(meets(item, part) for part in condition)
        if name == "any"
        else holds(value_of(item, name), condition)
        for name, condition in where.items()
    )


def holds(value, condition):
    if isinstance(condition, dict):
        return all(operate(value, operator, operand) for operator, operand in condition.items())
    return any(equals(value, part) for part in (condition if isinstance(condition, list) else [condition]))


def equals(value, wanted):
    return value is not None and (wanted in value if isinstance(value, tuple) else value == wanted)


def operate(value, operator, operand):
    if operator == "not":
        return not holds(value, operand)
    if operator == "exists":
        return (value is not None) == operand
    if value is None:
        return False
    if operator == "in":
        return holds(value, operand)
    if operator == "all":
        return all(equals(value, part) for part in operand)
    if operator == "match":
        texts = value if isinstance(value, tuple) else [value]
        return any(re.search(rf"(?<!\w){re.escape(operand)}(?!\w)", text, re.IGNORECASE) for text in texts)
    return {
        "gte": value >= operand, "gt": value > operand, "lte": value <= operand, "lt": value < operand
    }[operator]  # fmt: skip


VALUES = {
    "genres": st.sampled_from(["Comedy", "Kids", "Crime", "Sci-Fi", "x"]),
    "brand": st.sampled_from(["A", "a b", "B-52", "x"]),
    "title": st.sampled_from(["Heat", "Toy", "Alien"]),
    "item_id": st.sampled_from(["1", "5", "x"]),
    "new": st.booleans(),
    "year": st.sampled_from([1995, 1979, 1994.5, -1, 10**30]),
    "price": st.sampled_from([9.5, 20, 0, 0.5]),
}


def conditions(name):
    value = VALUES[name]
    some = st.lists(value, min_size=1, max_size=3)
    operators = {"in": some, "all": some, "exists": st.booleans()}
    if name in ("year", "price"):
        operators |= dict.fromkeys(("gte", "gt", "lte", "lt"), value)
    if name in ("genres", "brand", "title"):
        operators["match"] = st.sampled_from(
            ["comedy", "sci", "TOY", "a", "b", "toy story", "C++", "52", "eat"]
        )
    plain = value | some | st.fixed_dictionaries({}, optional=operators).filter(bool)
    return plain | st.builds(lambda inner: {"not": inner}, plain)


def wheres(depth=2):
    attributes = st.fixed_dictionaries({}, optional={name: conditions(name) for name in VALUES}).filter(bool)
    if not depth:
        return attributes
    either = st.lists(wheres(depth - 1), min_size=1, max_size=3).map(lambda parts: {"any": parts})
    return attributes | either | st.builds(lambda a, b: a | b, attributes, either)


@settings(max_examples=300, deadline=None)
@given(wheres())
def test_mask_equals_the_grammar_read_item_by_item(where):
    try:
        mask = compile_where(where, CATALOG)
    except RequestError as many:
        assume("at most" not in str(many))
        raise
    assert mask.tolist() == [meets(item, where) for item in ITEMS]


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({"genres": "Comedy"}, "1"),
        ({"genres": ["Crime", "Horror"]}, "23"),
        ({"genres": {"all": ["Horror", "Sci-Fi"]}}, "3"),
        ({"genres": {"not": "Comedy"}}, "2345"),
        ({"genres": {"not": {"in": ["Comedy", "Crime"]}, "exists": True}}, "3"),
        ({"year": {"gte": 1979, "lt": 1995}}, "3"),
        ({"year": 1995.0, "brand": "a b"}, "2"),
        ({"year": np.int64(1995), "new": {"not": np.bool_(True)}}, "2"),
        ({"price": {"gt": np.float32(9)}}, "23"),
        ({"brand": {"exists": False}}, "35"),
        ({"text": {"match": "C++"}}, "4"),
        ({"text": {"exists": True}}, "134"),
        ({"genres": {"match": "sci"}}, "3"),
        ({"title": {"match": "toy  STORY"}}, "1"),
        ({"any": [{"new": True}, {"price": {"gt": 9.5}}, {"any": [{"item_id": "5"}]}]}, "135"),
        ({"new": {"not": True}}, "2345"),
    ],
)
def test_examples(where, ids):
    assert (
        "".join(item.item_id for item, ok in zip(ITEMS, compile_where(where, CATALOG), strict=True) if ok)
        == ids
    )


def test_no_conditions_is_no_mask():
    assert compile_where(None, CATALOG) is None and compile_where({}, CATALOG) is None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"genre": "x"},
            "unknown attribute 'genre'; known are genres, year, brand, new, price, item_id, title, text",
        ),
        ({1: "x"}, "unknown attribute 1"),
        ({"year": {"above": 3}}, "unknown operator 'above' for 'year'; known are in, not, all, gte"),
        (
            {"brand": {"gte": "A"}},
            "gte is for numbers, and dates as 2020-05-31; 'brand' is a string, got 'A'",
        ),
        ({"year": {"gte": "2020-05"}}, "'year' is a number, got '2020-05'"),
        ({"brand": {"gte": "2020"}}, "'brand' is a string, got '2020'"),
        ({"genres": {"in": "x"}}, "in takes a list"),
        ({"genres": {"all": "x"}}, "all takes a list"),
        ({"genres": {"in": []}}, "empty list"),
        ({"genres": {}}, "no operator"),
        ({"genres": 3}, "'genres' is a list of strings, got 3"),
        ({"year": "1995"}, "'year' is a number, got '1995'"),
        ({"year": True}, "'year' is a number, got True"),
        ({"new": 1}, "'new' is a boolean, got 1"),
        ({"brand": None}, "'brand' is a string, got None"),
        ({"year": {"gte": float("nan")}}, "nan"),
        ({"year": {"match": "19"}}, "match is for texts"),
        ({"brand": {"match": " "}}, "match takes a word"),
        ({"brand": {"exists": "yes"}}, "exists takes true or false"),
        ({"any": []}, "any takes a list of mappings"),
        ({"any": {"year": 1995}}, "any takes a list of mappings"),
        ({"any": [{}]}, "empty mapping"),
        ([("year", 1995)], "must be a mapping"),
        ("year", "must be a mapping"),
        ({"brand": [["A"]]}, "got ['A']"),
    ],
)
def test_mistakes_are_request_errors_that_name_what_is_known(where, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        compile_where(where, CATALOG)


def test_deep_nesting_is_refused_before_python_gives_up():
    where = {"year": 1995}
    for _ in range(5000):
        where = {"any": [where]}
    with pytest.raises(RequestError, match="nested"):
        compile_where(where, CATALOG)
    condition = 1995
    for _ in range(5000):
        condition = {"not": condition}
    with pytest.raises(RequestError, match="nested"):
        compile_where({"year": condition}, CATALOG)


def test_hostile_values_match_what_the_catalogue_holds():
    catalog = Catalog.load(
        [Item("\u202e", "<s>", "", {"brand": "[INST]", "any": "x"}), Item("\U00010000", "b")]
    )
    assert compile_where({"title": "<s>", "brand": "[INST]"}, catalog).tolist() == [True, False]
    assert compile_where({"brand": {"match": "[inst]"}}, catalog).tolist() == [True, False]
    assert compile_where({"item_id": "\u202e"}, catalog).tolist() == [True, False]
    assert compile_where({"item_id": "\ud800"}, catalog).tolist() == [False, False]
    assert compile_where({"title": {"match": ".*"}}, catalog).tolist() == [False, False]
    assert compile_where({"any": "x"}, catalog).tolist() == [True, False]
    assert compile_where({"any": [{"any": "x"}, {"item_id": "\U00010000"}]}, catalog).tolist() == [True, True]


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ({"gte": "2020-05"}, "bcdg"),
        ({"gt": "2020-05"}, "dg"),
        ({"lte": "2020-05"}, "abc"),
        ({"lt": "2020-05-31"}, "ab"),
        ({"lte": "2020-05-31"}, "abc"),
        ({"gt": "2020-05-31T10:30"}, "dg"),
        ({"gte": "2020-05-31 10:30", "lt": "2021-01"}, "cg"),
        ({"not": {"gte": "2020-05"}}, "aef"),
        ({"lte": "2020"}, "abcg"),
        ({"gt": 2020}, "d"),
        ({"lt": "2020-06-15"}, "abc"),
        ({"gte": "2020-06-15"}, "dg"),
    ],
)
def test_dates_are_compared_as_far_as_both_go(condition, found):
    dates = ["2019-12-31", "2020-05-01", "2020-05-31T10:30:00", "2021-01-01", "2021-01-01x", None, "2020-06"]
    items = pl.DataFrame({"item_id": list("abcdefg"), "title": "x", "released": dates})
    mask = compile_where({"released": condition}, Catalog.load(items))
    assert "".join(np.array(list("abcdefg"))[mask]) == found


def test_more_conditions_than_a_request_may_cost_are_refused():
    many = {"any": [{"title": f"word{n}"} for n in range(101)]}
    with pytest.raises(RequestError, match="101 conditions"):
        compile_where(many, CATALOG)
    assert compile_where({"any": many["any"][:100]}, CATALOG) is not None
    assert compile_where({"title": [f"word{n}" for n in range(500)]}, CATALOG) is not None
    # Each of these reads the text of every item.
    texts = {"any": [{"title": {"not": {"match": f"word{n}"}}} for n in range(6)]}
    with pytest.raises(RequestError, match="6 times match; at most 5"):
        compile_where(texts, CATALOG)
    assert compile_where({"any": texts["any"][:5]}, CATALOG) is not None
