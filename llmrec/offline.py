"""Offline evaluation from data to a results dictionary: what `llmrec evaluate` and eval/run.py share."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.assembly import encode, read_catalog, read_log
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.errors import DataError
from llmrec.evaluation.run import latency, peak_memory_mb, run_systems
from llmrec.evaluation.split import Part, leave_last_out
from llmrec.events import EventLog
from llmrec.fetch import resolve
from llmrec.metrics import Comparison, Ranks
from llmrec.pipeline import Pipeline
from llmrec.protocols import Query
from llmrec.search import search_recipe
from llmrec.state import REPEATS, State

if TYPE_CHECKING:
    from llmrec.training import Progress

PACKAGES = ("torch", "transformers", "peft", "sentence-transformers", "numpy", "scipy", "faiss-cpu")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results dictionary, and the ranks of the target of each sampled user by system (0: not found)."""

    result: dict[str, Any]
    ranks: dict[str, Ranks]
    comparisons: list[Comparison]

    def write(self, path: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the results as JSON, and the ranks beside them, each to a temporary name first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        ranks = path.with_suffix(".ranks.npz")
        drafts = {target: target.with_name(f".{target.name}") for target in (path, ranks)}
        with drafts[ranks].open("wb") as opened:
            columns: dict[str, Any] = {n: r.astype(np.int16) for n, r in self.ranks.items()}
            np.savez_compressed(opened, **columns)
        drafts[path].write_text(json.dumps({**(extra or {}), **self.result}, indent=1), encoding="utf-8")
        for target, draft in drafts.items():
            draft.replace(target)


def core_of(catalog: Catalog, log: EventLog, k: int) -> tuple[Catalog, EventLog]:
    """Keep the k-core of the log, and only the items in it, numbered anew.

    Raises
    ------
    DataError
        If nothing is left.
    """
    log = log.core(k)
    if len(log) == 0:
        raise DataError(f"the {k}-core of the log is empty; use a smaller --core")
    codes = np.unique(log.item)
    number = np.full(len(catalog), -1, dtype=np.int32)
    number[codes] = np.arange(len(codes), dtype=np.int32)
    return catalog.only(codes), replace(log, item=number[log.item])


def evaluate(
    items: Any,
    events: Any,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    core: int | None = None,
    users: int | None = None,
    seed: int = 0,
    lm: bool = True,
    minutes: float | None = None,
    part: Literal["validation", "test"] = "test",
    folder: Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_step: Callable[[Progress, float], None] | None = None,
) -> Evaluation:
    """Leave-last-out with full ranking: fit on the training part, choose on validation, report on `part`.

    Parameters
    ----------
    items, events, config
        As in `Recommender.fit`.
    core
        Keep the k-core of the log and rank its items only.
    users
        Seeded sample of users for the systems with the language model; the others are reported on it too.
    lm
        Whether the language model takes part.
    minutes
        Time to train it; the configuration's otherwise.
    folder
        Where checkpoints of the training go, so that a killed evaluation is continued.

    Raises
    ------
    DataError, ConfigError, FetchError
        If data or configuration are invalid, or a model cannot be had.
    """
    config = Config.of(config)
    clock = _Clock()
    on_stage("reading items and events")
    catalog = read_catalog(items, config.data)
    log = read_log(events, catalog, config.data)
    if core is not None:
        catalog, log = core_of(catalog, log, core)
    split = leave_last_out(log)
    exclude_seen = log.repeat_share() < REPEATS
    clock.lap("read")
    texts = encode(catalog.lines(), config, on_stage)
    clock.lap("encode")
    search = config.retrieval
    held_out = split.validation.sample(search.search_users, search.seed).held_out(
        catalog.active, exclude_seen
    )
    recipe, retrievers = search_recipe(
        split.train, held_out, texts, search, lambda stage: on_stage(f"choosing {stage}"), split.weights
    )
    clock.lap("fit_retrievers")
    training: dict[str, Any] = {}
    state = State(catalog, texts, recipe, retrievers, not exclude_seen, search.depth)
    fresh: Callable[[], None] = lambda: None  # noqa: E731
    if lm:
        on_stage("fine-tuning the language model")
        from llmrec.language_model import fine_tune

        settings = config.training.lasting(minutes)
        model, report, recipe = fine_tune(
            split.train,
            split.weights,
            held_out,
            texts,
            recipe,
            retrievers,
            resolve(config.lm.base, allow_hub=config.allow_hub),
            config.lm,
            settings,
            search,
            data=log.fingerprint,
            folder=folder,
            on_step=on_step,
        )
        clock.lap("finetune")
        state = replace(state, recipe=recipe, lm=model)
        card = model.card.training if model.card else {}
        training = {**card, "minutes": settings.minutes, "events_per_second": report.events_per_second}
        fresh = model.scorer.forget
    pipeline = state.pipeline()
    on_stage("ranking the catalogue for every user")
    reported = split.test if part == "test" else split.validation
    sampled = reported.sample(users if lm else None, seed)
    systems = run_systems(sampled, pipeline, catalog.active, exclude_seen, with_lm=lm)
    everyone = systems
    if len(sampled) < len(reported):
        everyone = run_systems(reported, pipeline, catalog.active, exclude_seen, with_lm=False)
    clock.lap("rank")
    on_stage("timing requests")
    result: dict[str, Any] = {
        "dataset": _dataset(catalog, log, core),
        "protocol": _protocol(config, part, seed, sampled, log, exclude_seen),
        "systems": systems.as_dict(),
        "comparisons": [c.as_dict() for c in systems.comparisons],
        "recipe": recipe.as_dict(),
        "training": training,
        "latency": _latency(sampled, pipeline, catalog, fresh),
        "seconds": clock.laps,
        "peak_memory_mb": round(peak_memory_mb()),
        "environment": environment(),
        "config": config.model_dump(),
    }
    if everyone is not systems:
        result["systems_all_users"] = everyone.as_dict()
        result["protocol"]["users_all"] = len(reported)
    return Evaluation(result, systems.ranks, systems.comparisons)


def _dataset(catalog: Catalog, log: EventLog, core: int | None) -> dict[str, Any]:
    return {
        "users": log.n_users,
        "items": len(catalog),
        "events": len(log),
        "core": core,
        "repeat_share": round(log.repeat_share(), 4),
        "catalog_sha256": catalog.fingerprint,
        "log_sha256": log.fingerprint,
        "load": str(log.report),
    }


def _protocol(
    config: Config, part: str, seed: int, sampled: Part, log: EventLog, exclude_seen: bool
) -> dict[str, Any]:
    return {
        "split": "leave-last-out",
        "part": part,
        "ranking": "full catalogue",
        "seen_items": "excluded" if exclude_seen else "included",
        "ties": config.data.ties,
        "clock": config.data.clock,
        "users": len(sampled),
        "users_sha256": sampled.sha256(log.users),
        "seed": seed,
    }


def _latency(
    part: Part, pipeline: Pipeline, catalog: Catalog, fresh: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Time requests with 20 history items, by the plain merge and with the language model in the blend."""
    histories = [h[-20:] for h in part.histories if len(h) >= 20][:32] or list(part.histories[:32])
    queries = [Query(h, "", catalog.active) for h in histories]
    plain = replace(pipeline, history=replace(pipeline.history, lm=0.0))
    timed = {"merge": latency(plain, queries, fresh)}
    if pipeline.scorer is not None:
        blended = replace(pipeline, history=replace(pipeline.history, lm=pipeline.history.lm or 1.0))
        timed["blend"] = latency(blended, queries, fresh)
    return timed


def environment() -> dict[str, Any]:
    """Versions and machine, as results files carry them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": sys.version.split()[0],
        "machine": f"{platform.machine()}, {platform.system()}",
        "packages": versions,
    }


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 1)
        self._last = now
