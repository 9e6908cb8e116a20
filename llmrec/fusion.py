"""A learned blend: a conditional logit over each user's candidates, fitted on held-out events.

The utility of candidate i is the sum over components c of

    a_c * normalised score + b_c * [c proposed i] + g_c / log2(1 + rank of i by c),

and the probability that i is the next event is the softmax of the utilities over the candidates
(McFadden 1974). The few weights are regularised; those of a segment of users are drawn towards the ones
of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from llmrec.candidates import Calibration
from llmrec.protocols import Floats


@dataclass(frozen=True, slots=True)
class Choices:
    """Candidates of users, one row a candidate, users one after another; each user has a target.

    Parameters
    ----------
    x
        Features, shape (rows, features).
    starts
        First row of each user, ascending, shape (users,).
    truth
        Row of the target of each user, shape (users,).
    segments
        Segment of each user, from 0, shape (users,).
    """

    x: Floats
    starts: NDArray[np.int64]
    truth: NDArray[np.int64]
    segments: NDArray[np.int64]

    def take(self, users: NDArray[np.int64]) -> Choices:
        """Some of the users, ascending."""
        ends = np.append(self.starts[1:], len(self.x))
        rows = np.concatenate([np.empty(0, np.int64), *(np.arange(self.starts[u], ends[u]) for u in users)])
        counts = ends[users] - self.starts[users]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(users) else np.empty(0, np.int64)
        truth = starts + self.truth[users] - self.starts[users]
        return Choices(self.x[rows], starts, truth, self.segments[users])


def fit_logit(
    choices: Choices, l2: float = 1.0, segment_l2: float = 20.0, positive: Sequence[bool] | None = None
) -> NDArray[np.float64]:
    """Maximise the penalised log-likelihood of the targets; weights by segment.

    Parameters
    ----------
    l2
        Penalty on the squared weights of all users together, in nats.
    segment_l2
        Penalty on the squared deviation of a segment's weights from them.
    positive
        Features whose weight may not fall below 0; none if not given.

    Returns
    -------
    NDArray
        Shape (segments, features).
    """
    n_features = choices.x.shape[1]
    n_segments = int(choices.segments.max(initial=0)) + 1
    x = choices.x.astype(np.float64)
    counts = np.diff(np.append(choices.starts, len(x)))
    of_row = np.repeat(choices.segments, counts)
    user = np.repeat(np.arange(len(counts)), counts)
    chosen = x[choices.truth]
    # Deviations in units in which their penalty is l2 too: the problem stays well conditioned.
    scale = np.sqrt(l2 / segment_l2) if n_segments > 1 else 0.0

    def by_segment(flat: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(flat[:n_features] + scale * flat[n_features:].reshape(n_segments, n_features))

    rows_of = [np.flatnonzero(of_row == segment) for segment in range(n_segments)]
    parts = [x[rows] for rows in rows_of]
    reached = np.zeros((n_segments, n_features))
    np.add.at(reached, choices.segments, chosen)

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = by_segment(flat)
        utility = np.empty(len(x))
        for rows, part, weight in zip(rows_of, parts, weights, strict=True):
            utility[rows] = part @ weight
        utility -= np.maximum.reduceat(utility, choices.starts)[user]
        e = np.exp(utility)
        total = np.add.reduceat(e, choices.starts)
        value = -float((utility[choices.truth] - np.log(total)).sum())
        p = e / total[user]
        expected = np.stack([part.T @ p[rows] for rows, part in zip(rows_of, parts, strict=True)])
        gradient = expected - reached
        whole = np.concatenate([gradient.sum(axis=0), scale * gradient.ravel()])
        return value + 0.5 * l2 * float(flat @ flat), whole + l2 * flat

    bounds: list[tuple[float | None, float | None]] = [
        (0.0 if positive is not None and positive[f] else None, None) for f in range(n_features)
    ]
    bounds += [(None, None)] * (n_segments * n_features)
    solved = scipy.optimize.minimize(
        loss,
        np.zeros(n_features * (1 + n_segments)),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 500, "ftol": 1e-10, "gtol": 1e-6},
    )
    return by_segment(solved.x)


def fit_calibration(
    total: Floats, starts: NDArray[np.int64], truth: NDArray[np.int64], prior: Floats
) -> tuple[Calibration, float]:
    """Temperature and mix that make the targets most likely, and the mean nats of a target.

    Parameters
    ----------
    total
        Score of each candidate, users one after another, shape (rows,).
    starts, truth
        First row of each user; row of the target, -1 where it is no candidate. Shape (users,).
    prior
        Prior probability of each user's target, shape (users,).
    """
    if not len(truth):
        return Calibration(), 0.0
    counts = np.diff(np.append(starts, len(total)))
    filled = counts > 0
    user = np.repeat(np.arange(len(counts)), counts)
    top = np.zeros(len(counts))
    top[filled] = np.maximum.reduceat(total.astype(np.float64), starts[filled])
    shifted = total - top[user]
    there = np.flatnonzero(truth >= 0)
    own = total[truth[there]] - top[there]

    # That something never happened to n people does not say that it cannot (rule of succession).
    least = 1.0 / (len(truth) + 2)

    def parameters(free: NDArray[np.float64]) -> tuple[float, float]:
        mix = 1.0 / (1.0 + np.exp(-np.clip(free[1], -14, 14)))
        return float(np.exp(np.clip(free[0], -7, 7))), float(np.clip(mix, least, 1.0 - least))

    def nats(free: NDArray[np.float64]) -> float:
        temperature, mix = parameters(free)
        sums = np.zeros(len(counts))
        np.add.at(sums, user, np.exp(temperature * shifted))
        chosen = np.zeros(len(counts))
        chosen[there] = np.exp(temperature * own) / sums[there]
        return -float(np.log((1.0 - mix) * chosen + mix * prior).mean())

    start, precise = np.array([np.log(5.0), 0.0]), {"xatol": 1e-3, "fatol": 1e-6}
    solved = scipy.optimize.minimize(nats, start, method="Nelder-Mead", options=precise)
    temperature, mix = parameters(solved.x)
    return Calibration(round(temperature, 6), round(mix, 6)), float(solved.fun)
