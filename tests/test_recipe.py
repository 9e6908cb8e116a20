from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.blending import (
    choose_weights,
    cross_fitted,
    learned_weights,
    lm_weight,
    search_weights,
    weights_with_lm,
)
from llmrec.candidates import LM, Weights
from llmrec.encode.light import LightEncoder
from llmrec.families import Texts, TrainingLog
from llmrec.features import Features
from llmrec.index.faiss_index import FaissIndex
from llmrec.metrics import per_user, summary
from llmrec.pipeline import Pipeline
from llmrec.protocols import Hits, Query
from llmrec.ranking import top
from llmrec.recipe import (
    HeldOut,
    Recipe,
    RetrievalConfig,
    fit_retrievers,
    ranks_in,
    retriever_arrays,
    roles,
)
from llmrec.retrieve.linear import EASEConfig, EASERetriever
from llmrec.search import (
    known_item_queries,
    like_last_item,
    linear_quality,
    quality,
    search_recipe,
    with_language_model,
)
from llmrec.types import Request

N = 60
CONFIG = RetrievalConfig(depth=100)


def codes(values):
    return np.array(values, dtype=np.int32)


def planted(users=120, seed=0):
    """A log where item i is nearly always followed by its successor; the last event is held out."""
    rng = np.random.default_rng(seed)
    successor = rng.permutation(N)
    train, held_out = [], []
    for _ in range(users):
        walk = [int(rng.integers(N))]
        for _ in range(rng.integers(4, 9)):
            walk.append(int(successor[walk[-1]]) if rng.random() < 0.9 else int(rng.integers(N)))
        train.append(codes(walk[:-1]))
        held_out.append(walk[-1])
    return train, HeldOut([Query(h) for h in train], codes(held_out))


def toy_texts():
    rng = np.random.default_rng(1)
    words = ["red", "blue", "lamp", "shoe", "boat", "steel", "of", "x"]
    lines = [" ".join(rng.choice(words, 3, replace=False)) + f" no{i:02}" for i in range(N)]
    encoder = LightEncoder.fit(lines, dim=16)
    index = FaissIndex(encoder.dim)
    index.add(encoder.encode(lines))
    return Texts(lines, encoder.encode(lines), encoder, index)


TRAIN, HELD_OUT = planted()
TEXTS = toy_texts()


@pytest.fixture(scope="module")
def searched():
    return search_recipe(TrainingLog(TRAIN), HELD_OUT, TEXTS, CONFIG)


class KnowingScorer:
    """Scores by a function of the query's position in the held-out part; noise where it knows nothing."""

    name = LM

    def __init__(self, knows, seed=0):
        self.knows, self.seed = knows, seed
        self.target = {id(q.history): int(t) for q, t in zip(HELD_OUT.queries, HELD_OUT.targets, strict=True)}

    def _scores(self, queries):
        rng = np.random.default_rng(self.seed)
        for query in queries:
            scores = rng.normal(size=N).astype(np.float32)
            # Without a history there is nobody it could know.
            if self.knows and len(query.history):
                scores[self.target[id(query.history)]] += 9
            yield scores

    def score(self, queries, candidates):
        return [s[c] for s, c in zip(self._scores(queries), candidates, strict=True)]

    def retrieve(self, queries, k):
        return [top(s, k, q.mask) for s, q in zip(self._scores(queries), queries, strict=True)]


# Features

quarters = st.integers(0, 4).map(lambda n: n / 4)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_ranks_from_features_equal_a_plain_sort(data):
    m = data.draw(st.integers(1, 3))
    row = st.lists(quarters, min_size=m, max_size=m)
    blocks = data.draw(st.lists(st.lists(row, max_size=6), max_size=6))
    weights = dict(zip("abc", data.draw(st.lists(quarters, min_size=m, max_size=m)), strict=False))
    truth = [data.draw(st.integers(-1, len(b) - 1)) for b in blocks]
    starts = np.cumsum([0, *map(len, blocks)])[:-1]
    features = Features(
        tuple("abc"[:m]),
        np.array([r for b in blocks for r in b], np.float32).reshape(-1, m),
        np.zeros((sum(map(len, blocks)), m), np.int32),
        starts.astype(np.int64),
        np.array([s + t if t >= 0 else -1 for s, t in zip(starts, truth, strict=True)], np.int64),
        np.ones(len(truth), np.int64),
    )
    expected = []
    for block, target in zip(blocks, truth, strict=True):
        total = [sum(w * x for w, x in zip(weights.values(), r, strict=True)) for r in block]
        order = sorted(range(len(block)), key=lambda i: (-total[i], i))
        expected.append(order.index(target) + 1 if target >= 0 else 0)
    assert features.of_targets(Weights(weights)).tolist() == expected


def test_the_ranks_that_the_search_looks_at_are_those_that_the_pipeline_serves():
    retrievers = fit_retrievers(TrainingLog(TRAIN), TEXTS, Recipe.default(CONFIG))
    weights = {"ease": 0.5, "transitions": 1.0, "profile": 0.25, "popularity": 0.125}
    pipeline = Pipeline(retrievers, Weights(weights), Weights({}), Weights({}), depth=20)
    served = ranks_in((c.items for c in pipeline.recommend(HELD_OUT.queries, N)), HELD_OUT.targets)
    hits = {name: retrievers[name].retrieve(HELD_OUT.queries, 20) for name in weights}
    ranks = Features.of(hits, HELD_OUT).of_targets(Weights(weights))
    np.testing.assert_array_equal(ranks, served)
    assert (served == 1).any() and (served == 0).any() and (served > 10).any()


def test_bonuses_and_segments_are_searched_as_they_are_served():
    retrievers = fit_retrievers(TrainingLog(TRAIN), TEXTS, Recipe.default(CONFIG))
    longer = Weights({"transitions": 1.0}, found={"ease": 0.3}, rank={"transitions": 0.7, "profile": 0.2})
    weights = Weights({"ease": 1.0}, rank={"popularity": 0.4}, longer=((6, longer),))
    pipeline = Pipeline(retrievers, weights, Weights({}), Weights({}), depth=30)
    served = ranks_in((c.items for c in pipeline.recommend(HELD_OUT.queries, N)), HELD_OUT.targets)
    names = [name for name in retrievers if weights.ever_uses(name)]
    features = Features.of({n: retrievers[n].retrieve(HELD_OUT.queries, 30) for n in names}, HELD_OUT)
    # A component that a segment does not use proposes nothing there: compare where the target is found.
    ours = features.of_targets(weights)
    np.testing.assert_array_equal(ours[served > 0], served[served > 0])
    assert len({len(q.history) >= 6 for q in HELD_OUT.queries}) == 2


def test_the_learned_blend_beats_its_parts_and_never_counts_a_better_score_against_an_item():
    train, held_out = planted(users=600, seed=5)
    retrievers = fit_retrievers(TrainingLog(train), TEXTS, Recipe.default(CONFIG))
    names = Recipe.default(CONFIG).answering("history")
    features = Features.of({n: retrievers[n].retrieve(held_out.queries, 30) for n in names}, held_out)
    learned = learned_weights(features, 1.0)
    for segment in (learned, *(w for _, w in learned.longer)):
        assert min(segment.retrievers.values()) >= 0 and min(segment.rank.values()) >= 0
    judged = cross_fitted(features, lambda part: learned_weights(part, 1.0), seed=0)
    alone = max(value(features, {name: 1.0}) for name in names)
    assert judged.mean() > alone - 0.02
    log: list[dict] = []
    choose_weights(features, {}, log, "toy", seed=0)
    assert {"searched", "learned, l2 1"} <= set(log[-1]["ndcg@10"]) and log[-1]["chosen"] in log[-1][
        "ndcg@10"
    ]


# Weights


def random_features(seed, informed=0.3):
    """Three components over 60 queries of 12 candidates; each knows the target now and then."""
    rng = np.random.default_rng(seed)
    scores = rng.random((60, 12, 3)).astype(np.float32)
    truth = rng.integers(0, 12, 60)
    for user in range(60):
        scores[user, truth[user]] += rng.random(3) * informed * (rng.random(3) < 0.7)
    rows = np.where(rng.random(60) < 0.1, -1, truth + 12 * np.arange(60))
    no_ranks = np.zeros((720, 3), np.int32)
    return Features(
        ("a", "b", "c"), scores.reshape(-1, 3), no_ranks, 12 * np.arange(60), rows, np.ones(60, int)
    )


def value(features, weights):
    return per_user(features.of_targets(Weights(weights)), "ndcg@10").mean()


@pytest.mark.parametrize("seed", range(8))
def test_searched_weights_are_never_worse_than_the_best_component_alone(seed):
    features, log = random_features(seed), []
    chosen = search_weights(features, {}, log, "toy")
    assert chosen and min(chosen.values()) > 0
    assert value(features, chosen) >= max(value(features, {n: 1.0}) for n in "abc") - 1e-6
    assert value(features, chosen) == pytest.approx(log[-1]["ndcg@10"], abs=1e-5)
    assert all(entry["search"] == "toy weights" for entry in log)
    fixed = search_weights(features, {"b": 1.0}, [], "toy")
    assert fixed["b"] == 1.0
    assert value(features, fixed) >= value(features, {"b": 1.0}) - 1e-6


def test_a_component_that_helps_only_at_a_small_weight_is_found_beside_the_best_one():
    """The first leaves the target tied with two others; the second breaks such ties, but misleads beyond."""
    rng = np.random.default_rng(4)
    scores = np.empty((80, 10, 2), np.float32)
    scores[:, :, 0] = rng.integers(0, 4, (80, 10)) / 10
    scores[:, :, 1] = rng.uniform(0.6, 1.0, (80, 10))
    truth = np.empty(80, np.int64)
    for user in range(80):
        tied = rng.choice(10, 3, replace=False)
        truth[user] = tied[0]
        scores[user, tied] = [[0.5, 0.3], [0.5, 0.1], [0.5, 0.2]]
    starts = 10 * np.arange(80)
    no_ranks = np.zeros((800, 2), np.int32)
    features = Features(
        ("first", "second"), scores.reshape(-1, 2), no_ranks, starts, starts + truth, np.ones(80, int)
    )
    alone = value(features, {"first": 1.0})
    assert alone > value(features, {"second": 1.0}) + 0.1
    assert value(features, {"first": 1.0, "second": 0.05}) == 1.0 > alone + 0.1
    assert max(value(features, {"first": 1.0, "second": w}) for w in (1.0, 1.5, 3.0, 10.0)) < alone
    assert value(features, search_weights(features, {}, [], "toy")) == 1.0


@pytest.fixture(scope="module")
def history_hits():
    retrievers = fit_retrievers(TrainingLog(TRAIN), TEXTS, Recipe.default(CONFIG))
    return {
        n: retrievers[n].retrieve(HELD_OUT.queries, 30) for n in Recipe.default(CONFIG).answering("history")
    }


def lm_features(hits, scorer):
    return Features.with_lm(hits, scorer.retrieve(HELD_OUT.queries, 30), scorer, HELD_OUT)


def test_candidates_without_the_language_model_are_those_that_the_others_found(history_hits):
    features = lm_features(history_hits, KnowingScorer(True))
    got, expected = features.without(LM), Features.of(history_hits, HELD_OUT)
    assert len(got.scores) < len(features.scores) and (got.truth < 0).sum() > (features.truth < 0).sum()
    assert got.names == expected.names
    for name in ("scores", "ranks", "starts", "truth", "lengths"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)


def test_a_language_model_of_noise_seldom_gets_a_weight(history_hits):
    """The best of many noisy weights gains more than two standard errors too often, but not cross-fitted."""
    weights = Recipe.default(CONFIG).history.retrievers
    log: list[dict] = []
    chosen = [
        lm_weight(features, Weights(weights), log, "history", seed)
        for seed, features in enumerate(
            lm_features(history_hits, KnowingScorer(False, seed)) for seed in range(60)
        )
    ]
    assert sum(weight > 0 for weight in chosen) <= 2
    for weight, entry in zip(chosen, log, strict=True):
        assert weight == entry["chosen"] and "0.0" in entry["ndcg@10"]
        assert (weight == 0) == (entry["gain"] <= 2 * entry["standard_error"])


def test_a_language_model_that_knows_the_target_gets_a_weight_that_pays(history_hits):
    log: list[dict] = []
    features, weights = lm_features(history_hits, KnowingScorer(True)), {"ease": 0.7, "transitions": 1.0}
    chosen = lm_weight(features, Weights(weights), log, "history", 0)
    assert chosen > 0
    assert value(features, {**weights, LM: chosen}) > value(features, weights) + 0.05
    assert log[-1]["gain"] > log[-1]["standard_error"] > 0
    without = replace(features, names=("ease", "transitions", "profile", "popularity", "other"))
    assert lm_weight(without, Weights(weights), [], "history", 0) == 0
    nobody = Features.of({"ease": [], LM: []}, HeldOut([], codes([])))
    assert lm_weight(nobody, Weights(weights), [], "history", 0) == 0


def test_no_weight_rests_on_a_handful_of_users():
    few = HeldOut(HELD_OUT.queries[:5], HELD_OUT.targets[:5])
    scorer, log = KnowingScorer(True), []
    hits = {"popularity": [Hits(codes([1]), np.ones(1, np.float32))] * 5}
    for part in (few, HeldOut(few.queries[:1], few.targets[:1])):
        own = {name: found[: len(part.targets)] for name, found in hits.items()}
        features = Features.with_lm(own, scorer.retrieve(part.queries, 30), scorer, part)
        assert lm_weight(features, Weights({"popularity": 1.0}), log, "history", 0) == 0
    assert log[0]["gain"] > 0.5 and log[1]["standard_error"] is None
    json.dumps(log, allow_nan=False)


def test_without_the_language_model_its_own_proposals_are_no_candidates(history_hits):
    scorer = KnowingScorer(False)
    # What a bonus below 0 puts under items that nobody else proposed.
    weights = Weights({"ease": 1.0}, found={"popularity": -2.0, "transitions": -0.5})
    served = {name: hits for name, hits in history_hits.items() if weights.uses(name)}
    features = Features.with_lm(served, scorer.retrieve(HELD_OUT.queries, 30), scorer, HELD_OUT)
    expected = Features.of(served, HELD_OUT).of_targets(weights)
    np.testing.assert_array_equal(features.of_targets(weights), expected)
    assert (features.of_targets(weights.with_lm(0.001)) != expected).any()


def test_who_has_no_history_chooses_no_weights():
    empty = [Query(codes([])), *HELD_OUT.queries[:3], Query(codes([]))]
    part = HeldOut(empty, np.arange(5, dtype=np.int32))
    known = part.with_history()
    assert known.targets.tolist() == [1, 2, 3] and list(known.queries) == list(HELD_OUT.queries[:3])
    assert HELD_OUT.with_history() is HELD_OUT
    newcomers = HeldOut([Query(codes([]))] * 50, np.full(50, 3, np.int32))
    mixed = HeldOut([*HELD_OUT.queries, *newcomers.queries], np.append(HELD_OUT.targets, newcomers.targets))
    alone, beside = (search_recipe(TrainingLog(TRAIN), part, TEXTS, CONFIG)[0] for part in (HELD_OUT, mixed))
    assert beside.history == alone.history and beside.calibration == alone.calibration


@pytest.mark.parametrize(("n", "choose"), [(0, 0), (1, 1), (2, 1), (7, 4), (120, 60), (5000, 1000)])
def test_who_chooses_a_state_does_not_judge_it(n, choose):
    everybody = HeldOut([Query(codes([i % N])) for i in range(n)], np.arange(n, dtype=np.int32))
    choosing, judging = roles(everybody, 3)
    assert len(choosing.queries) == choose and len(judging.queries) == n - choose
    parts = [part.targets.tolist() for part in (choosing, judging)]
    assert sorted(parts[0] + parts[1]) == list(range(n)) and all(part == sorted(part) for part in parts)
    for part in (choosing, judging):
        assert [int(q.history[0]) for q in part.queries] == [t % N for t in part.targets.tolist()]
    assert roles(everybody, 3)[0].sha256() == choosing.sha256()
    assert n < 100 or roles(everybody, 4)[0].sha256() != choosing.sha256()


def three_signals(knows, users=500, seed=0):
    """A component that knows something, one of noise, and a language model; 20 candidates a user."""
    rng = np.random.default_rng(seed)
    scores = rng.random((users, 20, 3)).astype(np.float32)
    truth = rng.integers(0, 20, users)
    scores[np.arange(users), truth, 0] += 0.4
    scores[np.arange(users), truth, 2] += 0.4 * knows
    starts = 20 * np.arange(users)
    ranks = np.argsort(np.argsort(-scores, axis=1), axis=1).reshape(-1, 3).astype(np.int32) + 1
    lengths = rng.integers(1, 30, users)
    return Features(("ease", "noise", LM), scores.reshape(-1, 3), ranks, starts, starts + truth, lengths)


def test_all_weights_are_fitted_anew_with_the_language_model_where_that_is_better():
    given = Weights({"ease": 1.0, "noise": 1.0})
    features, log = three_signals(knows=True), []
    fitted = weights_with_lm(features, given, log, "history", seed=0)
    assert log[-1]["chosen"].startswith("with, ") and fitted.plain is not None
    assert fitted.most_lm > 0 and fitted.retrievers["noise"] < 0.5 * fitted.retrievers["ease"]
    assert fitted.with_lm(0.0) == fitted.plain and fitted.plain.most_lm == 0
    assert fitted.plain.retrievers["noise"] < 0.5 * fitted.plain.retrievers["ease"]
    assert Weights.from_dict(fitted.as_dict()) == fitted

    fresh = three_signals(knows=True, seed=1)
    on_top = given.with_lm(lm_weight(features, given, [], "history", 0))
    ways = given, on_top, fitted.plain, fitted
    as_given, topped, plain, anew = (per_user(fresh.of_targets(w), "ndcg@10").mean() for w in ways)
    assert as_given + 0.02 < topped < anew - 0.01 and plain + 0.02 < anew

    # What a new fit gains without the model is not its own.
    nothing = weights_with_lm(three_signals(knows=False), given, log, "history", seed=0)
    assert log[-1]["ndcg@10"]["with, l2 10"] > log[-1]["ndcg@10"]["as given"] + 0.02
    assert nothing == given


def test_what_was_fitted_with_the_language_model_is_searched_as_it_is_served():
    scorer = KnowingScorer(knows=False, seed=3)
    retrievers = fit_retrievers(TrainingLog(TRAIN), TEXTS, Recipe.default(CONFIG))
    plain = Weights({"transitions": 1.0})
    weights = Weights({"ease": 0.5}, lm=0.7, found={LM: 0.3, "ease": 0.1}, rank={LM: 0.4}, plain=plain)
    hits = {"ease": retrievers["ease"].retrieve(HELD_OUT.queries, 20)}
    features = Features.with_lm(hits, scorer.retrieve(HELD_OUT.queries, 20), scorer, HELD_OUT)
    with_lm = Pipeline({**retrievers, LM: scorer}, weights, Weights({}), Weights({}), scorer, depth=20)
    # The same noise is drawn again for the same queries, so ask for all at once.
    served = ranks_in((c.items for c in with_lm.recommend(HELD_OUT.queries, N)), HELD_OUT.targets)
    np.testing.assert_array_equal(features.of_targets(weights), served)
    without = replace(with_lm, scorer=None, retrievers=retrievers)
    alone = replace(without, history=plain)
    for got, expected in zip(*(p.recommend(HELD_OUT.queries, 9) for p in (without, alone)), strict=True):
        np.testing.assert_array_equal(got.items, expected.items)


def test_fitting_the_language_model_again_replaces_its_entries_in_the_log(searched):
    recipe, retrievers = searched
    once = with_language_model(recipe, retrievers, KnowingScorer(True), HELD_OUT, TEXTS.lines, CONFIG)
    assert once.history.lm > 0 and once.history.retrievers == recipe.history.retrievers
    twice = with_language_model(once, retrievers, KnowingScorer(False), HELD_OUT, TEXTS.lines, CONFIG)
    assert twice.history.lm == 0 and len(twice.log) == len(once.log) > len(recipe.log)
    assert [entry for entry in twice.log if "language model" not in entry["search"]] == recipe.log
    nobody = HeldOut([], codes([]))
    assert (
        with_language_model(once, retrievers, KnowingScorer(True), nobody, TEXTS.lines, CONFIG).history.lm
        == 0
    )


def test_typed_words_of_people_without_a_history_get_a_weight_of_their_own(searched):
    recipe, retrievers = searched
    # The search gave them weights of their own too: of words and popularity alone.
    anybody, known_user = (recipe.query.for_history(n) for n in (0, 3))
    assert set(anybody.retrievers) <= {"bm25", "text", "popularity"} and anybody.retrievers
    assert len(recipe.query.longer) == 1 and known_user is recipe.query.longer[0][1]
    # Words that many items have: there is something left to know.
    lines = [line.rsplit(" ", 1)[0] for line in TEXTS.lines]
    fitted = with_language_model(recipe, retrievers, KnowingScorer(True), HELD_OUT, lines, CONFIG)
    assert fitted.query.for_history(3).lm > 0 == fitted.query.for_history(0).lm
    assert fitted.query.for_history(0).retrievers == recipe.query.retrievers
    scorer = KnowingScorer(True)
    served = Pipeline(
        {**retrievers, LM: scorer}, fitted.history, fitted.query, fitted.similar, scorer, depth=20
    )
    plain = replace(served, query=recipe.query)
    alone = Query(codes([]), "red lamp")
    got, expected = (p.recommend([alone], 9)[0].items for p in (served, plain))
    np.testing.assert_array_equal(got, expected)
    again = with_language_model(fitted, retrievers, KnowingScorer(False), HELD_OUT, TEXTS.lines, CONFIG)
    assert again.query.most_lm == 0


# The whole search


def test_the_search_finds_a_planted_successor_rule(searched):
    recipe, retrievers = searched
    pipeline = Pipeline(retrievers, recipe.history, recipe.query, recipe.similar)

    def quality(queries, pipe=pipeline):
        lists = (c.items for c in pipe.recommend(queries, 10))
        return summary(ranks_in(lists, HELD_OUT.targets), ["ndcg@10"])["ndcg@10"]

    popularity = replace(pipeline, history=Weights({"popularity": 1.0}))
    merged, popular = quality(HELD_OUT.queries), quality(HELD_OUT.queries, popularity)
    assert merged > 0.7 and popular < 0.3
    assert recipe.history.retrievers.get("transitions", 0) > 0
    assert recipe.log[-1]["search"] == "calibration" and recipe.similar.retrievers["profile"] == 1.0
    typed = known_item_queries(HELD_OUT, TEXTS.lines, CONFIG.seed)
    assert len(typed.targets) == len(HELD_OUT.targets) and quality(typed.queries) > popular + 0.2


def test_ease_is_searched_by_what_it_would_serve():
    rng = np.random.default_rng(4)
    queries = []
    for n, history in enumerate(TRAIN[:40]):
        mask = rng.random(len(TEXTS.lines)) < 0.8 if n % 3 else None
        queries.append(Query(history if n % 7 else history[:0], "", mask))
    asked = HeldOut(queries, codes(rng.integers(0, len(TEXTS.lines), 40)))
    config = EASEConfig(l2=2.0, text=1.0, keep=5)
    served = EASERetriever.fit(TRAIN, len(TEXTS.lines), config, None, TEXTS.vectors)
    found = linear_quality(served, (0.5, 1.0), asked)
    for decay, value in found.items():
        assert value == pytest.approx(quality(served.with_decay(decay), asked), abs=1e-9) and value > 0


def test_no_fitted_parameter_has_seen_a_held_out_event(searched):
    recipe, retrievers = searched
    expected = retriever_arrays(fit_retrievers(TrainingLog(TRAIN), TEXTS, recipe))
    whole = [np.append(h, t) for h, t in zip(TRAIN, HELD_OUT.targets, strict=True)]
    leaked = retriever_arrays(fit_retrievers(TrainingLog(whole), TEXTS, recipe))
    for name, arrays in retriever_arrays(retrievers).items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name][key])
        assert any(not np.array_equal(a, leaked[name][key]) for key, a in arrays.items()), (
            "the check can fail"
        )
    assert set(retrievers) == set(fit_retrievers(TrainingLog([]), TEXTS, recipe))
    assert retrievers["ease"].config == recipe.settings["ease"]
    assert retrievers["transitions"].config == recipe.settings["transitions"]
    assert retrievers["profile"].config == recipe.settings["profile"]


def test_the_search_is_the_same_every_time(searched):
    again, _ = search_recipe(TrainingLog(TRAIN), HELD_OUT, TEXTS, CONFIG)
    assert again == searched[0]


@pytest.mark.parametrize(("users", "search"), [(None, False), (0, True), (19, True)])
def test_without_a_search_or_with_few_held_out_users_the_defaults_are_fitted(users, search):
    config = CONFIG.model_copy(update={"search": search})
    held_out = HELD_OUT if users is None else HeldOut(HELD_OUT.queries[:users], HELD_OUT.targets[:users])
    recipe, retrievers = search_recipe(TrainingLog(TRAIN), held_out, TEXTS, config)
    said = [{"search": "held-out events, too few to choose by", "users": users}] if search else []
    assert replace(recipe, log=[]) == Recipe.default(config) and recipe.log == said
    assert set(retrievers) == set(fit_retrievers(TrainingLog([]), TEXTS, recipe))


def test_twenty_held_out_users_choose():
    few = HeldOut(HELD_OUT.queries[:20], HELD_OUT.targets[:20])
    recipe, _ = search_recipe(TrainingLog(TRAIN), few, TEXTS, CONFIG)
    assert recipe.log[0]["search"] == "held-out events" and len(recipe.log) > 1


def test_a_recipe_survives_json(searched):
    recipe = replace(searched[0], history=Weights({"ease": 0.7}, lm=0.3))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    default = Recipe.default(CONFIG)
    assert Recipe.from_dict(json.loads(json.dumps(default.as_dict()))) == default


# Queries made from held-out events


def test_known_item_queries_use_only_words_of_the_line_of_their_target():
    lines = [*TEXTS.lines]
    wordless = int(HELD_OUT.targets[0])
    lines[wordless] = "a - bc !"
    made = known_item_queries(HELD_OUT, lines, seed=7)
    kept = [i for i, t in enumerate(HELD_OUT.targets) if t != wordless]
    assert 0 < len(kept) < len(HELD_OUT.targets) and made.targets.tolist() == HELD_OUT.targets[kept].tolist()
    for query, target, row in zip(made.queries, made.targets, kept, strict=True):
        words = query.text.split()
        assert 1 <= len(words) <= 3 and len(set(words)) == len(words)
        assert set(words) <= {w for w in re.findall(r"\w+", lines[target]) if len(w) > 2}
        assert query.history is HELD_OUT.queries[row].history
    texts = [q.text for q in made.queries]
    assert texts == [q.text for q in known_item_queries(HELD_OUT, lines, 7).queries]
    assert texts != [q.text for q in known_item_queries(HELD_OUT, lines, 8).queries]


def test_a_sample_keeps_each_query_with_its_target_and_the_last_item_alone_asks_for_similar_ones():
    some = HELD_OUT.sample(25, seed=3)
    target_of = {id(q): int(t) for q, t in zip(HELD_OUT.queries, HELD_OUT.targets, strict=True)}
    assert [target_of[id(q)] for q in some.queries] == some.targets.tolist() and len(some.queries) == 25
    assert HELD_OUT.sample(1000, seed=3) is HELD_OUT
    part = HeldOut([Query(codes([1, 2])), Query(), Query(codes([7]))], codes([3, 4, 5]))
    single = like_last_item(part)
    assert [q.history.tolist() for q in single.queries] == [[2], [7]] and single.targets.tolist() == [3, 5]


def test_who_gave_nothing_does_not_wait_for_the_language_model():
    recipe = Recipe.default(CONFIG).with_lm(0.5)
    for asked in ({"history": ["a"]}, {"user": "u"}, {"query": "lamp"}, {"history": [], "query": "lamp"}):
        assert recipe.asks_lm(Request(**asked))
    for asked in ({}, {"history": []}, {"query": "  "}):
        assert not recipe.asks_lm(Request(**asked))
