"""Choosing settings and weights on held-out events.

Everything is chosen by NDCG@10 on events that no fitted parameter has seen; every trial is logged. Trials of
EASE are logged with the best decay of their history, not with all that were tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from pydantic import BaseModel

from llmrec.blending import OBJECTIVE, calibrated, choose_weights, lm_weight, search_weights, weights_with_lm
from llmrec.candidates import READS_WORDS, Weights
from llmrec.families import FAMILIES, Texts, TrainingLog
from llmrec.features import Features
from llmrec.metrics import per_user, summary
from llmrec.pipeline import Pipeline
from llmrec.protocols import Floats, Hits, Retriever, Scorer
from llmrec.recipe import FEWEST, TOO_FEW, HeldOut, Recipe, RetrievalConfig, fit_retrievers, ranks_in, roles
from llmrec.retrieve.dense import ProfileConfig, ProfileRetriever
from llmrec.retrieve.linear import CoOccurrence, EASEConfig, EASERetriever, user_item_matrix
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.retrieve.sequence_config import Kind
from llmrec.retrieve.transitions import TransitionsConfig, TransitionsRetriever
from llmrec.text import typed_words

LEAST_WORDS = 0.05
"""Weight of BM25 for typed words, at least."""

EPOCH_USERS = 500
"""Held-out users that judge each epoch of a sequence model."""

DECAYS = (0.6, 0.7, 0.8, 0.9, 1.0)
"""Decays of the history that are tried with each model of EASE."""

Search = Callable[[TrainingLog, Texts, Any, HeldOut, list[dict[str, Any]]], tuple[BaseModel, Retriever]]


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
        words = typed_words(lines[target], rng)
        if words:
            queries.append(replace(query, text=words))
            targets.append(target)
    return HeldOut(queries, np.array(targets, dtype=np.int32))


def prior_of(retrievers: Mapping[str, Retriever], held_out: HeldOut) -> Floats:
    """Popularity of each held-out target, shape (queries,)."""
    popularity = retrievers["popularity"]
    assert isinstance(popularity, PopularityRetriever)
    return popularity.shares()[held_out.targets]


def like_last_item(held_out: HeldOut) -> HeldOut:
    """Shorten each history to its last item: what follows it is what is asked of similar items."""
    rows = [i for i, q in enumerate(held_out.queries) if len(q.history)]
    queries = [replace(held_out.queries[i], history=held_out.queries[i].history[-1:]) for i in rows]
    return HeldOut(queries, held_out.targets[rows])


def with_language_model(
    recipe: Recipe,
    retrievers: Mapping[str, Retriever],
    model: Scorer,
    held_out: HeldOut,
    lines: Sequence[str],
    config: RetrievalConfig,
    *,
    proposes: bool = True,
    scored: int | None = None,
    scores_all: bool = True,
    judged: int | None = None,
) -> Recipe:
    """Fit the weight of the language model for requests by history and with typed words.

    Typed words of people without a history get a weight of their own: there the model may know nothing but
    what is popular.

    Neither `retrievers` nor `model` may have been trained on `held_out`.

    Parameters
    ----------
    proposes
        Whether the model's own best items join the candidates by history; then it is a `Retriever` too.
    scored
        How many of the first candidates the model scores; None for all.
    scores_all
        Where it does not score all, its score is added to the blend that is there, since other weights would
        show it other candidates.
    judged
        Held-out users that are asked, at most.
    """
    held_out = held_out.sample(config.lm_users, config.seed)
    ours = ("language model", "calibration")
    log = [entry for entry in recipe.log if not any(word in entry["search"] for word in ours)]
    log.append(chosen_on("held-out events of the language model", held_out))
    held_out = held_out.sample(judged or config.lm_users, config.seed)
    log[-1]["judged"] = len(held_out.queries)

    calibration = recipe.calibration

    def weighted(kind: str, weights: Weights, part: HeldOut) -> Weights:
        nonlocal calibration
        weights = weights.with_lm(0.0)
        if len(part.targets) == 0:
            return weights
        used = [name for name in recipe.settings if weights.ever_uses(name)]
        hits = proposed(used, retrievers, part, config.depth)
        typed = kind.startswith("query")
        own = proposes and not typed
        best = cast(Retriever, model).retrieve(part.queries, config.depth) if own else None
        features = Features.with_lm(hits, best, model, part, weights, scored)
        if typed:
            return weights.with_lm(lm_weight(features, weights, log, kind, config.seed))
        if scored is None and scores_all:
            chosen = weights_with_lm(features, weights, log, kind, config.seed)
        else:
            chosen = weights.with_lm(lm_weight(features, weights, log, kind, config.seed))
        # Candidates that the language model alone proposed are none where it is left out.
        served = features if chosen.most_lm else Features.of(hits, part)
        calibration = calibrated(served, chosen, prior_of(retrievers, part), log)
        return chosen

    typed = known_item_queries(held_out, lines, config.seed)
    history = weighted("history", recipe.history, held_out.with_history())
    anybody, words = (replace(recipe.query.for_history(n).with_lm(0.0), longer=()) for n in (0, 1))
    query = replace(
        weighted("query without history", anybody, nameless(typed)),
        longer=((1, weighted("query", words, typed)),),
    )
    return replace(recipe, history=history, query=query, log=log, calibration=calibration)


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

    No fitted parameter sees `held_out`. Families in `SEARCHES` have their settings searched; the others of
    the configuration keep theirs. Below `FEWEST` users all is as the configuration has it.
    """
    recipe = Recipe.default(config)
    held_out = held_out.sample(config.search_users, config.seed)
    trials = recipe.log
    if not config.search or len(held_out.queries) < FEWEST:
        if config.search:
            trials.append({"search": TOO_FEW, "users": len(held_out.queries)})
        return recipe, fit_retrievers(log, texts, recipe)
    trials.append(chosen_on("held-out events", held_out))
    choosing, held_out = epoch_users(recipe.settings, held_out, config.seed)
    settings: dict[str, BaseModel] = {}
    retrievers: dict[str, Retriever] = {}
    for name, start in recipe.settings.items():
        if FAMILIES[name].learns or name in SEARCHES:
            on_stage(name)
        judging = choosing if name in EPOCHS else held_out
        settings[name], retrievers[name] = fit_family(name, log, texts, start, judging, trials)
    recipe = replace(recipe, settings=settings)
    on_stage("weights")
    return with_weights(recipe, retrievers, held_out, texts, config), retrievers


def fit_family(
    name: str,
    log: TrainingLog,
    texts: Texts,
    start: BaseModel,
    held_out: HeldOut,
    trials: list[dict[str, Any]],
) -> tuple[BaseModel, Retriever]:
    """Fit one family, with its settings searched from `start` where it has a search."""
    if name in SEARCHES:
        return SEARCHES[name](log, texts, start, held_out, trials)
    return start, FAMILIES[name].fit(log, texts, start)


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
    """Walk over ages, penalties and the weight of the texts; each model is tried with all decays.

    Where the items are too many to be solved together, one model takes as long as all of this: then only
    the decays are tried.
    """
    kept: dict[tuple[float, bool], CoOccurrence] = {}
    best: EASERetriever | None = None
    score = -1.0

    def shared(config: EASEConfig) -> CoOccurrence:
        key = config.fit_decay, config.text > 0
        if key not in kept:
            kept.clear()
            kept[key] = CoOccurrence.of(log.histories, len(texts.lines), config, log.weights, texts.vectors)
        return kept[key]

    def trial(config: EASEConfig) -> float:
        nonlocal best, score
        model = shared(config).solve(config)
        values = linear_quality(model, sorted({*DECAYS, start.decay}), held_out)
        decay = max(values, key=lambda d: values[d])
        tried = {"l2": config.l2, "fit_decay": config.fit_decay, "text": config.text, "decay": decay}
        trials.append({"search": "ease", **tried, OBJECTIVE: round(values[decay], 5)})
        if values[decay] > score:
            best, score = model.with_decay(decay), values[decay]
        return values[decay]

    space: dict[str, Sequence[float]] = {
        "fit_decay": (1.0, 0.98, 0.9, 0.8),
        "l2": (start.l2 / 4, start.l2 * 4),
        "text": (0.0, start.text / 4) if start.text else (),
    }
    _walk("ease", start, space if shared(start).near is None else {}, trial, [])
    assert best is not None
    return best.config, best


def linear_quality(model: EASERetriever, decays: Sequence[float], held_out: HeldOut) -> dict[float, float]:
    """NDCG@10 of EASE by decay of the history; as `quality`, but for all users at once."""
    row = np.full(model.n_items, -1)
    row[model.items] = np.arange(len(model.items))
    ranks = {decay: np.zeros(len(held_out.targets), np.int64) for decay in decays}
    for first in range(0, len(held_out.targets), 256):
        queries, targets = held_out.queries[first : first + 256], row[held_out.targets[first : first + 256]]
        asked = [i for i, query in enumerate(queries) if targets[i] >= 0 and len(query.history)]
        if not asked:
            continue
        own = targets[asked][:, None]
        histories, masks = [queries[i].history for i in asked], [queries[i].mask for i in asked]
        allowed = np.array([np.ones(len(row), bool) if mask is None else mask for mask in masks])
        allowed = allowed[:, model.items]
        for decay in decays:
            x = user_item_matrix(histories, model.n_items, decay)[:, model.items]
            scores = (x @ model.weights).toarray()
            value = np.take_along_axis(scores, own, axis=1)
            ahead = (scores > value) | ((scores == value) & (np.arange(len(model.items)) < own))
            found = (value[:, 0] > 0) & np.take_along_axis(allowed, own, axis=1)[:, 0]
            rank = np.where(found, 1 + (ahead & allowed).sum(axis=1), 0)
            ranks[decay][first + np.array(asked)] = rank
    return {decay: float(per_user(r, OBJECTIVE).mean()) for decay, r in ranks.items()}


def _search_epochs(kind: Kind) -> Search:
    """Stop a sequence model where held-out events say so; a later fit runs as many epochs."""

    def search(
        log: TrainingLog, texts: Texts, start: Any, held_out: HeldOut, trials: list[dict[str, Any]]
    ) -> tuple[BaseModel, Retriever]:
        from llmrec.retrieve.sequence import SequenceRetriever

        judged, values = held_out.sample(EPOCH_USERS, start.seed), []

        def on_epoch(epoch: int, nats: float, value: float) -> None:
            values.append(value)
            trial = {"search": kind, "epoch": epoch + 1, "train_nats": round(nats, 4)}
            trials.append({**trial, OBJECTIVE: round(value, 5)})

        fitted = SequenceRetriever.fit(
            kind,
            log.histories,
            texts.vectors,
            start,
            log.weights,
            validate=lambda model: quality(model, judged),
            on_epoch=on_epoch,
        )
        best = int(np.argmax(values)) + 1 if values else start.epochs
        return start.model_copy(update={"epochs": best, "minutes": None}), fitted

    return search


SEARCHES: Mapping[str, Search] = {
    "transitions": _search_transitions,
    "ease": _search_ease,
    "profile": _search_profile,
    "gru4rec": _search_epochs("gru4rec"),
    "caser": _search_epochs("caser"),
    "sasrec": _search_epochs("sasrec"),
}
"""Families whose settings are searched, and how."""

EPOCHS = ("gru4rec", "caser", "sasrec")
"""Those of which the best of many states is kept."""


def epoch_users(names: Iterable[str], held_out: HeldOut, seed: int) -> tuple[HeldOut, HeldOut]:
    """Held-out users who choose states of sequence models, and those who judge all else.

    To who chose it the best of many epochs looks better than it is, and a blend would lean on it too much.
    All users are both where no family of these names is such a one, and a single user is, too.
    """
    apart = bool(set(names) & set(EPOCHS)) and len(held_out.queries) > 1
    return roles(held_out, seed) if apart else (held_out, held_out)


def with_weights(
    recipe: Recipe,
    retrievers: Mapping[str, Retriever],
    held_out: HeldOut,
    texts: Texts,
    config: RetrievalConfig,
) -> Recipe:
    """Search the weights for requests by history, with typed words, and for similar items."""
    log = recipe.log

    def features(names: Sequence[str], part: HeldOut) -> Features:
        return Features.of(proposed(names, retrievers, part, config.depth), part)

    known = held_out.with_history()
    by_history = features(recipe.answering("history"), known)
    history = choose_weights(by_history, recipe.history.retrievers, log, "history", config.seed)
    typed = known_item_queries(held_out, texts.lines, config.seed)
    query = recipe.query
    if len(typed.targets):
        # Where nothing is known of who types, popularity may say more than beside a history.
        anybody = typed_weights(features(_for_anybody(recipe), nameless(typed)), log, "query of anybody")
        known_user = typed_weights(features(_of_typed(recipe), typed), log, "query")
        query = Weights(anybody, longer=((1, Weights(known_user)),))
    single = like_last_item(held_out)
    alike = [name for name in ("profile", "transitions", "ease") if name in recipe.settings]
    # Similar means alike in meaning first: text keeps weight 1, and the log may add to it.
    similar = (
        search_weights(features(alike, single), {"profile": 1.0}, log, "similar")
        if len(single.targets)
        else recipe.similar.retrievers
    )
    served = features([name for name in by_history.names if history.ever_uses(name)], known)
    return replace(
        recipe,
        history=history,
        query=query,
        similar=Weights(similar),
        calibration=calibrated(served, history, prior_of(retrievers, known), log),
    )


def typed_weights(features: Features, log: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Weights for typed words. What finds them best has weight 1, and nothing has more.

    A history may say so well what follows that the words seem to add nothing: they are what was asked for.
    """

    def alone(name: str) -> float:
        return float(per_user(features.of_targets(Weights({name: 1.0})), OBJECTIVE).mean())

    words = [name for name in READS_WORDS if name in features.names]
    chosen = search_weights(features, {max(words, key=alone): 1.0} if words else {}, log, kind, most=1.0)
    if "bm25" in words and not chosen.get("bm25"):
        # A word that a new item brings is in no encoder that was fitted before.
        chosen = {**chosen, "bm25": LEAST_WORDS}
    return chosen


def proposed(
    names: Sequence[str], retrievers: Mapping[str, Retriever], part: HeldOut, depth: int
) -> dict[str, Sequence[Hits]]:
    """Hits of each component for queries of one kind, as the pipeline has them; see `Pipeline.retrieve`."""
    typed = any(query.text for query in part.queries)
    asked = [name for name in names if not (typed and name == Pipeline.fallback)]
    hits: dict[str, Sequence[Hits]] = {n: retrievers[n].retrieve(part.queries, depth) for n in asked}
    if len(asked) < len(names):
        popularity = cast(PopularityRetriever, retrievers[Pipeline.fallback])
        rows = range(len(part.queries))
        hits[Pipeline.fallback] = [popularity.among(own[row] for own in hits.values()) for row in rows]
    return hits


def _of_typed(recipe: Recipe) -> list[str]:
    """Families for typed queries: those by words first, then those by history, and popularity."""
    words = [name for name in READS_WORDS if name in recipe.settings]
    by_history = [name for name in recipe.settings if FAMILIES[name].asks == "history"]
    return [*words, *by_history, Pipeline.fallback]


def _for_anybody(recipe: Recipe) -> list[str]:
    """The same for people without a history."""
    return [name for name in _of_typed(recipe) if FAMILIES[name].asks != "history"]


def nameless(typed: HeldOut) -> HeldOut:
    """The same queries of people without a history."""
    return HeldOut([replace(query, history=query.history[:0]) for query in typed.queries], typed.targets)
