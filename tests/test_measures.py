"""Measures beyond rank, each against an implementation that is not ours or a plain loop over its formula."""

import math

import ir_measures
import numpy as np
import pytest
import scipy.stats
from ir_measures import AP, RR, R, Success, nDCG
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from llmrec.catalog import Catalog
from llmrec.evaluation.beyond import Beyond, attribute_values, groups_of
from llmrec.evaluation.probability import Probabilities, calibration_error
from llmrec.evaluation.segments import by_segment, segments
from llmrec.evaluation.split import Part
from llmrec.metrics import compare_values, holm, per_user, relevance
from llmrec.types import Item

RNG = np.random.default_rng(0)
N, USERS, DIM = 25, 30, 6
COUNTS = RNG.integers(0, 50, N).astype(np.float64)
VECTORS = RNG.normal(size=(N, DIM)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
GROUPS = RNG.dirichlet(np.ones(4), N).astype(np.float32)
ACTIVE = np.arange(N) != 3
LISTS = [
    RNG.permutation(np.flatnonzero(ACTIVE))[: RNG.integers(1, 14)].astype(np.int32) for _ in range(USERS)
]
PART = Part(
    np.arange(USERS),
    [RNG.integers(0, N, RNG.integers(0, 60)).astype(np.int32) for _ in range(USERS)],
    RNG.integers(0, N, USERS).astype(np.int32),
    np.arange(USERS),
)


def test_measures_with_many_relevant_items_equal_ir_measures():
    relevant = [np.unique(RNG.integers(0, N, RNG.integers(1, 9))).astype(np.int32) for _ in range(USERS)]
    qrels = [ir_measures.Qrel(str(u), str(i), 1) for u, items in enumerate(relevant) for i in items]
    run = [
        ir_measures.ScoredDoc(str(u), str(i), -float(place))
        for u, items in enumerate(LISTS)
        for place, i in enumerate(items)
    ]
    named = {"recall": R, "hit": Success, "ndcg": nDCG, "mrr": RR, "map": AP}
    for k in (1, 5, 10):
        measures = {f"{name}@{k}": measure @ k for name, measure in named.items()}
        theirs = {
            (m.query_id, m.measure): m.value for m in ir_measures.iter_calc(measures.values(), qrels, run)
        }
        for user, (items, truth) in enumerate(zip(LISTS, relevant, strict=True)):
            ours = relevance(items, truth, k)
            for name, measure in measures.items():
                assert ours[name] == pytest.approx(theirs[str(user), measure], abs=1e-9), (name, user)


def test_one_relevant_item_gives_what_the_rank_gives():
    for items, target in zip(LISTS, PART.targets, strict=True):
        at = np.flatnonzero(items == target)
        rank = np.array([at[0] + 1 if len(at) else 0])
        ours = relevance(items, np.array([target]), 10)
        assert {m: per_user(rank, m)[0] for m in ours} == pytest.approx(ours)


def test_measures_beyond_accuracy_equal_their_formulas():
    ours = Beyond(COUNTS, VECTORS, GROUPS, ACTIVE).measure(LISTS, PART, 10)
    tops = [items[:10].tolist() for items in LISTS]
    shown = [sum(i in items for items in tops) for i in range(N) if ACTIVE[i]]
    p = (COUNTS + 1) / (COUNTS + 1).sum()
    # Gini as half the relative mean absolute difference, scaled so that a single item gives 1.
    pairs = [abs(x - y) for x in shown for y in shown]
    gini = sum(pairs) / (2 * len(shown) * sum(shown)) * len(shown) / (len(shown) - 1)
    diversity = [
        np.mean([1 - VECTORS[a] @ VECTORS[b] for a in items for b in items if a != b])
        for items in tops
        if len(items) > 1
    ]
    popular = sorted(range(N), key=lambda i: (-COUNTS[i], i))[:10]
    serendipity = [t in items and t not in popular for items, t in zip(tops, PART.targets, strict=True)]
    both = [(items, h) for items, h in zip(tops, PART.histories, strict=True) if len(h)]
    lift = np.mean([p[i].mean() for i, _ in both]) / np.mean([p[h].mean() for _, h in both]) - 1
    divergence = []
    for items, history in both:
        before = sum(GROUPS[i] for i in history) / len(history)
        after = sum(GROUPS[i] for i in items) / len(items)
        divergence.append(scipy.stats.entropy(before, 0.99 * after + 0.01 * before))
    expected = {
        "coverage@10": np.mean([n > 0 for n in shown]),
        "gini@10": gini,
        "novelty@10": np.mean([np.mean([-math.log2(p[i]) for i in items]) for items in tops]),
        "diversity@10": np.mean(diversity),
        "serendipity@10": np.mean(serendipity),
        "popularity_lift@10": lift,
        "miscalibration@10": np.mean(divergence),
    }
    assert ours == pytest.approx(expected, abs=1e-5)


def test_extreme_lists_have_extreme_measures():
    beyond = Beyond(np.ones(10), np.eye(10, dtype=np.float32), None, np.ones(10, dtype=bool))
    part = Part(np.arange(10), [np.array([0])] * 10, np.arange(10, dtype=np.int32), np.arange(10))
    same = beyond.measure([np.array([4])] * 10, part)
    spread = beyond.measure([np.array([i]) for i in range(10)], part)
    assert (same["gini@10"], spread["gini@10"]) == pytest.approx((1.0, 0.0))
    assert (same["coverage@10"], spread["coverage@10"]) == (0.1, 1.0)
    assert beyond.measure([np.arange(10)] * 10, part)["diversity@10"] == pytest.approx(1.0)
    nothing = beyond.measure([np.empty(0, np.int32)] * 10, part)
    assert all(np.isfinite(list(nothing.values())))


def test_groups_are_the_values_of_the_attribute_that_most_items_have():
    catalog = Catalog.load(
        [
            Item("1", "a", "", {"genres": ("x", "y"), "code": "c1"}),
            Item("2", "b", "", {"genres": ("y",)}),
            Item("3", "c", "", {"year": 1990}),
        ]
    )
    name, shares = groups_of(catalog)
    assert name == "genres" and shares.tolist() == [[0.5, 0.5], [0, 1], [0, 0]]
    assert groups_of(Catalog.load([Item("1", "a"), Item("2", "b")])) is None
    texts = ("x, y", "y", "y, x")
    joined = Catalog.load([Item(str(n), "a", "", {"g": text}) for n, text in enumerate(texts)])
    assert groups_of(joined)[1].tolist() == [[0.5, 0.5], [0, 1], [0.5, 0.5]]


def test_a_text_with_commas_is_a_list_where_its_parts_are_fewer():
    genres = ["Comedy, Drama", "Comedy", "Drama, Comedy", "Drama"]
    firms = ["Acme, Inc.", "Bolt, Ltd.", "Acme, Inc.", "Crane"]
    items = [
        Item(str(n), "t", "", {"genres": g, "firm": f})
        for n, (g, f) in enumerate(zip(genres, firms, strict=True))
    ]
    values = attribute_values(Catalog.load(items))
    assert values["genres"] == [["Comedy", "Drama"], ["Comedy"], ["Drama", "Comedy"], ["Drama"]]
    assert values["firm"] == [[f] for f in firms]


def test_probabilities_equal_scikit_learn_and_their_formulas():
    logits = RNG.normal(size=(USERS, N)).astype(np.float32) * 2
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    gathered = Probabilities()
    for rows in (slice(0, 7), slice(7, USERS)):
        gathered.add(np.log(p[rows]).astype(np.float32), PART.targets[rows])
    ours = gathered.summary()
    assert ours["nats"] == pytest.approx(log_loss(PART.targets, p, labels=np.arange(N)), abs=1e-5)
    truth = np.eye(N)[PART.targets]
    assert ours["brier"] == pytest.approx(((p - truth) ** 2).sum(axis=1).mean(), abs=1e-5)
    assert Probabilities().summary() == {}


def test_calibration_error_is_small_where_confidence_is_the_chance_of_being_right():
    rng = np.random.default_rng(2)
    confidence = rng.random(20_000)
    right = rng.random(20_000) < confidence
    assert calibration_error(confidence, right) < 0.02
    bins = np.array_split(np.argsort(confidence), 15)
    fraction, mean = calibration_curve(right, confidence, n_bins=15, strategy="quantile")
    weights = [len(b) for b in bins]
    expected = np.average(np.abs(fraction - mean), weights=weights)
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-3)
    assert calibration_error(np.full(1000, 0.9), rng.random(1000) < 0.4) == pytest.approx(0.5, abs=0.05)


def test_segments_cover_every_user_once_of_each_kind():
    masks = segments(PART, COUNTS)
    for kind in ("history", "target"):
        assert (sum(mask.astype(int) for name, mask in masks.items() if name.startswith(kind)) == 1).all()
    assert masks["target new"].tolist() == [COUNTS[t] == 0 for t in PART.targets]
    head = {int(t) for t in PART.targets[masks["target head"]]}
    tail = {int(t) for t in PART.targets[masks["target tail"]]}
    assert min(COUNTS[list(head)]) >= max(COUNTS[list(tail)])
    ranks = {"a": RNG.integers(0, 12, USERS)}
    found = by_segment(ranks, masks)
    users = [s["users"] for name, s in found.items() if name.startswith("history")]
    values = [s["systems"]["a"]["ndcg@10"] for name, s in found.items() if name.startswith("history")]
    assert np.average(values, weights=users) == pytest.approx(per_user(ranks["a"], "ndcg@10").mean())


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    """95 % intervals on synthetic users: 400 trials, so within three binomial standard errors of .95."""
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(400):
        moved = rng.random(300) < 0.3
        difference = np.where(moved, rng.normal(0.05, 0.3, 300), 0.0)
        found = compare_values(difference, "a", "b", "m", draws=1000, seed=trial)
        covered += found.low <= 0.3 * 0.05 <= found.high
    assert abs(covered / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)


def test_without_a_difference_few_p_values_are_small_and_corrected_ones_fewer():
    rng = np.random.default_rng(6)
    wrong, families = 0, 0
    for trial in range(60):
        found = holm(
            [
                compare_values(rng.normal(size=80), "a", "b", str(m), draws=400, seed=10 * trial + m)
                for m in range(5)
            ]
        )
        wrong += sum(c.p < 0.05 for c in found)
        families += any(c.p_holm < 0.05 for c in found)
        assert all(c.p_holm >= c.p for c in found)
    assert wrong / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert families / 60 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


def test_holm_equals_the_step_down_procedure():
    from dataclasses import replace

    base = compare_values(np.array([1.0, 0.0]), "a", "b", "m", draws=10)
    given = [0.01, 0.04, 0.03, 0.005, 0.9]
    found = [c.p_holm for c in holm([replace(base, p=p) for p in given])]
    # By hand: .005 * 5, .01 * 4, .03 * 3, max(.04 * 2, .09), .9.
    assert found == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert holm([]) == []


def test_the_effect_size_is_the_mean_in_standard_deviations():
    difference = RNG.normal(0.2, 1, 50)
    found = compare_values(difference, "a", "b", "m", draws=10)
    assert found.effect == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert compare_values(np.full(30, 0.1), "a", "b", "m", draws=10).effect is None
