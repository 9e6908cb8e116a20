"""Choosing settings and weights on held-out events.

Everything is chosen by NDCG@10 on events that no fitted parameter has seen; every trial is logged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from llmrec.families import FAMILIES, Texts, TrainingLog
from llmrec.fusion import Choices, fit_logit
from llmrec.metrics import Ranks, Values, per_user, summary
from llmrec.pipeline import LM, Weights, discount, gather, normalise
from llmrec.protocols import Floats, Hits, Retriever, Scorer
from llmrec.recipe import HeldOut, Recipe, RetrievalConfig, fit_retrievers, ranks_in
from llmrec.retrieve.dense import ProfileConfig, ProfileRetriever
from llmrec.retrieve.linear import EASERetriever
from llmrec.retrieve.transitions import TransitionsConfig, TransitionsRetriever

GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
"""Weights that are tried."""

OBJECTIVE = "ndcg@10"

SEGMENTS = (0, 5, 10, 20, 50)
"""Shortest history of each segment of users with weights of their own."""

ENOUGH = 100
"""Users with a found target that a segment needs for that."""


class ScoringRetriever(Retriever, Scorer, Protocol):
    """A language model that proposes items and scores those of others."""


def quality(retriever: Retriever, held_out: HeldOut, k: int = 10) -> float:
    """NDCG@10 of one retriever alone."""
    hits = retriever.retrieve(held_out.queries, k)
    return summary(ranks_in((h.items for h in hits), held_out.targets), [OBJECTIVE])[OBJECTIVE]


def chosen_on(name: str, held_out: HeldOut) -> dict[str, Any]:
    """The entry of the log that says on which events a search chose."""
    return {"search": name, "users": len(held_out.queries), "sha256": held_out.sha256()}


def known_item_queries(held_out: HeldOut, lines: Sequence[str], seed: int) -> HeldOut:
    """Add a typed query to each held-out event: two or three words, drawn from the line of its target."""
    rng = np.random.default_rng(seed)
    queries, targets = [], []
    for query, target in zip(held_out.queries, held_out.targets, strict=True):
        words = sorted({w for w in re.findall(r"\w+", lines[target]) if len(w) > 2})
        if not words:
            continue
        drawn = rng.choice(words, size=min(len(words), int(rng.integers(2, 4))), replace=False)
        queries.append(replace(query, text=" ".join(drawn)))
        targets.append(target)
    return HeldOut(queries, np.array(targets, dtype=np.int32))


def like_last_item(held_out: HeldOut) -> HeldOut:
    """Shorten each history to its last item: what follows it is what is asked of similar items."""
    rows = [i for i, q in enumerate(held_out.queries) if len(q.history)]
    queries = [replace(held_out.queries[i], history=held_out.queries[i].history[-1:]) for i in rows]
    return HeldOut(queries, held_out.targets[rows])


@dataclass(frozen=True, slots=True)
class Features:
    """Normalised scores of all candidates of all queries, one row a candidate, queries one after another.

    Parameters
    ----------
    names
        Components, m of them.
    scores
        Shape (rows, m).
    ranks
        Rank at which each component proposed the candidate, 0 if it did not, shape (rows, m).
    starts
        First row of each query, shape (queries,).
    truth
        Row of the target of each query, -1 where no component found it. Shape (queries,).
    lengths
        Length of each query's history, shape (queries,).
    """

    names: tuple[str, ...]
    scores: Floats
    ranks: NDArray[np.int32]
    starts: NDArray[np.int64]
    truth: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, hits: Mapping[str, Sequence[Hits]], held_out: HeldOut) -> Features:
        """Gather the hits of each query."""
        blocks, placed, starts, truth, row = [], [], [], [], 0
        for i, target in enumerate(held_out.targets):
            items, scores, ranks = gather({name: found[i] for name, found in hits.items()})
            at = int(np.searchsorted(items, target))
            blocks.append(scores)
            placed.append(ranks)
            starts.append(row)
            truth.append(row + at if at < len(items) and items[at] == target else -1)
            row += len(items)
        scores = np.concatenate([np.zeros((0, len(hits)), np.float32), *blocks])
        ranks = np.concatenate([np.zeros((0, len(hits)), np.int32), *placed])
        lengths = np.array([len(query.history) for query in held_out.queries], np.int64)
        where = np.array(starts, np.int64), np.array(truth, np.int64)
        return cls(tuple(hits), scores, ranks, *where, lengths)

    @classmethod
    def with_lm(
        cls,
        hits: Mapping[str, Sequence[Hits]],
        proposed: Sequence[Hits],
        scorer: Scorer,
        held_out: HeldOut,
    ) -> Features:
        """Gather hits and the language model's own; its column holds its score of every candidate."""
        named = {**hits, LM: proposed}
        plain = cls.of(named, held_out)
        unions = [gather({n: found[i] for n, found in named.items()})[0] for i in range(len(proposed))]
        columns = [normalise(s) for s in scorer.score(held_out.queries, unions)]
        scores = plain.scores.copy()
        scores[:, -1] = np.concatenate([np.zeros(0, np.float32), *columns])
        return replace(plain, scores=scores)

    def take(self, queries: NDArray[np.int64]) -> Features:
        """Some of the queries, ascending."""
        ends = np.append(self.starts[1:], len(self.scores))
        pieces = [np.arange(self.starts[q], ends[q]) for q in queries]
        rows = np.concatenate([np.empty(0, np.int64), *pieces])
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1].astype(np.int64)
        old, truth = self.starts[queries], self.truth[queries]
        truth = np.where(truth >= 0, truth - old + starts, -1)
        return Features(self.names, self.scores[rows], self.ranks[rows], starts, truth, self.lengths[queries])

    def total(self, weights: Weights) -> Floats:
        """Score of each candidate under these weights, as the pipeline has it, shape (rows,)."""
        counts = np.diff(np.append(self.starts, len(self.scores)))
        total = np.zeros(len(self.scores), np.float32)
        given = [weights.for_history(int(n)) for n in self.lengths]
        for chosen in {id(w): w for w in given}.values():
            rows = np.repeat([w is chosen for w in given], counts)
            row = [np.array([of.get(n, 0.0) for n in self.names], np.float32) for of in _kinds(chosen)]
            total[rows] = self.scores[rows] @ row[0]
            if chosen.found or chosen.rank:
                ranks = self.ranks[rows]
                total[rows] += (ranks > 0) @ row[1] + discount(ranks) @ row[2]
        if weights.lm and LM in self.names:
            total += weights.lm * self.scores[:, self.names.index(LM)]
        return total

    def of_targets(self, weights: Weights) -> Ranks:
        """Rank of each target under these weights, ties in the order of item codes; 0 if not found."""
        return self.targets_in(self.total(weights))

    def targets_in(self, total: Floats) -> Ranks:
        """Rank of each target under a score of each candidate, shape (rows,)."""
        counts = np.diff(np.append(self.starts, len(total)))
        found = self.truth >= 0
        own = np.full(len(found), np.inf)
        own[found] = total[self.truth[found]]
        theirs = np.repeat(own, counts)
        earlier = np.arange(len(total)) < np.repeat(self.truth, counts)
        ahead = (total > theirs) | ((total == theirs) & earlier)
        cumulative = np.append(0, np.cumsum(ahead))
        ranks = cumulative[self.starts + counts] - cumulative[self.starts] + 1
        return np.where(found, ranks, 0)


def _kinds(weights: Weights) -> tuple[Mapping[str, float], ...]:
    return weights.retrievers, weights.found, weights.rank


def search_weights(
    features: Features, fixed: Mapping[str, float], log: list[dict[str, Any]], kind: str
) -> dict[str, float]:
    """Coordinate ascent on NDCG@10 over the weights of `GRID`; a tie keeps the smaller weight.

    Starts from `fixed`, or, where that is empty, from the best single component.
    """

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
            trials = {w: value({**best, name: w}) for w in GRID}
            chosen = max(GRID, key=lambda w: (round(trials[w], 7), -w))
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
    bounds = [b for b in SEGMENTS if (features.lengths[found] >= b).sum() >= ENOUGH]
    segments = np.searchsorted(bounds, features.lengths, side="right") - 1
    x = np.concatenate(
        [features.scores, (features.ranks > 0).astype(np.float32), discount(features.ranks)], axis=1
    )
    starts, truth = features.starts, np.maximum(features.truth, 0)
    choices = Choices(x, starts, truth, np.maximum(segments, 0)).take(found)
    fitted = fit_logit(choices, l2=l2)
    fitted = fitted / max(float(np.abs(fitted).max()), 1e-9)

    def named(row: NDArray[np.float64]) -> Weights:
        kinds = row.reshape(3, len(features.names))
        score, found, rank = (
            {n: round(float(v), 5) for n, v in zip(features.names, kind, strict=True)} for kind in kinds
        )
        return Weights(score, 0.0, found, rank)

    first, *rest = (named(row) for row in fitted)
    return replace(first, longer=tuple(zip(bounds[1:], rest, strict=True)))


def choose_weights(
    features: Features, fallback: Mapping[str, float], log: list[dict[str, Any]], kind: str, seed: int
) -> Weights:
    """The better of searched and learned weights, by cross-fitting over users: each half judges the other's.

    With few users, or where nothing is gained, the searched ones stay: they are fewer.
    """
    searched = Weights(search_weights(features, {}, log, kind)) if len(features.truth) else Weights(fallback)
    if (features.truth >= 0).sum() < 2 * ENOUGH:
        return searched
    half = np.random.default_rng(seed).permutation(len(features.truth)) % 2
    ways: dict[str, Callable[[Features], Weights]] = {
        "searched": lambda part: Weights(search_weights(part, {}, [], kind)),
        **{f"learned, l2 {l2:g}": partial(learned_weights, l2=l2) for l2 in (1.0, 10.0)},
    }
    values = {}
    for name, way in ways.items():
        judged = np.empty(len(half))
        for side in (0, 1):
            fitted = way(features.take(np.flatnonzero(half != side)))
            judged[half == side] = per_user(
                features.take(np.flatnonzero(half == side)).of_targets(fitted), OBJECTIVE
            )
        values[name] = float(judged.mean())
    best = max(values, key=lambda name: (round(values[name], 5), name == "searched"))
    rounded = {name: round(value, 5) for name, value in values.items()}
    log.append({"search": f"{kind} blend, cross-fitted", OBJECTIVE: rounded, "chosen": best})
    return searched if best == "searched" else ways[best](features)


def lm_weight(features: Features, weights: Weights, log: list[dict[str, Any]], kind: str) -> float:
    """Weight of the language model in the blend, fitted on held-out events; 0 leaves it out.

    The best weight of a grid wins, but only if its gain in NDCG@10 over weight 0 exceeds twice the
    standard error of that gain over users: a gain within the noise does not pay for the model, and the
    best of ten noisy ones often exceeds one standard error.
    """
    if LM not in features.names or not len(features.truth):
        return 0.0

    def values(weight: float) -> Values:
        return per_user(features.of_targets(weights.with_lm(weight)), OBJECTIVE)

    without = values(0.0)
    trials = {w: values(w) for w in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)}
    best = max(trials, key=lambda w: float(trials[w].mean()))
    gain = trials[best] - without
    error = float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else np.inf
    chosen = best if gain.mean() > 2 * error else 0.0
    log.append(
        {
            "search": f"{kind} weight of the language model",
            OBJECTIVE: {str(w): round(float(v.mean()), 5) for w, v in {0.0: without, **trials}.items()},
            "gain": round(float(gain.mean()), 5),
            "standard_error": round(error, 5),
            "chosen": chosen,
        }
    )
    return chosen


def with_language_model(
    recipe: Recipe,
    retrievers: Mapping[str, Retriever],
    model: ScoringRetriever,
    held_out: HeldOut,
    lines: Sequence[str],
    config: RetrievalConfig,
) -> Recipe:
    """Fit the weight of the language model for requests by history and with typed words.

    Neither `retrievers` nor `model` may have been fitted on `held_out`.
    """
    held_out = held_out.sample(config.search_users, config.seed)
    log = [entry for entry in recipe.log if "language model" not in entry["search"]]
    log.append(chosen_on("held-out events of the language model", held_out))

    def weighted(kind: str, weights: Weights, part: HeldOut) -> Weights:
        if len(part.targets) == 0:
            return weights.with_lm(0.0)
        used = [
            n for n in recipe.settings if any(w.uses(n) for w in (weights, *(w for _, w in weights.longer)))
        ]
        hits = {n: retrievers[n].retrieve(part.queries, config.depth) for n in used}
        proposed = model.retrieve(part.queries, config.depth)
        features = Features.with_lm(hits, proposed, model, part)
        return weights.with_lm(lm_weight(features, weights, log, kind))

    typed = known_item_queries(held_out, lines, config.seed)
    history = weighted("history", recipe.history, held_out)
    return replace(recipe, history=history, query=weighted("query", recipe.query, typed), log=log)


def _walk(
    name: str,
    start: BaseModel,
    space: Mapping[str, Sequence[float]],
    trial: Callable[[Any], float],
    log: list[dict[str, Any]],
) -> Any:
    """One pass over the settings of `space`, one at a time; keeps what is better."""
    best, score = start, trial(start)
    for setting, options in space.items():
        for option in options:
            other = type(start)(**{**best.model_dump(), setting: option})
            if other == best:
                continue
            value = trial(other)
            log.append({"search": name, setting: option, OBJECTIVE: round(value, 5), "best": round(score, 5)})
            if value > score:
                best, score = other, value
    return best


def search_recipe(
    log: TrainingLog,
    held_out: HeldOut,
    texts: Texts,
    config: RetrievalConfig,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[Recipe, dict[str, Retriever]]:
    """Choose settings and weights, and return them with the retrievers fitted on the log.

    No fitted parameter sees `held_out`. EASE, transitions and profile have their settings searched; the
    other families of the configuration keep theirs.
    """
    recipe = Recipe.default(config)
    held_out = held_out.sample(config.search_users, config.seed)
    if not config.search or len(held_out.queries) == 0:
        return recipe, fit_retrievers(log, texts, recipe)
    trials = recipe.log
    trials.append(chosen_on("held-out events", held_out))
    searches = {"transitions": _search_transitions, "ease": _search_ease, "profile": _search_profile}
    settings: dict[str, BaseModel] = {}
    retrievers: dict[str, Retriever] = {}
    for name, start in recipe.settings.items():
        if name in searches:
            on_stage(name)
            settings[name], retrievers[name] = searches[name](log, texts, start, held_out, trials)
        else:
            if FAMILIES[name].learns:
                on_stage(name)
            settings[name], retrievers[name] = start, FAMILIES[name].fit(log, texts, start)
    recipe = replace(recipe, settings=settings)
    on_stage("weights")
    return _with_weights(recipe, retrievers, held_out, texts, config), retrievers


def _search_transitions(
    log: TrainingLog, texts: Texts, start: Any, held_out: HeldOut, trials: list[dict[str, Any]]
) -> tuple[BaseModel, Retriever]:
    def fit(config: TransitionsConfig) -> TransitionsRetriever:
        return TransitionsRetriever.fit(log.histories, len(texts.lines), config, log.weights)

    space = {"step_decay": (0.5, 0.9), "window": (5, 20), "backward": (0.0, 1.0), "smoothing": (1.0, 20.0)}
    best = _walk("transitions", start, space, lambda c: quality(fit(c), held_out), trials)
    fitted = fit(best)
    decays = {"decay": (0.5, 0.8, 0.9)}
    best = _walk("transitions", best, decays, lambda c: quality(fitted.with_decay(c.decay), held_out), trials)
    return best, fitted.with_decay(best.decay)


def _search_profile(
    log: TrainingLog, texts: Texts, start: Any, held_out: HeldOut, trials: list[dict[str, Any]]
) -> tuple[BaseModel, Retriever]:
    def make(config: ProfileConfig) -> ProfileRetriever:
        return ProfileRetriever(texts.vectors, texts.index, config)

    decays = {"decay": (0.5, 0.8, 0.9, 0.95)}
    best = _walk("profile", start, decays, lambda c: quality(make(c), held_out), trials)
    return best, make(best)


def _search_ease(
    log: TrainingLog, texts: Texts, start: Any, held_out: HeldOut, trials: list[dict[str, Any]]
) -> tuple[BaseModel, Retriever]:
    """Try penalties and decays; solving is the costly part, decays of the history come for nothing after."""
    best, best_score = None, -1.0
    for l2 in (start.l2 / 4, start.l2, start.l2 * 4):
        for fit_decay in {1.0, start.fit_decay}:
            config = start.model_copy(update={"l2": l2, "fit_decay": fit_decay})
            model = EASERetriever.fit(log.histories, len(texts.lines), config, log.weights)
            for decay in (0.7, 0.8, 0.9, 0.95, 1.0):
                value = quality(model.with_decay(decay), held_out)
                trial = {"search": "ease", "l2": l2, "fit_decay": fit_decay, "decay": decay}
                trials.append({**trial, OBJECTIVE: round(value, 5)})
                if value > best_score:
                    best, best_score = model.with_decay(decay), value
    assert best is not None
    return best.config, best


def _with_weights(
    recipe: Recipe,
    retrievers: Mapping[str, Retriever],
    held_out: HeldOut,
    texts: Texts,
    config: RetrievalConfig,
) -> Recipe:
    """Search the weights for requests by history, with typed words, and for similar items."""
    log = recipe.log

    def features(names: Sequence[str], part: HeldOut) -> Features:
        hits = {n: retrievers[n].retrieve(part.queries, config.depth) for n in names}
        return Features.of(hits, part)

    by_history = features(recipe.answering("history"), held_out)
    history = choose_weights(by_history, recipe.history.retrievers, log, "history", config.seed)
    typed = known_item_queries(held_out, texts.lines, config.seed)
    query = (
        search_weights(features(_of_typed(recipe), typed), {}, log, "query")
        if len(typed.targets)
        else recipe.query.retrievers
    )
    single = like_last_item(held_out)
    alike = [name for name in ("profile", "transitions", "ease") if name in recipe.settings]
    # Similar means alike in meaning first: text keeps weight 1, and the log may add to it.
    similar = (
        search_weights(features(alike, single), {"profile": 1.0}, log, "similar")
        if len(single.targets)
        else recipe.similar.retrievers
    )
    return replace(recipe, history=history, query=Weights(query), similar=Weights(similar))


def _of_typed(recipe: Recipe) -> list[str]:
    """Families for typed queries: those by words first, then those by history; popularity says nothing."""
    words = [name for name in ("bm25", "text") if name in recipe.settings]
    return words + [name for name in recipe.settings if FAMILIES[name].asks == "history"]
