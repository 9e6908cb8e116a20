"""Choosing the weights of a blend on held-out events; every trial is logged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.candidates import LM, Calibration, Weights, discount
from llmrec.features import Features
from llmrec.fusion import Choices, fit_calibration, fit_logit
from llmrec.metrics import Values, clear, per_user, standard_error
from llmrec.protocols import Floats

OBJECTIVE = "ndcg@10"
"""What settings and weights are chosen by."""

GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
"""Weights that are tried."""

LM_GRID = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
"""Weights of the language model that are tried."""

SEGMENTS = (0, 5, 10, 20, 50)
"""Shortest history of each segment of users with weights of their own."""

ENOUGH = 100
"""Users with a found target that a segment needs for that."""


def search_weights(
    features: Features,
    fixed: Mapping[str, float],
    log: list[dict[str, Any]],
    kind: str,
    most: float = GRID[-1],
) -> dict[str, float]:
    """Coordinate ascent on NDCG@10 over the weights of `GRID` up to `most`; a tie keeps the smaller weight.

    Starts from `fixed`, or, where that is empty, from the best single component.
    """
    grid = [weight for weight in GRID if weight <= most]

    def value(weights: Mapping[str, float]) -> float:
        return float(per_user(features.of_targets(Weights(weights)), OBJECTIVE).mean())

    best: dict[str, float] = dict(fixed)
    if not best:
        alone = {name: value({name: 1.0}) for name in features.names}
        best = {max(features.names, key=lambda n: alone[n]): 1.0}
    score = value(best)
    for _ in range(3):
        before = score
        for name in features.names:
            # Alone, a component ranks the same at every weight: the tie would shrink it for nothing.
            if name in fixed or not any(w for n, w in best.items() if n != name):
                continue
            trials = {w: value({**best, name: w}) for w in grid}
            chosen = max(grid, key=lambda w: (round(trials[w], 7), -w))
            if trials[chosen] > score + 1e-7 or (
                trials[chosen] >= score - 1e-7 and chosen < best.get(name, 0)
            ):
                best[name], score = chosen, trials[chosen]
        log.append({"search": f"{kind} weights", "weights": dict(best), OBJECTIVE: round(score, 5)})
        if score <= before + 1e-6:
            break
    return {name: w for name, w in best.items() if w > 0}


def learned_weights(features: Features, l2: float) -> Weights:
    """Weights of a conditional logit, by segment of history length; scaled so that the largest is 1."""
    found = np.flatnonzero(features.truth >= 0)
    bounds = _bounds(features.lengths[found])
    segments = np.searchsorted(bounds, features.lengths, side="right") - 1
    x = np.concatenate(
        [features.scores, (features.ranks > 0).astype(np.float32), discount(features.ranks)], axis=1
    )
    starts, truth = features.starts, np.maximum(features.truth, 0)
    choices = Choices(x, starts, truth, np.maximum(segments, 0)).take(found)
    # A better score or rank must not count against an item; having been proposed at all may.
    n = len(features.names)
    kinds = np.repeat(["score", "found", "rank"], n)
    fitted = fit_logit(choices, l2=l2, positive=(kinds != "found").tolist())
    fitted[:, kinds != "found"] = np.maximum(fitted[:, kinds != "found"], 0.0)
    fitted = fitted / max(float(np.abs(fitted).max()), 1e-9)

    def named(row: NDArray[np.float64]) -> Weights:
        kinds = row.reshape(3, len(features.names))
        score, found, rank = (
            {n: round(float(v), 5) for n, v in zip(features.names, kind, strict=True)} for kind in kinds
        )
        lm = score.pop(LM, 0.0)
        if not lm:
            # It is not asked then, so it proposes nothing.
            found.pop(LM, None), rank.pop(LM, None)
        return Weights(score, lm, found, rank)

    first, *rest = (named(row) for row in fitted)
    return replace(first, longer=tuple(zip(bounds[1:], rest, strict=True)))


def cross_fitted(features: Features, way: Callable[[Features], Weights], seed: int) -> Values:
    """NDCG@10 of each query under weights that were fitted on the other half of the queries."""
    half = np.random.default_rng(seed).permutation(len(features.truth)) % 2
    judged = np.empty(len(half))
    for side in (0, 1):
        own = np.flatnonzero(half == side)
        fitted = way(features.take(np.flatnonzero(half != side)))
        judged[own] = per_user(features.take(own).of_targets(fitted), OBJECTIVE)
    return judged


def _bounds(lengths: NDArray[np.int64]) -> list[int]:
    """Shortest history of each segment; one with too few users joins the one below."""
    kept = [0]
    for least, most in itertools.pairwise((*SEGMENTS[1:], np.inf)):
        if ((lengths >= least) & (lengths < most)).sum() >= ENOUGH:
            kept.append(int(least))
    return kept


def choose_weights(
    features: Features, fallback: Mapping[str, float], log: list[dict[str, Any]], kind: str, seed: int
) -> Weights:
    """The better of searched and learned weights, by cross-fitting over users: each half judges the other's.

    With few users, or where nothing is gained, the searched ones stay: they are fewer.
    """
    if not len(features.truth):
        return Weights(fallback)
    alone = {
        n: float(per_user(features.of_targets(Weights({n: 1.0})), OBJECTIVE).mean()) for n in features.names
    }
    log.append({"search": f"{kind}, each alone", OBJECTIVE: {n: round(v, 5) for n, v in alone.items()}})
    searched = Weights(search_weights(features, {}, log, kind))
    if (features.truth >= 0).sum() < 2 * ENOUGH:
        return searched
    ways: dict[str, Callable[[Features], Weights]] = {
        "searched": lambda part: Weights(search_weights(part, {}, [], kind)),
        **{f"learned, l2 {l2:g}": partial(learned_weights, l2=l2) for l2 in (1.0, 10.0)},
    }
    values = {name: float(cross_fitted(features, way, seed).mean()) for name, way in ways.items()}
    best = max(values, key=lambda name: (round(values[name], 5), name == "searched"))
    rounded = {name: round(value, 5) for name, value in values.items()}
    log.append({"search": f"{kind} blend, cross-fitted", OBJECTIVE: rounded, "chosen": best})
    return searched if best == "searched" else ways[best](features)


def lm_weight(features: Features, weights: Weights, log: list[dict[str, Any]], kind: str, seed: int) -> float:
    """Weight of the language model on top of a blend, fitted on held-out events; 0 leaves it out.

    The best weight of a grid wins, but only if choosing so pays: by cross-fitting over users, where the
    weight is chosen on one half and judged on the other, the gain in NDCG@10 over weight 0 must exceed twice
    its standard error. The gain on the users that the weight was chosen on says too much, since the best of
    many noisy ones looks good.
    """
    if LM not in features.names or not len(features.truth):
        return 0.0
    means, best = best_lm_weight(features, weights)
    gain = cross_fitted(
        features, lambda part: weights.with_lm(best_lm_weight(part, weights)[1]), seed
    ) - per_user(features.of_targets(weights.with_lm(0.0)), OBJECTIVE)
    chosen = best if clear(gain) else 0.0
    log.append(
        {
            "search": f"{kind} weight of the language model",
            OBJECTIVE: {str(w): round(value, 5) for w, value in means.items()},
            **gained(gain),
            "chosen": chosen,
        }
    )
    return chosen


def gained(gain: Values) -> dict[str, float | None]:
    """Mean gain of some users and its standard error, as the log of a search has them."""
    error = standard_error(gain)
    return {
        "gain": round(float(gain.mean()), 5) if len(gain) else 0.0,
        "standard_error": None if error is None else round(error, 5),
    }


def best_lm_weight(features: Features, weights: Weights) -> tuple[dict[float, float], float]:
    """NDCG@10 by weight of the language model, and the best weight, the smaller of equals."""
    means = {
        w: float(per_user(features.of_targets(weights.with_lm(w)), OBJECTIVE).mean())
        if len(features.truth)
        else 0.0
        for w in (0.0, *LM_GRID)
    }
    return means, max(means, key=lambda w: (round(means[w], 7), -w))


def weights_with_lm(
    features: Features, weights: Weights, log: list[dict[str, Any]], kind: str, seed: int
) -> Weights:
    """The language model's score as one more feature of a learned blend, or beside the weights as they are.

    A blend in which all weights are fitted anew is taken where, by cross-fitting over users, it beats the
    weights as they are, the same fitted anew without the language model, and a weight on top of them; the
    first two by more than twice the standard error, so that what a new fit gains alone is not credited to
    the model. With few users there is the weight on top alone, see `lm_weight`.
    """
    without = weights.with_lm(0.0)
    on_top = without.with_lm(lm_weight(features, without, log, kind, seed))
    if LM not in features.names or (features.truth >= 0).sum() < 2 * ENOUGH:
        return on_top
    learned = {f"l2 {l2:g}": partial(learned_weights, l2=l2) for l2 in (1.0, 10.0)}
    ways: dict[str, Callable[[Features], Weights]] = {
        "as given": lambda part: without,
        **{f"without, {n}": partial(_plain, fit) for n, fit in learned.items()},
        "on top": lambda part: without.with_lm(best_lm_weight(part, without)[1]),
        **{f"with, {n}": fit for n, fit in learned.items()},
    }
    values = {name: cross_fitted(features, way, seed) for name, way in ways.items()}
    means = {name: round(float(value.mean()), 5) for name, value in values.items()}
    control, best = (
        max((name for name in ways if name.startswith(starts)), key=lambda name: means[name])
        for starts in (("as given", "without"), ("with, ",))
    )
    gain = values[best] - values[control]
    fitted = ways[best](features)
    taken = clear(gain) and means[best] > means["on top"] and fitted.most_lm > 0
    log.append(
        {
            "search": f"{kind} blend with the language model, cross-fitted",
            OBJECTIVE: means,
            **gained(gain),
            "chosen": best if taken else "on top",
        }
    )
    return replace(fitted, plain=ways[control](features)) if taken else on_top


def _plain(fit: Callable[[Features], Weights], features: Features) -> Weights:
    return fit(features.without(LM))


def calibrated(features: Features, weights: Weights, prior: Floats, log: list[dict[str, Any]]) -> Calibration:
    """Calibrate the probabilities that these weights give by history.

    Parameters
    ----------
    prior
        Popularity of each query's target, shape (queries,).
    """
    found, nats = fit_calibration(features.total(weights), features.starts, features.truth, prior)
    alone = -float(np.log(prior).mean()) if len(prior) else 0.0
    log.append({"search": "calibration", "nats": round(nats, 4), "nats of popularity": round(alone, 4)})
    return found
