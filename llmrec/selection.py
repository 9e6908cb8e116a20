"""Which families a recipe uses: forward selection on held-out events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel

from llmrec.blending import OBJECTIVE, cross_fitted, learned_weights
from llmrec.errors import LLMRecError
from llmrec.families import FAMILIES, Texts, TrainingLog
from llmrec.features import Features
from llmrec.metrics import Values, standard_error, summary
from llmrec.protocols import Hits, Retriever
from llmrec.recipe import ALWAYS, FEWEST, HeldOut, Recipe, RetrievalConfig, ranks_in
from llmrec.search import EPOCHS, chosen_on, epoch_users, fit_family, search_recipe, with_weights

BY_COST = (
    "popularity",
    "profile",
    "nearest",
    "transitions",
    "recent",
    "trending",
    "again",
    "ease",
    "als",
    "topics",
    "gru4rec",
    "sasrec",
    "caser",
    "lightgcn",
)
"""Families that answer from a history, the cheap ones first: what the time does not reach is left out."""


def choose_recipe(
    log: TrainingLog,
    held_out: HeldOut,
    texts: Texts,
    config: RetrievalConfig,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[Recipe, dict[str, Retriever]]:
    """Search the recipe of the configured families, or, with `search_minutes`, of all that pay."""
    if config.search_minutes is None or len(held_out.queries) < FEWEST:
        return search_recipe(log, held_out, texts, config, on_stage)
    return select_families(log, held_out, texts, config, config.search_minutes, on_stage)


def select_families(
    log: TrainingLog,
    held_out: HeldOut,
    texts: Texts,
    config: RetrievalConfig,
    minutes: float,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[Recipe, dict[str, Retriever]]:
    """Fit every family once, then add them one by one as long as that pays; what is left is not served.

    The time is looked at before each family: the last one begun, and the selection itself, come on top.
    A family is added if it raises the NDCG@10 of a learned blend, cross-fitted over users, by more than the
    standard error of the gain. The table of all families and each step are in the recipe's log.
    """
    started = time.monotonic()
    held_out = held_out.sample(config.search_users, config.seed)
    every = config.model_copy(update={"families": BY_COST})
    start = every.settings()
    trials: list[dict[str, Any]] = [chosen_on("held-out events", held_out)]
    choosing, held_out = epoch_users(BY_COST, held_out, config.seed)
    settings: dict[str, BaseModel] = {}
    retrievers: dict[str, Retriever] = {}
    hits: dict[str, Sequence[Hits]] = {}
    for name in BY_COST:
        left = minutes - (time.monotonic() - started) / 60
        reason = _why_not(name, log, left)
        if reason:
            trials.append({"search": "family", "family": name, "left out": reason})
            continue
        on_stage(name)
        begun, given = time.monotonic(), start[name]
        if "minutes" in type(given).model_fields:
            # Half of what is left, so that the next one has a chance.
            own = getattr(given, "minutes", None)
            half = max(left / 2, 0.01)
            given = given.model_copy(update={"minutes": half if own is None else min(own, half)})
        try:
            judging = choosing if name in EPOCHS else held_out
            settings[name], retrievers[name] = fit_family(name, log, texts, given, judging, trials)
        except (ImportError, LLMRecError, ValueError) as missing:
            trials.append({"search": "family", "family": name, "left out": str(missing)})
            continue
        hits[name] = retrievers[name].retrieve(held_out.queries, config.depth)
        alone = summary(ranks_in((h.items for h in hits[name]), held_out.targets), ["recall@10", OBJECTIVE])
        seconds = round(time.monotonic() - begun, 1)
        trials.append({"search": "family", "family": name, **_rounded(alone), "seconds": seconds})
    on_stage("selection")
    chosen = _forward(hits, held_out, config, trials)
    for name in ALWAYS:
        if name not in retrievers:
            settings[name], retrievers[name] = start[name], FAMILIES[name].fit(log, texts, start[name])
    names = [name for name in start if name in chosen or name in ALWAYS]
    recipe = replace(Recipe.default(config), settings={n: settings[n] for n in names}, log=trials)
    kept = {name: retrievers[name] for name in names}
    on_stage("weights")
    return with_weights(recipe, kept, held_out, texts, config), kept


def _why_not(name: str, log: TrainingLog, left: float) -> str:
    if FAMILIES[name].clock and log.stamps is None:
        return "the log has no clock"
    return "" if left > 0 else "the time was over"


def _forward(
    hits: dict[str, Sequence[Hits]], held_out: HeldOut, config: RetrievalConfig, trials: list[dict[str, Any]]
) -> list[str]:
    def values(names: Sequence[str]) -> Values:
        features = Features.of({name: hits[name] for name in names}, held_out)
        return cross_fitted(features, partial(learned_weights, l2=10.0), config.seed)

    chosen: list[str] = []
    score = np.zeros(len(held_out.queries))
    while len(chosen) < len(hits):
        trial = {name: values([*chosen, name]) for name in hits if name not in chosen}
        best = max(trial, key=lambda name: float(trial[name].mean()))
        gain = trial[best] - score
        error = standard_error(gain) or 0.0
        added = bool(gain.mean() > error)
        after = {name: round(float(value.mean()), 5) for name, value in trial.items()}
        step = {"search": "forward selection", "with": list(chosen), OBJECTIVE: after, "best": best}
        trials.append(
            {**step, "gain": round(float(gain.mean()), 5), "standard_error": round(error, 5), "added": added}
        )
        if not added:
            break
        chosen.append(best)
        score = trial[best]
    return chosen


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}
