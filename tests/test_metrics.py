from __future__ import annotations

import ir_measures
import numpy as np
import pytest
import scipy.stats
from ir_measures import RR, R, nDCG

from llmrec.metrics import REPORTED, compare, compare_all, holm, per_user, summary

OTHERS = {"recall": R, "ndcg": nDCG, "mrr": RR}
CUTS = (1, 5, 10, 20)


def test_metrics_equal_ir_measures_with_one_relevant_document():
    rng = np.random.default_rng(0)
    lists = [rng.permutation(40)[: rng.integers(1, 31)] for _ in range(80)]
    targets = rng.integers(0, 40, 80)
    ranks = np.array(
        [(np.flatnonzero(items == t) + 1).max(initial=0) for items, t in zip(lists, targets, strict=True)]
    )
    assert (ranks == 0).any() and (ranks == 1).any() and (ranks > 10).any()
    qrels = [ir_measures.Qrel(str(user), str(target), 1) for user, target in enumerate(targets)]
    run = [
        ir_measures.ScoredDoc(str(user), str(item), -float(place))
        for user, items in enumerate(lists)
        for place, item in enumerate(items)
    ]
    measures = {f"{name}@{k}": OTHERS[name] @ k for name in OTHERS for k in CUTS}
    theirs = {(m.query_id, m.measure): m.value for m in ir_measures.iter_calc(measures.values(), qrels, run)}
    for metric, measure in measures.items():
        expected = [theirs[str(user), measure] for user in range(80)]
        np.testing.assert_allclose(per_user(ranks, metric), expected, rtol=0, atol=1e-12)
    means = ir_measures.calc_aggregate([measures[m] for m in REPORTED], qrels, run)
    assert summary(ranks) == pytest.approx({m: means[measures[m]] for m in REPORTED}, rel=0, abs=1e-12)


def test_a_summary_without_users_is_zero_and_an_unknown_metric_names_the_known_ones():
    assert summary(np.empty(0, np.int64)) == dict.fromkeys(REPORTED, 0.0)
    for metric in ("precision@10", "ndcg", "ndcg@", "recall@-1"):
        with pytest.raises(
            ValueError, match=r"unknown metric '.*'; known: recall@k, hit@k, ndcg@k, mrr@k, map@k"
        ):
            per_user(np.array([1]), metric)


def two_systems(n=400, seed=3):
    """Ranks of which about a third differ, and a is a little better."""
    rng = np.random.default_rng(seed)
    b = rng.integers(1, 14, n)
    a = np.where(rng.random(n) < 0.4, np.maximum(b - rng.integers(-4, 5, n), 1), b)
    return {"a": a, "b": b}


def test_the_interval_is_the_paired_percentile_bootstrap_and_p_the_sign_flip_test():
    ranks = two_systems()
    ours = compare(ranks, "a", "b", "ndcg@10", draws=20_000, seed=1)
    difference = per_user(ranks["a"], "ndcg@10") - per_user(ranks["b"], "ndcg@10")
    assert 0.2 < np.mean(difference != 0) < 0.6
    interval = scipy.stats.bootstrap(
        (difference,), np.mean, n_resamples=20_000, method="percentile", batch=1000, rng=2
    ).confidence_interval
    width = interval.high - interval.low
    assert ours.difference == pytest.approx(difference.mean(), abs=1e-15)
    assert [ours.low, ours.high] == pytest.approx([interval.low, interval.high], abs=0.03 * width)
    test = scipy.stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=20_000, batch=1000, rng=2
    )
    assert 0.001 < test.pvalue < 0.6, "the case must not be clear-cut"
    assert ours.p == pytest.approx(test.pvalue, abs=0.015)
    assert ours == compare(ranks, "a", "b", "ndcg@10", draws=20_000, seed=1)
    other = compare(ranks, "b", "a", "ndcg@10", draws=20_000, seed=1)
    assert [other.difference, other.low, other.high] == pytest.approx(
        [-ours.difference, -ours.high, -ours.low], abs=0.03 * width
    )


def test_the_interval_counts_how_many_users_differ_where_all_differences_are_equal():
    ranks = {"a": np.ones(200, np.int64), "b": np.where(np.arange(200) % 4 == 0, 0, 3)}
    ours = compare(ranks, "a", "b", "recall@10", draws=20_000)
    low, high = scipy.stats.binom(200, 0.25).ppf([0.025, 0.975]) / 200
    assert ours.difference == 0.25
    assert [ours.low, ours.high] == pytest.approx([low, high], abs=0.006)


def test_equal_systems_show_no_difference_and_a_clear_one_is_shown():
    ranks = {"a": np.array([1, 3, 0, 12]), "b": np.array([1, 3, 0, 12]), "miss": np.zeros(4, np.int64)}
    same = compare(ranks, "a", "b", draws=200)
    assert (same.difference, same.low, same.high, same.p, same.users) == (0, 0, 0, 1, 4)
    assert not same.shown and str(same).endswith("p 1.0000: no difference shown")
    clear = compare({"a": np.ones(30, int), "b": np.full(30, 2)}, "a", "b", "mrr@10", draws=1000)
    assert (
        clear.shown and clear.low == clear.high == pytest.approx(0.5) and clear.p == pytest.approx(1 / 1001)
    )
    assert str(clear) == "a - b, mrr@10: +0.5000 [+0.5000, +0.5000] over 30 users, p 0.0010"
    assert clear.as_dict() == {
        "a": "a", "b": "b", "metric": "mrr@10", "difference": 0.5, "ci95": [0.5, 0.5], "p": clear.p,
        "p_holm": None, "effect_size": None, "users": 30, "shown": True, "verdict": "",
    }  # fmt: skip


def test_systems_that_are_the_same_are_no_comparison_that_others_pay_for():
    rng = np.random.default_rng(5)
    ranks = {name: rng.integers(0, 30, 300) for name in "ab"}
    ranks |= {"c": np.maximum(ranks["a"] - 2, 0), "served": ranks["a"]}
    pairs = [("c", "a"), ("served", "a"), ("b", "a")]
    found = compare_all(ranks, pairs)
    assert [(c.a, c.metric, c.p_holm) for c in found[:2]] == [
        ("served", "ndcg@10", None),
        ("served", "recall@10", None),
    ]
    assert all(c.difference == 0 and c.verdict for c in found[:2])
    assert found[2:] == holm([compare(ranks, a, "a", m) for a in "cb" for m in ("ndcg@10", "recall@10")])


def test_a_comparison_without_users_is_defined():
    nobody = np.empty(0, np.int64)
    nothing = compare({"a": nobody, "b": nobody}, "a", "b")
    assert (nothing.difference, nothing.low, nothing.high, nothing.p, nothing.users) == (0, 0, 0, 1, 0)
    assert not nothing.shown
