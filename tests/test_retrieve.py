from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from llmrec import ranking
from llmrec.encode.light import LightEncoder
from llmrec.families import Texts, TrainingLog
from llmrec.index.faiss_index import FaissIndex
from llmrec.protocols import Query
from llmrec.ranking import top, top_of_rows
from llmrec.recipe import (
    Recipe,
    RetrievalConfig,
    fit_retrievers,
    load_retrievers,
    retriever_arrays,
)
from llmrec.retrieve.dense import ProfileConfig, ProfileRetriever, TextQueryRetriever
from llmrec.retrieve.lexical import BM25Retriever
from llmrec.retrieve.linear import EASEConfig, EASERetriever, user_item_matrix
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.retrieve.transitions import TransitionsConfig, TransitionsRetriever

N = 40
WORDS = [
    "red",
    "blue",
    "green",
    "old",
    "new",
    "small",
    "large",
    "steel",
    "wood",
    "glass",
    "lamp",
    "chair",
    "table",
    "knife",
    "shoe",
    "boat",
    "train",
    "clock",
]


def codes(values):
    return np.array(values, dtype=np.int32)


def logs(seed=0, users=60, n_items=N - 4):
    """Histories with repeats and an empty one; the last four items of the catalogue have no events."""
    rng = np.random.default_rng(seed)
    favourites = rng.integers(0, n_items, (users, 4))
    return [
        codes(np.where(rng.random(n) < 0.4, rng.choice(f, n), rng.integers(0, n_items, n)))
        for f, n in zip(favourites, [0, 1, 2, *rng.integers(3, 15, users - 3)], strict=True)
    ]


def catalogue(n=N):
    """Lines of three to five words, the last of them unique; one item has no words at all."""
    rng = np.random.default_rng(5)
    lines = [" ".join(rng.choice(WORDS, rng.integers(2, 5), replace=False)) + f" no{i:03}" for i in range(n)]
    lines[3] = "..."
    return lines


def texts_of(lines, encoder):
    vectors = encoder.encode(lines)
    index = FaissIndex(encoder.dim)
    index.add(vectors)
    return Texts(lines, vectors, encoder, index)


HISTORIES = logs()
RECIPE = Recipe.default(RetrievalConfig())
TEXTS = texts_of(catalogue(), LightEncoder.fit(catalogue(), dim=24))
RETRIEVERS = fit_retrievers(TrainingLog(HISTORIES), TEXTS, RECIPE)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_top_equals_a_plain_sort_with_ties_by_code(data):
    values = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), max_size=12))
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    k, floor = data.draw(st.integers(1, 14)), data.draw(st.sampled_from([-np.inf, 0.0]))
    allowed = [c for c, v in enumerate(values) if v > floor and (mask is None or mask[c])]
    expected = sorted(allowed, key=lambda c: (-values[c], c))[:k]
    hits = top(np.array(values, np.float32), k, None if mask is None else np.array(mask, bool), floor)
    assert hits.items.tolist() == expected and hits.scores.tolist() == [values[c] for c in expected]


# EASE


def naive_ease(histories, n, l2, fit_decay):
    """Steck's closed form in float64: X, then P = (X'X + l2 I)^-1, then B = -P / diag(P) without diagonal."""
    x = np.zeros((len(histories), n))
    for user, history in enumerate(histories):
        for age, item in enumerate(reversed(history.tolist())):
            x[user, item] = max(x[user, item], fit_decay**age)
    p = np.linalg.inv(x.T @ x + l2 * np.eye(n))
    b = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            b[i, j] = 0.0 if i == j else -p[i, j] / p[j, j]
    return b


def naive_profile(history, decay):
    """Weight of each item in a history: that of its latest event."""
    weights = {}
    for age, item in enumerate(reversed(history.tolist())):
        weights.setdefault(item, decay**age)
    return weights


@pytest.mark.parametrize(("fit_decay", "decay"), [(1.0, 1.0), (0.8, 0.9), (0.5, 0.6)])
def test_ease_equals_the_closed_form(fit_decay, decay):
    config = EASEConfig(l2=3.0, fit_decay=fit_decay, decay=decay)
    ease = EASERetriever.fit(HISTORIES, N, config)
    b = naive_ease(HISTORIES, N, 3.0, fit_decay)
    np.testing.assert_array_equal(ease.items, np.arange(N - 4))
    np.testing.assert_allclose(ease.weights.toarray(), b[: N - 4, : N - 4], atol=2e-6)
    asked = [*HISTORIES[1:12], codes([7, 3, 7, 7, 1]), codes([N - 1, 2]), codes([N - 1])]
    for history in asked:
        expected = sum(w * b[i] for i, w in naive_profile(history, decay).items())
        np.testing.assert_allclose(ease.score(history), expected, atol=5e-6)
        (hits,) = ease.retrieve([Query(history)], 5)
        assert hits.items.tolist() == [int(i) for i in np.argsort(-expected)[:5] if expected[i] > 1e-9]
    other = ease.with_decay(0.3)
    np.testing.assert_array_equal(other.weights.toarray(), ease.weights.toarray())
    expected = sum(w * b[i] for i, w in naive_profile(asked[0], 0.3).items())
    np.testing.assert_allclose(other.score(asked[0]), expected, atol=5e-6)


def test_ease_keeps_the_largest_weights_of_each_item():
    b = naive_ease(HISTORIES, N, 3.0, 1.0)[: N - 4, : N - 4]
    kept = EASERetriever.fit(HISTORIES, N, EASEConfig(l2=3.0, keep=3)).weights.toarray()
    for row in range(N - 4):
        largest = np.argsort(-np.abs(b[row]))[:3]
        assert np.flatnonzero(kept[row]).tolist() == sorted(largest.tolist())
        np.testing.assert_allclose(kept[row, largest], b[row, largest], atol=2e-6)
    full = EASERetriever.fit(HISTORIES, N, EASEConfig(l2=3.0, keep=N - 4)).weights.toarray()
    np.testing.assert_allclose(full, b, atol=2e-6)


@pytest.mark.parametrize("max_items", [N, 5])
def test_texts_count_in_ease_like_users_that_have_every_item_to_some_degree(max_items):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(N, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config = EASEConfig(l2=3.0, text=4.0, max_items=max_items, neighbours=N)
    model = EASERetriever.fit(HISTORIES, N, config, vectors=vectors)
    x = np.concatenate([user_item_matrix(HISTORIES, N, 1.0).toarray(), 2.0 * vectors.T])
    # The last four items have no events: solved together they have weights by their texts alone.
    assert model.items.tolist() == list(range(N if max_items == N else N - 4))
    kept = model.weights.toarray()
    for item in range(0, len(model.items), 3):
        on = np.delete(model.items, item) if max_items == N else np.flatnonzero(kept[:, item])
        ridge = Ridge(alpha=3.0, fit_intercept=False).fit(x[:, on], x[:, item])
        np.testing.assert_allclose(kept[on, item], ridge.coef_, atol=1e-4)
    without = EASERetriever.fit(HISTORIES, N, config.model_copy(update={"text": 0.0}), vectors=vectors)
    plain = EASERetriever.fit(HISTORIES, N, config)
    np.testing.assert_array_equal(without.weights.toarray(), plain.weights.toarray())


def test_ease_among_all_neighbours_is_ease():
    for decay in (1.0, 0.8):
        whole = EASERetriever.fit(HISTORIES, N, EASEConfig(l2=3.0, fit_decay=decay)).weights.toarray()
        config = EASEConfig(l2=3.0, fit_decay=decay, max_items=5, neighbours=N)
        near = EASERetriever.fit(HISTORIES, N, config)
        # An item that never stood with another has no weight; in EASE it may have one through others.
        there = near.weights.toarray() != 0
        assert there.mean() > 0.5
        gram = user_item_matrix(HISTORIES, N, decay)
        gram = (gram.T @ gram).toarray()[: N - 4, : N - 4]
        together = (gram > 0).sum(axis=0) == N - 4
        for column in np.flatnonzero(together):
            np.testing.assert_allclose(near.weights.toarray()[:, column], whole[:, column], atol=1e-4)


def test_ease_among_few_neighbours_is_ridge_regression_on_them():
    config = EASEConfig(l2=2.0, max_items=5, neighbours=6)
    model = EASERetriever.fit(HISTORIES, N, config)
    x = user_item_matrix(HISTORIES, N, 1.0).toarray()[:, : N - 4]
    gram = x.T @ x
    for item in range(0, N - 4, 5):
        cosine = gram[item] / np.maximum(np.sqrt(np.diag(gram)), 1e-9)
        cosine[item] = 0
        near = [i for i in np.argsort(-cosine, kind="stable")[:6] if cosine[i] > 0]
        column = model.weights.toarray()[:, item]
        chosen = np.flatnonzero(column)
        assert cosine[chosen].min(initial=9) >= cosine[near].min(initial=9) - 1e-9
        ridge = Ridge(alpha=2.0, fit_intercept=False).fit(x[:, chosen], x[:, item])
        np.testing.assert_allclose(column[chosen], ridge.coef_, atol=1e-4)


# Transitions


def naive_transitions(histories, n, c):
    counts = np.zeros((n, n))
    for history in histories:
        for i in range(len(history)):
            for j in range(i + 1, min(i + c.window, len(history) - 1) + 1):
                if history[i] != history[j]:
                    counts[history[i], history[j]] += c.step_decay ** (j - i - 1)
                    counts[history[j], history[i]] += c.backward * c.step_decay ** (j - i - 1)
    out = counts.sum(axis=1, keepdims=True) + c.smoothing
    return np.divide(counts, out, out=np.zeros_like(counts), where=out > 0)


@pytest.mark.parametrize(
    "config",
    [
        TransitionsConfig(),
        TransitionsConfig(window=1, backward=0.0, smoothing=0.0, decay=1.0),
        TransitionsConfig(window=3, step_decay=0.5, backward=1.0, smoothing=20.0, decay=0.9),
        TransitionsConfig(window=500, step_decay=1.0, backward=0.2),
    ],
)
def test_transitions_equal_plain_loops(config):
    model = TransitionsRetriever.fit(HISTORIES, N, config)
    expected = naive_transitions(HISTORIES, N, config)
    np.testing.assert_allclose(model.matrix.toarray(), expected, atol=1e-6)
    for history in (*HISTORIES[1:8], codes([4, 4, 9, 4]), codes([N - 1])):
        scores = sum(config.decay**age * expected[i] for age, i in enumerate(reversed(history.tolist())))
        np.testing.assert_allclose(model.score(history), scores, atol=2e-6)
    history = HISTORIES[9]
    scores = sum(0.4**age * expected[i] for age, i in enumerate(reversed(history.tolist())))
    np.testing.assert_allclose(model.with_decay(0.4).score(history), scores, atol=2e-6)


def test_events_out_of_reach_move_a_score_by_less_than_a_thousandth():
    model = TransitionsRetriever.fit(HISTORIES, N, TransitionsConfig(decay=0.7))
    matrix = model.matrix.toarray().astype(np.float64)
    history = codes(np.random.default_rng(1).integers(0, N - 4, 300))
    exact = sum(0.7**age * matrix[i] for age, i in enumerate(reversed(history.tolist())))
    np.testing.assert_allclose(model.score(history), exact, atol=1e-3 * exact.max())


@pytest.mark.parametrize("histories", [[], [codes([])], [codes([2])], [codes([2, 2])]])
def test_a_log_without_a_pair_of_items_proposes_nothing_but_what_is_popular(histories):
    query = Query(codes([2, 1]))
    for model in (
        EASERetriever.fit(histories, 5, EASEConfig()),
        TransitionsRetriever.fit(histories, 5, TransitionsConfig()),
    ):
        assert len(model.retrieve([query], 3)[0].items) == 0
    counts = Counter(int(i) for h in histories for i in h)
    (hits,) = PopularityRetriever.fit(histories, 5).retrieve([query], 5)
    assert hits.items.tolist() == sorted(range(5), key=lambda i: (-counts[i], i))


def test_popularity_is_the_log_of_the_count_ties_by_code():
    counts = Counter(int(i) for h in HISTORIES for i in h)
    (hits,) = RETRIEVERS["popularity"].retrieve([Query()], N)
    assert hits.items.tolist() == sorted(range(N), key=lambda i: (-counts[i], i))
    np.testing.assert_allclose(hits.scores, [math.log(1 + counts[i]) for i in hits.items], rtol=1e-6)


# Dense


def test_the_profile_is_ranked_by_cosine_with_the_weighted_mean():
    profile = ProfileRetriever(TEXTS.vectors, TEXTS.index, ProfileConfig(decay=0.6))
    vectors = TEXTS.vectors.astype(np.float64)
    for history in (*HISTORIES[1:10], codes([3, 8, 8])):
        mean = sum(0.6**age * vectors[i] for age, i in enumerate(reversed(history.tolist())))
        cosine = vectors @ mean / np.linalg.norm(mean)
        (hits,) = profile.retrieve([Query(history)], 10)
        assert hits.items.tolist() == np.argsort(-cosine, kind="stable")[:10].tolist()
        np.testing.assert_allclose(hits.scores, cosine[hits.items], atol=1e-5)


def test_the_text_retriever_finds_the_item_whose_line_is_the_query():
    text = TextQueryRetriever(TEXTS.encoder, TEXTS.index)
    asked = [i for i in range(N) if i != 3]
    hits = text.retrieve([Query(text=TEXTS.lines[i].upper()) for i in asked], 1)
    assert [h.items.tolist() for h in hits] == [[i] for i in asked]
    np.testing.assert_allclose([h.scores[0] for h in hits], 1, atol=1e-5)


# BM25


def naive_bm25(lines, query, k1=1.5, b=0.75):
    """The variant of Lucene: idf = log(1 + (n - df + .5) / (df + .5)), tf without (k1 + 1)."""
    documents = [re.findall(r"\w\w+", line.lower()) for line in lines]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(lines))
    for word in re.findall(r"\w\w+", query.lower()):
        df = sum(word in document for document in documents)
        for i, document in enumerate(documents):
            tf = document.count(word)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
    return scores


@pytest.mark.parametrize(
    "query", ["red", "red lamp of steel", "Glass, CLOCK; no007!", "boat boat train", "no039"]
)
def test_bm25_equals_the_formula_of_lucene(query):
    lines = [*catalogue(), "red red red lamp", "lamp", ""]
    expected = naive_bm25(lines, query.replace(" of", ""))
    (hits,) = BM25Retriever(lines).retrieve([Query(text=query)], len(lines))
    assert sorted(hits.items.tolist()) == np.flatnonzero(expected).tolist() and len(hits.items)
    np.testing.assert_allclose(hits.scores, np.sort(expected)[::-1][: len(hits.items)], rtol=1e-5)
    np.testing.assert_allclose(hits.scores, expected[hits.items], rtol=1e-5)


@pytest.mark.parametrize(
    ("lines", "query", "expected"),
    [
        (["red lamp", "blue lamp"], "zebra", []),
        (["red lamp", "blue lamp"], "zebra blue", [1]),
        (["red lamp", "blue lamp"], "?! ...", []),
        (["red lamp", "blue lamp"], "the of and", []),
        (["", "red lamp", ""], "red", [1]),
        (["only one"], "one", [0]),
        (["only one"], "two", []),
        (["", ""], "red", []),
        (["...", "!?"], "red", []),
        ([], "red", []),
    ],
)
def test_bm25_copes_with_texts_and_queries_without_words(lines, query, expected):
    assert BM25Retriever(lines).retrieve([Query(text=query)], 5)[0].items.tolist() == expected


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("日本語", 0),
        ("語", 0),
        ("カメラ", 1),
        ("creme", 2),
        ("crème", 2),
        ("किताब", 3),
        ("เด็ก", 4),
        ("ps 4", 6),
    ],
)
def test_words_of_many_scripts_are_found_inside_titles(query, found):
    eastern = ["やさしい日本語の本", "デジタルカメラ入門"]
    lines = [*eastern, "Crème Brûlée", "हिन्दी किताब", "หนังสือเด็ก", "PS 3", "PS 4"]
    best = BM25Retriever(lines).retrieve([Query(text=query)], len(lines))[0].items
    assert best[0] == found
    light = LightEncoder.fit(lines, dim=7)
    near = light.encode(lines) @ light.encode([query])[0]
    assert near.argmax() == found


def test_bm25_of_a_catalogue_that_grows_is_near_that_of_a_new_index_until_it_is_one(monkeypatch):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(400)]
    old = BM25Retriever(lines)
    before = old.score("red steel")
    grown = old
    for n in range(30):
        lines = [*lines, " ".join(rng.choice([*WORDS, "zeppelin"], 6))]
        if n % 3 == 0:
            lines[7 * n] = "zeppelin " + lines[7 * n]
        grown = grown.grown(lines)
    fresh, first = BM25Retriever(lines), 400
    for query in ("red steel", "zeppelin", "zeppelin red red", "nothing", ""):
        now, then = grown.score(query), fresh.score(query)
        assert len(now) == len(lines) and ((now > 0) == (then > 0)).all()
        np.testing.assert_allclose(now[now > 0], then[now > 0], rtol=0.25)
    # What stands aside is scored as if it had been counted where the index was.
    aside = lines[first + 3].split()
    original = [line.split() for line in old.lines]
    average, score = np.mean([len(line) for line in original]), 0.0
    for word in ("red", "steel"):
        df = sum(word in line for line in original)
        tf = aside.count(word)
        idf = math.log(1 + (first - df + 0.5) / (df + 0.5))
        score += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(aside) / average))
    assert grown.score("red steel")[first + 3] == pytest.approx(score, rel=1e-5)
    untouched = [code for code in range(first) if lines[code] == old.lines[code]]
    np.testing.assert_array_equal(grown.score("red steel")[untouched], before[untouched])
    np.testing.assert_array_equal(old.score("red steel"), before)
    monkeypatch.setattr("llmrec.retrieve.lexical.ASIDE", 10)
    lines = [*lines, "red zeppelin"]
    np.testing.assert_array_equal(
        grown.grown(lines).score("zeppelin"), BM25Retriever(lines).score("zeppelin")
    )
    wordless = BM25Retriever(["", "..."]).grown(["", "...", "red"])
    assert wordless.retrieve([Query(text="red")], 3)[0].items.tolist() == [2]


# The contract of all

KINDS = {
    "popularity": "anything",
    "ease": "history",
    "transitions": "history",
    "profile": "history",
    "text": "words",
    "bm25": "words",
}


def queries():
    rng = np.random.default_rng(9)
    masks = [None, rng.random(N) < 0.5, rng.random(N) < 0.1, np.zeros(N, bool), np.arange(N) == 17]
    past = [codes([]), *HISTORIES[1:6], codes([8, 8, 8]), codes(rng.integers(0, N, 200)), codes([N - 1])]
    words = ["", "red lamp", "no017", "zebra", "...", "the"]
    return [Query(h, w, m) for h in past for w in words for m in masks]


def as_dict(hits):
    return dict(zip(hits.items.tolist(), hits.scores.tolist(), strict=True))


def test_the_contract_covers_every_retriever_that_is_fitted():
    assert set(KINDS) == set(RETRIEVERS)
    assert all(r.name == name for name, r in RETRIEVERS.items())


@pytest.mark.parametrize("k", [1, 7, 500])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_hits_are_allowed_distinct_finite_at_most_k_and_best_first(name, k):
    asked = queries()
    found = RETRIEVERS[name].retrieve(asked, k)
    assert len(found) == len(asked) and RETRIEVERS[name].retrieve([], k) == []
    for query, hits in zip(asked, found, strict=True):
        allowed = np.ones(N, bool) if query.mask is None else query.mask
        assert allowed[hits.items].all()
        assert len(set(hits.items.tolist())) == len(hits.items) == len(hits.scores) <= k
        assert np.isfinite(hits.scores).all() and (np.diff(hits.scores) <= 0).all()
        assert hits.items.dtype == np.int32 and hits.scores.dtype == np.float32
        usable = {
            "anything": True,
            "history": len(query.history) > 0,
            "words": query.text in ("red lamp", "no017"),
        }[KINDS[name]]
        assert usable or len(hits.items) == 0
    assert sum(len(hits.items) > 0 for hits in found) > 20, "the walk must reach real answers"
    assert any(hits.items.tolist() == [17] for hits in found), "a filter is no reason to find less"


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_query_gets_the_same_in_a_batch_as_alone(name):
    asked = queries()
    for query, together in zip(asked, RETRIEVERS[name].retrieve(asked, N), strict=True):
        (alone,) = RETRIEVERS[name].retrieve([query], N)
        assert as_dict(alone) == pytest.approx(as_dict(together), abs=1e-6)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_retriever_made_from_its_arrays_answers_the_same(name):
    arrays = retriever_arrays(RETRIEVERS)
    assert set(arrays) == {"popularity", "ease", "transitions"}
    copies = {n: {key: np.array(a) for key, a in of.items()} for n, of in arrays.items()}
    again = load_retrievers(copies, TEXTS, RECIPE)
    assert list(again) == list(RETRIEVERS)
    for one, other in zip(
        RETRIEVERS[name].retrieve(queries(), 9), again[name].retrieve(queries(), 9), strict=True
    ):
        np.testing.assert_array_equal(one.items, other.items)
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_grown_catalogue_keeps_the_scores_and_takes_new_items(name):
    lines = [*catalogue(), "red lamp brandnew", "..."]
    grown = load_retrievers(retriever_arrays(RETRIEVERS), texts_of(lines, TEXTS.encoder), RECIPE)
    assert set(grown) == set(RETRIEVERS)
    past, newest = [codes([]), HISTORIES[4], codes([2, 30])], codes([N, N + 1, 2])
    for history in past:
        for words in ("", "red lamp", "no017"):
            (before,) = RETRIEVERS[name].retrieve([Query(history, words)], N)
            (after,) = grown[name].retrieve([Query(history, words)], N + 2)
            assert np.isfinite(after.scores).all()
            old = {item: score for item, score in as_dict(after).items() if item < N}
            if name == "bm25":  # rarer words in a larger catalogue: other scores of the same items
                assert set(old) == set(before.items.tolist())
            else:
                assert old == pytest.approx(as_dict(before), abs=1e-6)
    (hits,) = grown[name].retrieve([Query(newest, "red brandnew")], N + 2)
    assert np.isfinite(hits.scores).all() and len(hits.items)
    reached = {"popularity", "profile", "text", "bm25"}
    (hits,) = grown[name].retrieve([Query(codes([2]), "red lamp")], N + 2)
    assert (N in hits.items) == (name in reached)


def test_an_event_of_weight_two_counts_as_two_pairs_and_twice_the_popularity():
    histories = [np.array([0, 1, 2], np.int32), np.array([1, 0], np.int32)]
    weights = [np.array([1.0, 2.0, 1.0], np.float32), np.array([0.5, 1.0], np.float32)]
    popular = PopularityRetriever.fit(histories, 3, weights)
    np.testing.assert_allclose(np.expm1(popular.scores), [2.0, 2.5, 1.0], rtol=1e-6)

    config = TransitionsConfig(window=2, step_decay=0.5, backward=0.0, smoothing=0.0)
    matrix = TransitionsRetriever.fit(histories, 3, config, weights).matrix.toarray()
    # From 0: to 1 with 1 * 2, to 2 with 0.5 * 1 * 1. From 1: to 2 with 2 * 1, to 0 with 0.5 * 1.
    np.testing.assert_allclose(
        matrix, [[0, 2 / 2.5, 0.5 / 2.5], [0.5 / 2.5, 0, 2 / 2.5], [0, 0, 0]], rtol=1e-6
    )

    x = user_item_matrix(histories, 3, 0.5, weights).toarray()
    np.testing.assert_allclose(x, [[0.25, 1.0, 1.0], [1.0, 0.25, 0.0]])
    same = [np.ones(3, np.float32), np.ones(2, np.float32)]
    plain = EASERetriever.fit(histories, 3, EASEConfig(l2=1.0))
    ones = EASERetriever.fit(histories, 3, EASEConfig(l2=1.0), same)
    np.testing.assert_allclose(plain.score(histories[0]), ones.score(histories[0]))


@pytest.mark.parametrize("sparse", [0, 8, 10**9])
def test_sums_of_sparse_rows_rank_as_the_dense_sum_does(sparse, monkeypatch):
    monkeypatch.setattr(ranking, "SPARSE", sparse)
    rng = np.random.default_rng(sparse)
    matrix = scipy.sparse.random_array((40, 60), density=0.1, rng=rng, dtype=np.float32).tocsr()
    # Quarters, so that scores tie and the order of codes decides.
    matrix.data = np.ceil(matrix.data * 4) / 4 - 0.25
    codes = np.sort(rng.choice(200, 60, replace=False)).astype(np.int32)
    for n in (0, 1, 3, 12):
        rows, weights = rng.choice(40, n, replace=False), rng.choice([0.5, 1.0], n).astype(np.float32)
        dense = np.zeros(200, np.float32)
        dense[codes] = matrix[rows].toarray().T @ weights
        for mask in (None, rng.random(200) < 0.5, np.zeros(200, bool)):
            found = top_of_rows(matrix[rows], weights, codes, 9, Query(mask=mask))
            expected = ranking.top(dense, 9, mask, floor=0.0)
            assert found.items.tolist() == expected.items.tolist() and found.items.dtype == np.int32
            np.testing.assert_allclose(found.scores, expected.scores)


def test_the_largest_entries_of_each_row_are_kept_and_the_rest_of_the_matrix_stays():
    rng = np.random.default_rng(0)
    matrix = scipy.sparse.random(30, 40, 0.4, "csr", np.float32, rng=rng, data_rvs=rng.standard_normal)
    found = ranking.largest_of_rows(matrix, 5).toarray()
    for row, own in zip(matrix.toarray(), found, strict=True):
        expected = np.zeros_like(row)
        largest = np.argsort(-np.abs(row), kind="stable")[:5]
        expected[largest] = row[largest]
        np.testing.assert_array_equal(own, expected)


@given(
    st.integers(1, 400),
    st.integers(1, 30),
    st.integers(0, 60),
    st.integers(1, 50),
    st.sampled_from([-np.inf, 0.0]),
    st.randoms(use_true_random=False),
)
def test_the_best_of_many_are_those_of_a_full_sort(n, k, ruled_out, values, floor, random):
    scores = np.array([random.randint(-5, values) for _ in range(n)], np.float32)
    mask = np.ones(n, bool)
    mask[[random.randrange(n) for _ in range(ruled_out)]] = False
    expected = [i for i in sorted(range(n), key=lambda i: (-scores[i], i)) if mask[i] and scores[i] > floor][
        :k
    ]
    found = top(scores, k, mask, floor)
    assert found.items.tolist() == expected
    if not ruled_out:
        assert top(scores, k, None, floor).items.tolist() == expected
    np.testing.assert_array_equal(found.scores, scores[expected])


def test_a_score_that_is_no_number_is_not_returned_and_hides_no_other():
    scores = np.zeros(96, np.float32)
    scores[:3] = [np.nan, 5, 4]
    assert top(scores, 2).items.tolist() == [1, 2]
