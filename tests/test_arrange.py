"""No rule is ever broken, whatever the stages before did; caps and MMR equal their plain definitions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrec import Item, Recommender, Request
from llmrec.arrange import PIN, Cap, arrange, pinned
from llmrec.candidates import Candidates, normalise
from llmrec.errors import RequestError
from llmrec.pipeline import Pipeline
from llmrec.testing import toy_data

N = 14


def candidates(items, scores):
    """Candidates of one component, in any order, repeated or not: arranging trusts no earlier stage."""
    n = len(items)
    scores = np.array(scores, np.float32)
    ranks = np.arange(1, n + 1, dtype=np.int32)[:, None]
    return Candidates(np.array(items, np.int32), scores, ("a",), scores[:, None], ranks)


def over_a_cap(chosen, caps, values):
    return any(
        count > limit
        for name, limit in caps.items()
        for count in Counter(v for code in chosen for v in set(values[name][code])).values()
    )


def naive(found, k, allowed, pins, caps, values, diversity, vectors):
    """Word by word: of all that break no rule the one with the best margin, again and again."""
    free = [
        row
        for row, code in enumerate(found.items.tolist())
        if allowed[code] and code not in pins and code not in found.items[:row].tolist()
    ]
    relevance = dict(zip(free, normalise(found.scores[free]).tolist(), strict=True))
    chosen = list(pins)
    while len(chosen) < k:
        open_rows = [r for r in free if found.items[r] not in chosen]
        open_rows = [r for r in open_rows if not over_a_cap([*chosen, int(found.items[r])], caps, values)]
        if not open_rows:
            break

        def margin(row):
            if diversity == 0:
                return -row
            near = max((float(vectors[found.items[row]] @ vectors[c]) for c in chosen), default=0.0)
            return (1 - diversity) * relevance[row] - diversity * near

        chosen.append(int(found.items[max(open_rows, key=margin)]))
    return chosen


@st.composite
def cases(draw):
    n = draw(st.integers(0, 18))
    found = candidates(
        draw(st.lists(st.integers(0, N - 1), min_size=n, max_size=n)),
        draw(st.lists(st.sampled_from([-3.0, 0.0, 0.25, 0.5, 1.0, 9.0]), min_size=n, max_size=n)),
    )
    allowed = np.array(draw(st.lists(st.booleans(), min_size=N, max_size=N)))
    pins = draw(st.lists(st.integers(0, N - 1), max_size=3, unique=True))
    brand = st.sampled_from([(), ("A",), ("B",), ("C",)])
    genres = st.lists(st.sampled_from("xyz"), max_size=3).map(tuple)
    values = {
        name: draw(st.lists(one, min_size=N, max_size=N))
        for name, one in (("brand", brand), ("genres", genres))
    }
    caps = draw(st.fixed_dictionaries({}, optional=dict.fromkeys(values, st.integers(1, 4))))
    k = draw(st.integers(max(1, len(pins)), 20))
    # Whole numbers: sums of products are exact, and ties are ties.
    vectors = np.array(draw(st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=N, max_size=N)))
    diversity = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    return found, k, allowed, pins, caps, values, diversity, vectors.astype(np.float32)


@settings(max_examples=500, deadline=None)
@given(cases())
def test_no_rule_is_broken_and_the_list_equals_the_naive_greedy(case):
    found, k, allowed, pins, caps, values, diversity, vectors = case
    placed = pinned(found, np.array(pins, np.int32))
    by_row = [Cap(name, limit, [values[name][code] for code in placed.items]) for name, limit in caps.items()]
    ask = (placed, k, allowed, len(pins), by_row, diversity, vectors[placed.items])
    if over_a_cap(pins, caps, values):
        with pytest.raises(RequestError, match="pins break other rules: more than"):
            arrange(*ask)
        return
    got = arrange(*ask)
    items = got.items.tolist()
    assert items == naive(found, k, allowed, pins, caps, values, diversity, vectors)
    assert items[: len(pins)] == pins
    assert all(allowed[code] for code in items[len(pins) :])
    assert len(set(items)) == len(items) <= k
    assert not over_a_cap(items, caps, values)
    np.testing.assert_array_equal(got.parts.sum(axis=1), got.scores)
    if pins:
        assert got.ranks[:, got.names.index(PIN)].tolist() == [
            *range(1, len(pins) + 1),
            *[0] * (len(items) - len(pins)),
        ]
    if not pins and not caps and diversity == 0:
        plain = [c for c in dict.fromkeys(found.items.tolist()) if allowed[c]]
        assert items == plain[:k], "the plain order"


# ---- through the recommender -----------------------------------------------------------------------

ITEMS, EVENTS = toy_data()
BY_ID = {item.item_id: item for item in ITEMS}
IDS = [item.item_id for item in ITEMS]


@pytest.fixture(scope="module")
def rec():
    """Hits are taken three at a time, so that most rules leave fewer than k of them at first."""
    made = Recommender.fit(ITEMS, EVENTS, {"encoder": {"name": "light"}, "retrieval": {"depth": 3}})
    made.add_items([Item("bare", "Nothing known")])
    made.remove_items(["i7", "i8"])
    return made


def values_of(item_id, name):
    value = BY_ID[item_id].attributes[name] if item_id in BY_ID else ()
    return value if isinstance(value, tuple) else (value,)


requests = st.fixed_dictionaries(
    {"k": st.integers(1, 45)},
    optional={
        "history": st.lists(st.sampled_from(IDS), max_size=5),
        "query": st.sampled_from(["golden river", "zzz"]),
        "where": st.sampled_from([{"brand": ["Acme", "Dune"]}, {"year": {"gte": 1980}}, {}]),
        "exclude": st.lists(st.sampled_from(IDS), max_size=4),
        "seen": st.sampled_from(["auto", "include", "exclude"]),
        "caps": st.dictionaries(st.sampled_from(["brand", "genres", "year"]), st.integers(1, 3), max_size=2),
        "pins": st.lists(st.sampled_from([*IDS, "bare"]), max_size=2, unique=True),
        "diversity": st.sampled_from([0, 0.3, 1.0]),
    },
).filter(lambda fields: len(fields.get("pins", ())) <= fields["k"])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests)
def test_what_the_recommender_returns_meets_every_rule_and_reaches_k_where_it_can(rec, fields):
    where, exclude = fields.get("where", {}), fields.get("exclude", ())
    pins, caps = fields.get("pins", []), fields.get("caps", {})

    def meets(item_id):
        if item_id in ("i7", "i8") or item_id in exclude:
            return False
        if "year" in where:
            return item_id in BY_ID and BY_ID[item_id].attributes["year"] >= 1980
        return "brand" not in where or set(values_of(item_id, "brand")) & set(where["brand"])

    table = {name: {i: values_of(i, name) for i in [*IDS, "bare"]} for name in ("brand", "genres", "year")}
    if not all(map(meets, pins)) or over_a_cap(pins, caps, table):
        with pytest.raises(RequestError, match="pins break other rules"):
            rec.recommend(**fields)
        return
    found = [r.item_id for r in rec.recommend(**fields)]
    seen = set(fields.get("history", ())) if fields.get("seen") != "include" else set()
    assert found[: len(pins)] == pins
    assert len(set(found)) == len(found) <= fields["k"]
    assert all(map(meets, found)) and not seen & set(found[len(pins) :])
    assert not over_a_cap(found, caps, table)
    if "genres" not in caps:
        # Brand and year alone: each value has room for so many, whatever the order.
        bare = {name: value for name, value in fields.items() if name not in ("caps", "pins", "diversity")}
        all_found = [r.item_id for r in rec.recommend(**{**bare, "k": 99})]
        left = [i for i in all_found if i not in found]
        full = [i for i in left if over_a_cap([*found, i], caps, table)]
        assert len(found) == fields["k"] or full == left


def test_caps_that_leave_no_more_room_end_the_search_for_more(monkeypatch):
    made = Recommender.fit(ITEMS, EVENTS, {"encoder": {"name": "light"}, "retrieval": {"depth": 3}})
    depths, recommend = [], Pipeline.recommend
    monkeypatch.setattr(
        Pipeline,
        "recommend",
        lambda self, queries, k: depths.append(self.depth) or recommend(self, queries, k),
    )
    brands = {item.attributes["brand"] for item in ITEMS}
    for asked in ({"history": ["i3"]}, {"query": "silver", "history": ["i3"]}):
        found = made.recommend(**asked, k=30, caps={"brand": 1})
        assert {r.item.attributes["brand"] for r in found} == brands and len(found) == len(brands)
    assert max(depths) < len(ITEMS), "no further, though there are more items"
    genres = made.recommend(history=["i3"], k=40, caps={"genres": 1})
    assert sum(len(r.item.attributes["genres"]) for r in genres) == len(
        {genre for r in genres for genre in r.item.attributes["genres"]}
    )


def test_a_seen_pin_takes_no_place_from_what_is_left(rec):
    left = ["i1", "i2"]
    rest = [i for i in [*IDS, "bare"] if i not in (*left, "i3", "i7", "i8")]
    found = rec.recommend(history=["i3"], k=3, pins=["i3"], exclude=rest)
    assert [r.item_id for r in found][:1] == ["i3"] and {r.item_id for r in found} == {"i3", *left}


def test_pins_change_nothing_but_the_place_and_a_seen_item_may_be_pinned(rec):
    plain = rec.recommend(history=["i3", "i4"], k=6)
    ids = [r.item_id for r in plain]
    found = rec.recommend(history=["i3", "i4"], k=6, pins=["i3", ids[2]])
    assert [r.item_id for r in found] == ["i3", ids[2], ids[0], ids[1], ids[3], ids[4]]
    scores = {r.item_id: r.score for r in plain}
    assert all(r.score == scores[r.item_id] for r in found if r.item_id != "i3")
    assert [(s.name, s.rank) for s in found[0].sources] == [(PIN, 1)]
    assert {s.name for s in plain[2].sources} < {s.name for s in found[1].sources}


def test_a_list_with_diversity_is_less_alike():
    rec = Recommender.fit(ITEMS, EVENTS, {"encoder": {"name": "light"}})

    def alike(diversity):
        codes = rec.catalog.codes([r.item_id for r in rec.recommend(user="u1", k=8, diversity=diversity)])
        vectors = rec._state.texts.vectors[codes]
        return np.triu(vectors @ vectors.T, 1).sum()

    assert alike(0.9) < alike(0.5) < alike(0)


def test_the_rules_hold_in_every_stage_and_for_many_requests(rec):
    request = Request(user="u2", k=4, caps={"brand": 1}, pins=["i9"])
    for found in [*rec.stages(request).values(), *rec.recommend_many([request, Request(user="u2", k=9)])]:
        brands = [r.item.attributes["brand"] for r in found]
        assert found[0].item_id == "i9" or len(found) == 9
        assert len(found) == 9 or len(set(brands)) == len(brands) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"caps": {"colour": 2}}, "caps: unknown attribute 'colour'; known are genres, year, brand, item_id"),
        ({"caps": {"brand": 0}}, "a cap is a whole number of at least 1, got 'brand': 0"),
        ({"caps": {"brand": True}}, "got 'brand': True"),
        ({"caps": ["brand"]}, 'caps must be a mapping such as {"brand": 2}'),
        ({"pins": "i1"}, "pins must be a list of item ids, got one string"),
        ({"pins": ["i1", "i1"]}, "pinned twice"),
        ({"pins": ["nope"]}, "unknown: 'nope'"),
        ({"pins": ["i1", "i2"], "k": 1}, "2 pins do not fit into k = 1"),
        (
            {"pins": ["i7", "i5", "bare"], "exclude": ["i5"], "where": {"brand": {"exists": True}}},
            "'i7' was removed from the catalogue; 'i5' is in exclude; 'bare' does not meet where; leave",
        ),
        ({"pins": ["i0", "i4"], "caps": {"brand": 1}}, "more than 1 of them have brand 'Acme'"),
        ({"diversity": 1.1}, "diversity must be a number from 0 to 1, got 1.1"),
        ({"diversity": float("nan")}, "got nan"),
        ({"diversity": True}, "got True"),
        ({"explain": 1}, "explain must be True or False, got 1"),
    ],
)
def test_mistakes_are_request_errors_that_say_what_to_do(rec, fields, message):
    with pytest.raises(RequestError) as caught:
        rec.recommend(user="u1", **fields)
    assert message in str(caught.value)
