"""The learned blend: equal to logistic regression where it must be, and it finds planted weights."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from llmrec.candidates import Calibration, Candidates
from llmrec.fusion import Choices, fit_calibration, fit_logit


def planted(weights, users=600, candidates=12, seed=0, segments=None):
    """Targets drawn from the softmax of planted utilities; `weights` has one row a segment."""
    rng = np.random.default_rng(seed)
    weights = np.atleast_2d(weights)
    segments = rng.integers(0, len(weights), users) if segments is None else segments
    x = rng.random((users, candidates, weights.shape[1])).astype(np.float32)
    utility = np.einsum("ucf,uf->uc", x, weights[segments])
    p = np.exp(utility) / np.exp(utility).sum(axis=1, keepdims=True)
    target = np.array([rng.choice(candidates, p=row) for row in p])
    starts = candidates * np.arange(users)
    return Choices(x.reshape(-1, weights.shape[1]), starts, starts + target, segments)


def test_with_two_candidates_it_is_logistic_regression_on_their_difference():
    choices = planted([2.0, -1.0, 0.5], users=300, candidates=2)
    x = choices.x.reshape(-1, 2, 3)
    second = (choices.truth - choices.starts == 1).astype(int)
    for l2 in (0.5, 10.0):
        ours = fit_logit(choices, l2=l2, segment_l2=1e9)[0]
        library = LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-10, max_iter=10_000)
        library.fit(x[:, 1] - x[:, 0], second)
        np.testing.assert_allclose(ours, library.coef_[0], atol=2e-3)


def test_planted_weights_are_found_and_useless_features_get_little():
    truth = np.array([4.0, 2.0, 0.0])
    found = fit_logit(planted(truth, users=4000), l2=1e-3)[0]
    np.testing.assert_allclose(found, truth, atol=0.35)


def test_segments_differ_where_the_data_say_so_and_not_where_there_is_little():
    truth = np.array([[4.0, 0.0], [0.0, 4.0]])
    many = fit_logit(planted(truth, users=3000), l2=0.1, segment_l2=1.0)
    assert many[0, 0] > many[0, 1] + 2 and many[1, 1] > many[1, 0] + 2
    few = fit_logit(planted(truth, users=20), l2=0.1, segment_l2=100.0)
    assert np.abs(few[0] - few[1]).max() < 0.5


def test_weights_that_must_not_be_negative_are_not():
    found = fit_logit(planted([3.0, -2.0]), segment_l2=1e9, positive=[True, True])[0]
    assert found[0] > 2 and found[1] == pytest.approx(0.0, abs=1e-6)


def test_the_gradient_is_that_of_the_likelihood():
    """At the solution no small step raises the penalised likelihood, recomputed by a plain loop."""
    choices = planted([1.0, 2.0], users=40, candidates=5)
    weights = fit_logit(choices, l2=2.0, segment_l2=1e9)[0]

    def value(w):
        total = -0.5 * 2.0 * (w @ w)
        ends = np.append(choices.starts[1:], len(choices.x))
        for start, end, truth in zip(choices.starts, ends, choices.truth, strict=True):
            utility = choices.x[start:end] @ w
            total += utility[truth - start] - np.log(np.exp(utility).sum())
        return total

    best = value(weights)
    for step in np.eye(2) * 1e-2:
        assert value(weights + step) <= best + 1e-6 >= value(weights - step)


def test_some_of_the_users_are_themselves():
    choices = planted([[1.0, 2.0], [0.0, 1.0]], users=30)
    some = np.array([2, 7, 29])
    part = choices.take(some)
    for row, user in enumerate(some):
        np.testing.assert_array_equal(part.x[12 * row : 12 * row + 12], choices.x[12 * user : 12 * user + 12])
        assert part.truth[row] - 12 * row == choices.truth[user] - 12 * user


def test_calibration_finds_the_temperature_and_the_share_that_scores_say_nothing_of():
    """Targets are drawn from the softmax of 3 times the score, but for a quarter that come from the prior."""
    rng = np.random.default_rng(1)
    users, n = 3000, 20
    prior = rng.dirichlet(np.ones(n)).astype(np.float32)
    scores = rng.normal(size=(users, n)).astype(np.float32)
    p = np.exp(3 * scores) / np.exp(3 * scores).sum(axis=1, keepdims=True)
    mixed = 0.75 * p + 0.25 * prior
    targets = np.array([rng.choice(n, p=row / row.sum()) for row in mixed])
    starts = n * np.arange(users)
    found, nats = fit_calibration(scores.ravel(), starts, starts + targets, prior[targets])
    assert found.temperature == pytest.approx(3.0, rel=0.1) and found.mix == pytest.approx(0.25, abs=0.03)
    items = np.arange(n, dtype=np.int32)
    ranks = np.zeros((n, 1), np.int32)
    rows = [found.probabilities(Candidates(items, row, ("a",), row[:, None], ranks), prior) for row in scores]
    np.testing.assert_allclose(np.sum(rows, axis=1), 1.0, atol=1e-6)
    assert nats == pytest.approx(-np.log(np.stack(rows)[np.arange(users), targets]).mean(), abs=1e-5)


def test_calibration_without_candidates_is_the_prior():
    nothing = Candidates(
        np.empty(0, np.int32), np.empty(0, np.float32), (), np.empty((0, 0)), np.empty((0, 0))
    )
    prior = np.array([0.2, 0.8], np.float32)
    np.testing.assert_allclose(Calibration(2.0, 0.3).probabilities(nothing, prior), prior, rtol=1e-6)
    found, nats = fit_calibration(np.empty(0, np.float32), np.zeros(2, int), np.array([-1, -1]), prior)
    assert nats == pytest.approx(-np.log(prior * found.mix).mean(), rel=1e-4)
    assert fit_calibration(np.empty(0, np.float32), np.zeros(0, int), np.zeros(0, int), prior[:0])[1] == 0.0
