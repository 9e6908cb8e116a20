"""Seeds: popular, unlike each other, nearer with each choice; and what newcomers get before any choice."""

import itertools

import numpy as np
import pytest

from llmrec import Event, Item, Recommender
from llmrec.errors import RequestError
from llmrec.protocols import Query
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.seeds import spread
from llmrec.testing import toy_data

LIGHT = {"encoder": {"name": "light", "dim": 16}}
WORDS = {
    "sea": "ship sailor harbour wave storm island",
    "space": "rocket planet alien star orbit comet",
    "love": "heart kiss wedding letter dance summer",
    "crime": "detective murder police thief bank trial",
}
SIZE = 12


def ids(found):
    return [r.item_id for r in found]


@pytest.fixture(scope="module")
def genres():
    """Four kinds of films, each a text of its own; the first of each kind are the popular ones."""
    rng = np.random.default_rng(4)
    items, events = [], []
    for kind, words in WORDS.items():
        for n in range(SIZE):
            chosen = " ".join(rng.choice(words.split(), 4, replace=False))
            items.append(Item(f"{kind}{n}", f"{kind} {n}", text=chosen))
    for user, kind in enumerate(list(WORDS) * 12):
        liked = rng.choice(SIZE, 5, replace=False, p=np.arange(SIZE, 0, -1) / (SIZE * (SIZE + 1) / 2))
        events += [Event(f"u{user}", f"{kind}{n}", 1000 * user + t) for t, n in enumerate(liked)]
    return Recommender.fit(items, events, LIGHT)


def kind_of(item_id):
    return item_id.rstrip("0123456789")


def mean_cosine(rec, item_ids):
    vectors = rec.texts.vectors[rec.catalog.codes(item_ids)]
    return np.mean([a @ b for a, b in itertools.combinations(vectors, 2)])


def counts(rec):
    popularity = rec._state.retrievers["popularity"].scores
    return {item_id: float(np.expm1(popularity[rec.catalog.code(item_id)])) for item_id in rec.catalog.ids}


def test_each_step_takes_what_adds_most_to_the_covered_weight():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = rng.random(30).astype(np.float32)

    def covered(rows, near=()):
        """The definition, in loops."""
        total = 0.0
        for i in range(30):
            best = max(
                [float(vectors[i] @ vectors[j]) for j in rows] + [float(vectors[i] @ v) for v in near] + [0]
            )
            total += float(weights[i]) * min(best, 1.0)
        return total

    for near in ((), vectors[:2]):
        rows, gains = spread(vectors, weights, 6, np.array(near) if len(near) else None)
        assert len(set(rows)) == 6 and (np.diff(gains) <= 1e-6).all()
        for step, (row, gain) in enumerate(zip(rows, gains, strict=True)):
            before = rows[:step]
            every = {j: covered([*before, j], near) for j in range(30) if j not in before}
            assert every[row] == pytest.approx(max(every.values()), abs=1e-4)
            assert gain == pytest.approx(every[row] - covered(before, near), abs=1e-4)
    # Greedy keeps at least 1 - 1/e of the best set.
    rows, _ = spread(vectors[:10], np.pad(weights[:10], (0, 0)), 3)
    pairs = np.clip(vectors[:10] @ vectors[:10].T, 0, 1)
    value = {s: weights[:10] @ pairs[:, list(s)].max(axis=1) for s in itertools.combinations(range(10), 3)}
    assert value[tuple(sorted(rows))] >= (1 - 1 / np.e) * max(value.values())


def test_seeds_are_popular_and_more_unlike_each_other_than_the_most_popular_are(genres):
    found = ids(genres.seeds(4))
    assert {kind_of(one) for one in found} == set(WORDS), "one of each kind"
    popular = ids(genres.recommend(k=4))
    assert mean_cosine(genres, found) < mean_cosine(genres, popular)
    events = counts(genres)
    assert np.mean([events[one] for one in found]) > 1.3 * np.mean(list(events.values()))
    scores = [r.score for r in genres.seeds(4)]
    assert scores == sorted(scores, reverse=True) and [r.rank for r in genres.seeds(4)] == [1, 2, 3, 4]


def test_a_choice_narrows_and_what_was_passed_over_stays_away(genres):
    first = ids(genres.seeds(4))
    liked = next(one for one in first if kind_of(one) == "space")
    after = ids(genres.seeds(4, chosen=[liked]))
    assert liked not in after
    assert sum(kind_of(one) == "space" for one in after) > sum(kind_of(one) == "space" for one in first)
    passed = [one for one in first if kind_of(one) != "sea"]
    rest = ids(genres.seeds(4, passed=passed))
    assert not set(passed) & set(rest)
    assert kind_of(rest[0]) == "sea", "the one kind that nothing of was turned down"
    assert ids(genres.seeds(3, chosen=[liked], where={"title": {"match": "sea"}})) and all(
        kind_of(one) == "sea"
        for one in ids(genres.seeds(3, chosen=[liked], where={"title": {"match": "sea"}}))
    )


def test_what_cannot_be_is_refused_and_removed_items_are_no_seeds():
    rec = Recommender.fit(*toy_data(), LIGHT)
    for wrong, words in (
        ({"chosen": ["i1"], "passed": ["i1"]}, "both chosen and passed"),
        ({"chosen": ["nowhere"]}, "unknown"),
        ({"passed": ["nowhere"]}, "unknown"),
        ({"k": 0}, "at least 1"),
        ({"where": {"colour": "red"}}, "colour"),
    ):
        with pytest.raises(RequestError, match=words):
            rec.seeds(**wrong)
    first = ids(rec.seeds(5))
    rec.remove_items(first)
    assert not set(first) & set(ids(rec.seeds(5)))
    assert len(rec.seeds(100)) == len(rec.catalog) - 5
    assert rec.seeds(3, where={"year": {"gt": 3000}}) == []


# ---- popular of late -------------------------------------------------------------------------------------

DAY = 86_400


def log_of(rng, days, draw):
    """One event a tenth of a day; `draw(day)` gives the item."""
    stamps = np.arange(10 * days, dtype=np.int64) * DAY // 10
    return np.array([draw(t // DAY) for t in stamps], np.int32), stamps


def top_of(retriever, k):
    (hits,) = retriever.retrieve([Query()], k)
    return hits.items.tolist()


def test_newcomers_get_what_is_popular_now_where_tastes_change():
    rng = np.random.default_rng(2)
    # Items 0 to 4 for two years, then items 5 to 9 for the last five months.
    items, stamps = log_of(rng, 880, lambda day: rng.integers(0, 5) if day < 730 else rng.integers(5, 10))
    fitted = PopularityRetriever.fit([items], 20, None, [stamps])
    assert set(top_of(fitted, 5)) == {5, 6, 7, 8, 9}
    (asked,) = fitted.retrieve([Query(np.array([3], np.int32))], 5)
    assert set(asked.items.tolist()) == {0, 1, 2, 3, 4}, "who has a history is compared with all time"
    again = PopularityRetriever.from_arrays(fitted.arrays()).grown(25)
    assert top_of(again, 5) == top_of(fitted, 5)
    assert top_of(PopularityRetriever.fit([items], 20), 5) == sorted(
        range(5), key=lambda i: -np.sum(items == i)
    )


def test_one_date_in_the_future_changes_nothing_for_newcomers():
    rng = np.random.default_rng(2)
    items, stamps = log_of(rng, 880, lambda day: rng.integers(0, 5) if day < 730 else rng.integers(5, 10))
    ahead = PopularityRetriever.fit([np.append(items, 19)], 20, None, [np.append(stamps, 4_102_444_800)])
    assert set(top_of(ahead, 5)) == {5, 6, 7, 8, 9} and 19 not in top_of(ahead, 10)


def test_newcomers_get_what_is_popular_of_all_time_where_tastes_stay():
    rng = np.random.default_rng(3)
    p = np.arange(20, 0, -1) / 210
    items, stamps = log_of(rng, 800, lambda day: rng.choice(20, p=p))
    fitted = PopularityRetriever.fit([items], 20, None, [stamps])
    by_count = sorted(range(20), key=lambda i: -int(np.sum(items == i)))
    assert top_of(fitted, 20) == by_count
    # Its scores are the counts, up to one pseudo-event an item.
    shares = (np.bincount(items, minlength=20) + 1) / (len(items) + 20)
    assert np.expm1(fitted.fresh) == pytest.approx(
        len(items) * (shares + np.bincount(items, minlength=20) / len(items)) / 2, rel=1e-4
    )


def test_the_order_of_users_in_a_log_means_nothing_for_what_is_recent():
    rng = np.random.default_rng(5)
    items, stamps = log_of(rng, 400, lambda day: rng.integers(0, 5) if day < 360 else rng.integers(5, 10))
    halves = [slice(0, None, 2), slice(1, None, 2)]
    fits = [
        PopularityRetriever.fit([items[h] for h in order], 12, None, [stamps[h] for h in order]).fresh
        for order in (halves, halves[::-1])
    ]
    np.testing.assert_allclose(fits[0], fits[1], rtol=1e-5)
