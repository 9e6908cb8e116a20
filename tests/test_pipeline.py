from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.candidates import LM, Calibration, Weights, blend, merge, normalise
from llmrec.encode.light import LightEncoder
from llmrec.families import Texts, TrainingLog
from llmrec.index.faiss_index import FaissIndex
from llmrec.pipeline import Pipeline
from llmrec.protocols import Hits, Query
from llmrec.ranking import top
from llmrec.recipe import Recipe, RetrievalConfig, fit_retrievers
from llmrec.retrieve.lexical import BM25Retriever
from llmrec.retrieve.popularity import PopularityRetriever

N = 30


def codes(values):
    return np.array(values, dtype=np.int32)


def hits_of(scores):
    """Hits from code -> score, best first."""
    order = sorted(scores, key=lambda code: (-scores[code], code))
    return Hits(codes(order), np.array([scores[code] for code in order], np.float32))


class FavouritesScorer:
    """A language model in one dict: code -> score, -5 for all others. Counts what it was asked."""

    name = LM

    def __init__(self, favourites):
        self.favourites, self.asked, self.proposed_for = favourites, [], 0

    def score(self, queries, candidates):
        self.asked.append([c.tolist() for c in candidates])
        return [np.array([self.favourites.get(int(i), -5.0) for i in c], np.float32) for c in candidates]

    def retrieve(self, queries, k):
        self.proposed_for += len(queries)
        scores = np.array([self.favourites.get(i, -5.0) for i in range(N)], np.float32)
        return [top(scores, k, query.mask) for query in queries]


def toy_retrievers():
    rng = np.random.default_rng(0)
    histories = [codes(rng.integers(0, N - 3, rng.integers(2, 12))) for _ in range(50)]
    words = ["red", "blue", "lamp", "shoe", "boat", "steel"]
    lines = [" ".join(rng.choice(words, 2, replace=False)) + f" no{i:02}" for i in range(N)]
    encoder = LightEncoder.fit(lines, dim=16)
    index = FaissIndex(encoder.dim)
    index.add(encoder.encode(lines))
    texts = Texts(lines, encoder.encode(lines), encoder, index)
    return fit_retrievers(TrainingLog(histories), texts, Recipe.default(RetrievalConfig()))


RECIPE = Recipe.default(RetrievalConfig())
RETRIEVERS = toy_retrievers()
PLAIN = Pipeline(RETRIEVERS, RECIPE.history, RECIPE.query, RECIPE.similar)


def with_lm(favourites, weight):
    scorer = FavouritesScorer(favourites)
    return Pipeline(
        {**RETRIEVERS, LM: scorer},
        replace(RECIPE.history, lm=weight),
        replace(RECIPE.query, lm=weight),
        RECIPE.similar,
        scorer,
    )


def score_dict(candidates):
    return dict(zip(candidates.items.tolist(), candidates.scores.tolist(), strict=True))


found = st.dictionaries(st.integers(0, 12), st.sampled_from([-2.0, 0.0, 0.25, 1.0, 7.0]), max_size=8)
weights = st.sampled_from([0.0, 0.25, 0.5, 1.0])
components = st.dictionaries(st.sampled_from(["a", "b", "c", LM]), st.tuples(found, weights))


@settings(max_examples=200, deadline=None)
@given(components, st.randoms(use_true_random=False))
def test_the_merge_equals_a_plain_sum_over_dicts_in_any_order_of_components(parts, random):
    expected: dict[int, float] = {}
    for scores, weight in parts.values():
        low, high = min(scores.values(), default=0), max(scores.values(), default=0)
        for code, score in scores.items():
            scaled = (score - low) / (high - low) if high > low else 1.0
            expected[code] = expected.get(code, 0.0) + weight * scaled
    hits = {name: hits_of(scores) for name, (scores, _) in parts.items()}
    by_name = {name: weight for name, (_, weight) in parts.items()}
    merged = merge(hits, Weights(by_name))
    assert score_dict(merged) == pytest.approx(expected, abs=1e-6)
    assert merged.items.tolist() == sorted(expected, key=lambda c: (-score_dict(merged)[c], c))
    np.testing.assert_allclose(merged.parts.sum(axis=1), merged.scores, atol=1e-6)
    for column, name in enumerate(merged.names):
        ranks = {int(c): place + 1 for place, c in enumerate(hits[name].items)}
        assert merged.ranks[:, column].tolist() == [ranks.get(int(c), 0) for c in merged.items]
    names = list(hits)
    random.shuffle(names)
    shuffled = merge({name: hits[name] for name in names}, Weights(by_name))
    assert score_dict(shuffled) == pytest.approx(score_dict(merged), abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(components, st.data())
def test_the_blend_adds_the_weighted_scaled_score_and_ties_keep_the_merge_order(parts, data):
    weights = Weights({n: w for n, (_, w) in parts.items() if n != LM})
    merged = merge({n: hits_of(s) for n, (s, _) in parts.items()}, weights)
    n = len(merged.items)
    lm = data.draw(st.lists(st.sampled_from([-9.0, -3.0, -1.0]), min_size=n, max_size=n))
    weight = data.draw(st.sampled_from([0.0, 0.5, 3.0]))
    blended = blend(merged, np.array(lm, np.float32), weight)
    span = max(lm, default=0) - min(lm, default=0)
    expected = {
        int(code): float(score) + weight * ((own - min(lm)) / span if span else 1.0)
        for code, score, own in zip(merged.items, merged.scores, lm, strict=True)
    }
    assert score_dict(blended) == pytest.approx(expected, abs=1e-5)
    place = {code: i for i, code in enumerate(merged.items.tolist())}
    scores = score_dict(blended)
    assert blended.items.tolist() == sorted(place, key=lambda code: (-scores[code], place[code]))
    if weight == 0 or not span:
        assert blended.items.tolist() == merged.items.tolist()
    assert blended.names[-1] == LM and blended.names.count(LM) == 1
    if LM in parts:
        ranks = dict(zip(merged.items.tolist(), merged.ranks[:, merged.names.index(LM)], strict=True))
        assert blended.ranks[:, -1].tolist() == [ranks[int(code)] for code in blended.items]


def test_a_tie_in_the_blend_is_broken_by_the_merge_and_then_by_code():
    merged = merge({"a": hits_of({5: 3.0, 2: 2.0, 9: 1.0, 7: 1.0})}, Weights({"a": 1.0}))
    assert merged.items.tolist() == [5, 2, 7, 9]
    tied = blend(merged, np.array([-4.0, -2.0, -4.0, -4.0], np.float32), 0.5)
    assert tied.scores.tolist() == [1.0, 1.0, 0.0, 0.0] and tied.items.tolist() == [5, 2, 7, 9]


def test_a_query_that_no_component_can_use_falls_back_to_popularity_and_words_to_nothing():
    (popular,) = RETRIEVERS["popularity"].retrieve([Query()], N)
    mask = np.arange(N) % 3 == 1
    queries = [Query(), Query(text="zzz"), Query(mask=mask), Query(text="...", mask=mask)]
    plain = [c.items.tolist() for c in PLAIN.recommend(queries, N)]
    assert plain[0] == popular.items.tolist() and plain[2] == [i for i in plain[0] if mask[i]]
    assert plain[1] == plain[3] == []
    candidates = PLAIN.recommend([Query()], 4)[0]
    assert candidates.names == ("popularity",) and candidates.ranks[:, 0].tolist() == [1, 2, 3, 4]
    (nothing,) = PLAIN.recommend([Query(mask=np.zeros(N, bool))], 5)
    assert len(nothing.items) == 0


def test_words_that_no_component_of_the_recipe_finds_are_looked_up_by_meaning():
    class Meanings:
        """What each word means, in one dict."""

        def retrieve(self, queries, k):
            return [hits_of({4: 0.9, 8: 0.4}) if q.text == "lmap" else hits_of({}) for q in queries]

    query = Weights({"bm25": 1.0, "transitions": 0.1})
    pipeline = Pipeline({**RETRIEVERS, "text": Meanings()}, RECIPE.history, query, RECIPE.similar)
    history = codes([1, 2, 3])
    typo, known, unknown = (Query(history, text=words) for words in ("lmap", "lamp", "zzz"))
    meant, found, personal = pipeline.recommend([typo, known, unknown], N)
    # As strong as the strongest, beside what the history finds.
    assert meant.items[0] == 4 and set(personal.items) | {4, 8} == set(meant.items)
    assert dict(zip(meant.names, meant.parts[0], strict=True))["text"] == 1
    assert set(found.names) == set(personal.names) == {"bm25", "transitions"} and len(personal.items)
    assert pipeline.weights_of(known, found) == pipeline.weights_of(unknown, personal) == query
    scores = pipeline.scores([typo], meant.items, pipeline.weights_of(typo, meant))
    np.testing.assert_allclose(scores[0], meant.scores, atol=1e-6)
    (alone,) = pipeline.recommend([Query(text="lmap")], N)
    assert alone.items.tolist() == [4, 8]
    # The caller's own items are ordered as they would be without.
    given = codes([8, 4, 2])
    without = Pipeline(
        {n: r for n, r in RETRIEVERS.items() if n != "text"}, RECIPE.history, query, RECIPE.similar
    )
    assert (pipeline.order(typo, given).items == without.order(typo, given).items).all()
    # A recipe that reads no words is served as it was chosen.
    deaf = replace(pipeline, query=Weights({"transitions": 1.0}))
    assert "text" not in deaf.recommend([typo], N)[0].names


def test_what_has_the_words_least_still_counts_more_than_what_has_none():
    lines = ["red lamp", "a lamp of copper that is not red but old", "boat", "sea"]
    (hits,) = BM25Retriever(lines).retrieve([Query(text="lamp")], 4)
    assert hits.items.tolist() == [0, 1] and hits.least == 0
    near = Hits(codes([2, 0]), np.array([0.9, 0.1], np.float32))
    found = merge({"bm25": hits, "text": near}, Weights({"bm25": 1.0, "text": 0.2}))
    assert found.items.tolist() == [0, 1, 2]
    part = found.parts[1, found.names.index("bm25")]
    assert part == pytest.approx(hits.scores[1] / hits.scores[0]) and 0 < part < 1


def test_popularity_scores_what_words_find_and_proposes_nothing():
    query = Weights({"bm25": 1.0, "popularity": 0.7})
    pipeline = Pipeline(RETRIEVERS, RECIPE.history, query, RECIPE.similar)
    asked = [Query(text="red lamp"), Query(text="zzz"), Query(codes([1, 2]), "boat", np.arange(N) % 2 == 0)]
    found = pipeline.recommend(asked, N)
    scores = RETRIEVERS["popularity"].scores
    for one, query_ in zip(found, asked, strict=True):
        by_words = RETRIEVERS["bm25"].retrieve([query_], N)[0]
        assert set(one.items) == set(by_words.items)
        if not len(by_words.items):
            continue
        words = by_words.scores / by_words.scores.max()
        popular = normalise(scores[by_words.items])
        expected = dict(zip(by_words.items.tolist(), (words + 0.7 * popular).tolist(), strict=True))
        assert score_dict(one) == pytest.approx(expected, abs=1e-6)
        of_these = replace(query_, mask=np.isin(np.arange(N), one.items))
        again = pipeline.scores([of_these], one.items, pipeline.weights_of(query_, one))
        np.testing.assert_allclose(again[0], one.scores, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, N - 1), max_size=6),
    st.sampled_from(["", "red lamp", "no07 boat", "zzz"]),
    st.lists(st.booleans(), min_size=N, max_size=N) | st.none(),
    st.sampled_from([0.0, 0.3, 50.0]),
    st.integers(1, 40),
)
def test_what_comes_out_is_allowed_listed_once_and_at_most_k(history, text, mask, weight, k):
    pipeline = with_lm({4: 3.0, 11: 2.0, 28: 1.0}, weight)
    mask = None if mask is None else np.array(mask)
    (got,) = pipeline.recommend([Query(codes(history), text, mask)], k)
    allowed = np.ones(N, bool) if mask is None else mask
    assert allowed[got.items].all()
    assert len(set(got.items.tolist())) == len(got.items) <= k
    assert np.isfinite(got.scores).all() and (np.diff(got.scores) <= 0).all()
    lines = RETRIEVERS["bm25"].score(text) > 0 if text else np.ones(N, bool)
    assert len(got.items) > 0 or not (allowed & lines).any()
    assert not (text and pipeline.scorer.proposed_for), "for words the model scores, and does not propose"
    for proposed in (items for batch in pipeline.scorer.asked for items in batch):
        assert allowed[proposed].all(), "the model does not even score what may not be returned"


def test_the_favourite_of_a_heavy_language_model_comes_first_and_says_why():
    history = codes([1, 2])
    before = PLAIN.recommend([Query(history)], N)[0].items.tolist()
    for favourite in (before[-1], 29):  # the last of the merge, and one without a single event
        (got,) = with_lm({favourite: 1.0}, 50.0).recommend([Query(history)], N)
        assert got.items[0] == favourite
        column = got.names.index(LM)
        assert got.parts[0, column] == pytest.approx(50) and got.ranks[0, column] == 1
    light = with_lm({before[-1]: 1.0}, 1e-6).recommend([Query(history)], N)[0].items.tolist()
    assert light[:3] == before[:3]


def test_a_language_model_of_weight_zero_is_not_asked():
    pipeline = with_lm({29: 1.0}, 0.0)
    query = Query(codes([1, 2]), "red")
    assert pipeline.recommend([query], N)[0].items.tolist() == PLAIN.recommend([query], N)[0].items.tolist()
    assert pipeline.scorer.asked == []


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_a_batch_equals_its_requests_one_by_one(weight):
    rng = np.random.default_rng(2)
    queries = [
        Query(codes(rng.integers(0, N, n)), text, mask)
        for n in (0, 1, 5)
        for text in ("", "red lamp", "zzz")
        for mask in (None, rng.random(N) < 0.4, np.zeros(N, bool))
    ]
    pipeline = with_lm({4: 3.0, 11: 2.0, 28: 1.0}, weight)
    for query, together in zip(queries, pipeline.recommend(queries, N), strict=True):
        (alone,) = pipeline.recommend([query], N)
        assert score_dict(alone) == pytest.approx(score_dict(together), abs=1e-5)
        assert alone.names == together.names
    assert pipeline.recommend([], 5) == []


@pytest.mark.parametrize("text", ["", "red lamp", "zzz"])
@pytest.mark.parametrize("history", [[], [1, 2], [29]])
@pytest.mark.parametrize("weight", [0.0, 50.0])
def test_order_returns_every_given_item_once(weight, history, text):
    pipeline = with_lm({4: 3.0, 28: 2.0}, weight)
    rng = np.random.default_rng(3)
    for given_items in ([28], [4, 28, 0, 29], [29, 28, 27], rng.permutation(N).tolist()):
        mask = np.isin(np.arange(N), given_items)
        got = pipeline.order(Query(codes(history), text, mask), codes(given_items))
        assert sorted(got.items.tolist()) == sorted(given_items)
        assert len(got.scores) == len(got.parts) == len(got.ranks) == len(given_items)
        if weight and (history or text) and {4, 28} < set(given_items):
            assert got.items[:2].tolist() == [4, 28]
    counted = replace(PLAIN, history=Weights({"transitions": 1.0}))
    mask = np.isin(np.arange(N), [29, 28, 27])
    if history == [1, 2] and not text:
        unknown = replace(counted, depth=3).order(
            Query(codes(history), "", mask | (np.arange(N) == 3)), codes([29, 3, 28, 27])
        )
        assert unknown.items.tolist() == [3, 29, 28, 27], "what no component found comes last, as given"


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_scores_of_given_items_are_those_of_the_answer_and_others_are_on_the_same_scale(weight):
    longer = Weights({"ease": 1.0, "popularity": 0.5}, weight, found={"ease": 0.2}, rank={"ease": 0.3})
    pipeline = with_lm({4: 3.0, 11: 2.0, 28: 1.0}, weight)
    pipeline = replace(pipeline, history=replace(pipeline.history, longer=((3, longer),)), depth=7)
    query = Query(codes([3, 9, 14]), "", np.arange(N) % 5 > 0)
    (found,) = pipeline.recommend([query], N)
    asked = replace(query, mask=np.isin(np.arange(N), found.items))
    shorter = [replace(asked, history=codes(h)) for h in ([3, 14], [3], [])]
    shuffled = np.random.default_rng(0).permutation(len(found.items))
    table = pipeline.scores([asked, *shorter], found.items[shuffled], pipeline.weights_for(query))
    np.testing.assert_allclose(table[0], found.scores[shuffled], atol=1e-6)
    low, high = (f(RETRIEVERS["ease"].retrieve([asked], 7)[0].scores) for f in (np.min, np.max))
    for query, row in zip(shorter, table[1:], strict=True):
        expected = {code: table[0][i] for i, code in enumerate(found.items[shuffled].tolist())}
        for sign, hits in ((-1, RETRIEVERS["ease"].retrieve([asked], 7)[0]),
                           (1, RETRIEVERS["ease"].retrieve([query], 7)[0])):  # fmt: skip
            for rank, (code, raw) in enumerate(zip(hits.items.tolist(), hits.scores, strict=True), start=1):
                own = max((raw - low) / (high - low), 0.0) + 0.2 + 0.3 / np.log2(1 + rank)
                expected[code] += sign * own
        np.testing.assert_allclose(row, list(expected.values()), atol=1e-5)


def test_weights_follow_the_length_of_the_history_and_a_new_user_gets_what_is_popular():
    long = Weights({"ease": 1.0})
    weights = Weights({"popularity": 1.0, "profile": 0.1}, rank={"popularity": -5.0}, longer=((3, long),))
    pipeline = Pipeline(RETRIEVERS, weights, weights, weights)
    asked = [Query(), Query(codes([1, 2])), Query(codes([1, 2, 3]))]
    nobody, short, more = pipeline.recommend(asked, 5)
    assert nobody.names == ("popularity",) and (np.diff(nobody.scores) <= 0).all()
    assert nobody.items.tolist() == RETRIEVERS["popularity"].retrieve([Query()], 5)[0].items.tolist()
    assert set(short.names) == {"popularity", "profile"} and more.names == ("ease",)


def test_who_gave_nothing_gets_what_is_popular_whatever_the_language_model_says():
    pipeline = with_lm({28: 9.0}, 50.0)
    nobody, somebody = pipeline.recommend([Query(), Query(codes([1, 2]))], 5)
    assert nobody.names == ("popularity",) and somebody.items[0] == 28
    assert pipeline.scorer.proposed_for == 1, "proposes for those alone whom it scores"
    assert len(pipeline.scorer.asked) == 1 and len(pipeline.scorer.asked[0]) == 1, "asked for one of the two"


def test_what_an_only_item_of_a_history_changes_is_not_popularity():
    fresh = np.linspace(1, 2, N).astype(np.float32)
    popularity = PopularityRetriever(RETRIEVERS["popularity"].scores, fresh)
    weights = Weights({"popularity": 1.0, "ease": 1.0})
    pipeline = Pipeline({**RETRIEVERS, "popularity": popularity}, weights, weights, weights)
    query = Query(codes([3]))
    with_it, without = pipeline.scores([query, replace(query, history=codes([]))], codes(range(N)), weights)
    (hits,) = RETRIEVERS["ease"].retrieve([query], pipeline.depth)
    expected = np.zeros(N, np.float32)
    expected[hits.items] = normalise(hits.scores)
    np.testing.assert_allclose(with_it - without, expected, atol=1e-6)


def test_what_rounding_tells_apart_counts_the_same():
    once = np.float32(0.6192)
    assert normalise(np.array([once, np.nextafter(once, np.float32(1))], np.float32)).tolist() == [1.0, 1.0]
    assert normalise(np.array([2e-7, 1e-7], np.float32)).tolist() == [1.0, 0.0]


def test_predictions_sum_to_one_and_are_the_prior_where_nothing_is_known():
    prior = RETRIEVERS["popularity"].shares()
    weights = Weights({"ease": 1.0, "profile": 0.5})
    calibration = Calibration(temperature=10.0, mix=0.2)
    pipeline = Pipeline(RETRIEVERS, weights, weights, weights, prior=prior, calibration=calibration)
    p = pipeline.predict([Query(), Query(codes([1, 2, 3]))])
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(p[0], prior, atol=1e-7)
    best = pipeline.recommend([Query(codes([1, 2, 3]))], 1)[0].items[0]
    assert p[1, best] > 1.5 * prior[best]


def test_what_no_component_found_comes_last_also_where_scores_are_below_zero():
    found = {"a": hits_of({0: 1.0, 1: 0.5})}

    class Fixed:
        def __init__(self, hits):
            self.hits = hits

        def retrieve(self, queries, k):
            return [self.hits for _ in queries]

    parts = {name: Fixed(hits) for name, hits in found.items()} | {
        "popularity": Fixed(hits_of({5: 2.0, 1: 1.0}))
    }
    weights = Weights({"a": 0.6}, found={"a": -0.8})
    pipeline = Pipeline(parts, weights, weights, weights)
    query = Query(codes([7]))
    ordered = pipeline.order(query, codes([2, 1, 3, 0]))
    assert ordered.items.tolist() == [0, 1, 2, 3]
    assert (np.diff(ordered.scores) <= 0).all() and ordered.scores[1] < 0
    # What fills a list up is said to be popular, and was not there before.
    merged = pipeline.recommend([query], 10)[0]
    filled = pipeline.filled(query, merged, 9)
    assert filled.items.tolist() == [0, 1, 5]
    assert filled.proposed_by("popularity").tolist() == [0, 0, 1] and filled.scores[2] <= filled.scores[1]
