"""Offline evaluation from data to a results dictionary: what `llmrec evaluate` and eval/run.py share."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.assembly import read_catalog, read_log
from llmrec.catalog import Catalog
from llmrec.config import Config, one_base
from llmrec.encoder_training import encoder_checked
from llmrec.environment import environment
from llmrec.errors import DataError, LeakError
from llmrec.evaluation import leaks
from llmrec.evaluation.beyond import Beyond, groups_of
from llmrec.evaluation.cache import StageCache
from llmrec.evaluation.insight import Example, ceiling, differences, examples, order_bias
from llmrec.evaluation.pools import drawn_pools, fixed_pools
from llmrec.evaluation.protocol import ProtocolConfig, make_split
from llmrec.evaluation.report import render
from llmrec.evaluation.run import latency, peak_memory_mb, run_systems
from llmrec.evaluation.segments import by_segment, segments
from llmrec.evaluation.split import Part, Split
from llmrec.evaluation.typed import evaluate_search
from llmrec.events import EventLog
from llmrec.metrics import Comparison, Ranks, compare_values, per_user
from llmrec.pipeline import Pipeline
from llmrec.protocols import Codes, Query
from llmrec.recipe import roles
from llmrec.stages import cached_retrievers, cached_texts, estimate, in_words, tuned
from llmrec.state import State

if TYPE_CHECKING:
    from llmrec.progress import Progress

TYPED_USERS, TYPED_VALUES = 2000, 200
"""Most known-item queries and attribute values that are typed into `search`."""

BIASED_USERS = 50
"""Users whose candidates are given in several orders."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results dictionary, and the ranks of the target of each sampled user by system (0: not found).

    `examples` are drawn users in titles: for the report, not for a results file.
    """

    result: dict[str, Any]
    ranks: dict[str, Ranks]
    comparisons: list[Comparison]
    examples: list[Example] = field(default_factory=list)

    def write(self, path: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the results as JSON, and the ranks beside them, each to a temporary name first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        ranks = path.with_suffix(".ranks.npz")
        drafts = {target: target.with_name(f".{target.name}") for target in (path, ranks)}
        try:
            with drafts[ranks].open("wb") as opened:
                columns: dict[str, Any] = {n: r.astype(np.int32) for n, r in self.ranks.items()}
                np.savez_compressed(opened, **columns)
            drafts[path].write_text(json.dumps({**(extra or {}), **self.result}, indent=1), encoding="utf-8")
            for target, draft in drafts.items():
                draft.replace(target)
        finally:
            for draft in drafts.values():
                draft.unlink(missing_ok=True)

    def report(self, folder: Path, command: str = "") -> Path:
        """Write the report as one HTML page, and the results beside it; returns the page."""
        self.write(folder / "result.json", {"command": command} if command else None)
        page, draft = folder / "index.html", folder / ".index.html"
        draft.write_text(render(self.result, self.examples, command), encoding="utf-8")
        draft.replace(page)
        return page


def core_of(catalog: Catalog, log: EventLog, k: int) -> tuple[Catalog, EventLog]:
    """Keep the k-core of the log, and only the items in it, numbered anew.

    Raises
    ------
    DataError
        If nothing is left.
    """
    log = log.core(k)
    if len(log) == 0:
        raise DataError(f"the {k}-core of the log is empty; use a smaller core")
    codes = np.unique(log.item)
    number = np.full(len(catalog), -1, dtype=np.int32)
    number[codes] = np.arange(len(codes), dtype=np.int32)
    return catalog.only(codes), replace(log, item=number[log.item])


def evaluate(
    items: Any,
    events: Any,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    lm: bool = True,
    minutes: float | None = None,
    part: Literal["validation", "test"] = "test",
    folder: Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_step: Callable[[Progress, float], None] | None = None,
) -> Evaluation:
    """Fit on the training part of a split, choose on validation, check for leaks, report on `part`.

    Parameters
    ----------
    items, events, config
        As in `Recommender.fit`; the section `protocol` says what is held out and what is ranked.
    lm
        Whether the language model takes part.
    minutes
        Time to train it; the configuration's otherwise.
    folder
        Where fitted stages are kept, by a hash of what went into them, so that a killed evaluation is
        continued and another one of the same stages does not repeat them.

    Raises
    ------
    DataError, ConfigError, FetchError
        If data or configuration are invalid, or a model cannot be had.
    LeakError
        If a fitted parameter has seen what is reported.
    """
    config = Config.of(config)
    protocol, clock, cache = config.protocol, _Clock(), StageCache(folder)
    on_stage("reading items and events")
    catalog = read_catalog(items, config.data)
    log = read_log(events, catalog, config.data)
    if protocol.core is not None:
        catalog, log = core_of(catalog, log, protocol.core)
    split = make_split(log, protocol)
    checked = leaks.check_split(split)
    # Decided by what may be fitted on.
    exclude_seen = not config.retrieval.has_repeats(log.select(split.fitted).repeat_share())
    reported, pools, candidates = _reported(split, part, catalog, config, exclude_seen)
    sampled = (
        reported if pools is not None else reported.sample(protocol.users if lm else None, protocol.seed)
    )
    clock.lap("read")
    typed_queries = min(len(sampled), TYPED_USERS) + TYPED_VALUES
    expected = estimate(
        catalog, split, len(sampled), len(reported), typed_queries, config, lm=lm, minutes=minutes
    )
    on_stage(f"expected: {in_words(expected)}")
    if lm:
        one_base(config)
    texts = cached_texts(catalog, config, cache, on_stage)
    clock.lap("encode")
    search = config.retrieval.for_repeats(not exclude_seen)
    held_out = split.validation.sample(search.search_users, search.seed).held_out(
        catalog.active, exclude_seen
    )
    recipe, retrievers = cached_retrievers(
        catalog, split, held_out, texts, search, config.index, cache, on_stage
    )
    fitted, unchecked = leaks.check_retrievers(retrievers, split, texts.vectors)
    checked += fitted
    encoder = encoder_checked(config.encoder.name, split.train, catalog.lines())
    if encoder is not None:
        name = "text encoder" if encoder else "text encoder (tuned on other events, or not known on which)"
        (checked if encoder else unchecked).append(name)
    clock.lap("fit_retrievers")
    state = State(catalog, texts, recipe, retrievers, not exclude_seen, search.depth)
    training: dict[str, Any] = {}
    fresh: Callable[[], None] = lambda: None  # noqa: E731
    if lm:
        on_stage("fine-tuning the language model")
        judged = split.validation.sample(search.lm_users, search.seed).held_out(catalog.active, exclude_seen)
        state, training = tuned(state, split, judged, config, minutes, cache, on_step)
        assert state.lm is not None
        fresh = state.lm.scorer.forget
        choosing, judging = roles(judged, config.training.seed)
        for one in (training, *training.get("beside", ())):
            checked += leaks.check_language_model(state.lm.counts, one, split, choosing)
        checked += leaks.check_recipe(state.recipe, held_out, judging)
        clock.lap("finetune")
    else:
        checked += leaks.check_recipe(state.recipe, held_out)
    pipeline = state.pipeline()
    if exclude_seen and (seen := _seen(sampled)):
        on_stage(
            f"{seen:,} of {len(sampled):,} targets are in their own history, and seen items do not return"
        )
    on_stage("ranking for every user")
    best = state.recipe.best_alone
    systems = run_systems(sampled, pipeline, catalog.active, exclude_seen, with_lm=lm, pools=pools, best=best)
    everyone = systems
    if len(sampled) < len(reported):
        everyone = run_systems(reported, pipeline, catalog.active, exclude_seen, with_lm=False)
    clock.lap("rank")
    on_stage("typed queries")
    typed = evaluate_search(sampled, pipeline, catalog, TYPED_USERS, TYPED_VALUES, protocol.seed)
    clock.lap("search")
    on_stage("timing requests")
    timed = _latency(sampled, pipeline, catalog, fresh)
    clock.lap("latency")
    bias = _order_bias(sampled, pipeline, catalog, exclude_seen) if lm else {}
    counts = np.bincount(log.item[split.fitted], minlength=len(catalog)).astype(np.float64)
    masks = segments(sampled, counts)
    groups = groups_of(catalog)
    beyond = Beyond(counts, texts.vectors, groups[1] if groups else None, catalog.active)
    result: dict[str, Any] = {
        "dataset": _dataset(catalog, log, protocol.core),
        "protocol": {**_protocol(config, part, sampled, log, exclude_seen), **candidates},
        "leaks": {
            "checked": checked,
            "unchecked": unchecked,
            **leaks.count_duplicates(split, sampled, texts.vectors, texts.index),
        },
        "systems": systems.as_dict(),
        "intervals": intervals(systems.ranks["merge"]),
        "probabilities": systems.probabilities,
        "reliability": systems.reliability,
        "beyond": {name: beyond.measure(lists, sampled) for name, lists in systems.shown.items()},
        "groups": groups[0] if groups else None,
        "segments": by_segment(systems.ranks, masks),
        "segment_differences": {
            name: differences(systems.ranks, masks, name, "merge")
            for name in ("lm", "default")
            if lm and name in systems.ranks
        },
        "ceiling": ceiling(systems.ranks["merge"]),
        "order_bias": bias,
        "comparisons": [c.as_dict() for c in systems.comparisons],
        "search": typed,
        "recipe": state.recipe.as_dict(),
        "training": training,
        "latency": timed,
        "seconds": clock.laps,
        "seconds_expected": expected,
        "cached": cache.found,
        "peak_memory_mb": round(peak_memory_mb()),
        "environment": environment(),
        "config": config.model_dump(mode="json"),
    }
    if everyone is not systems:
        result["systems_all_users"] = everyone.as_dict()
        result["protocol"]["users_all"] = len(reported)
    compared = {name: lists for name, lists in systems.shown.items() if name in ("merge", "lm", "default")}
    drawn = examples(sampled, compared, systems.ranks, catalog.titles, seed=protocol.seed)
    return Evaluation(result, systems.ranks, systems.comparisons, drawn)


def intervals(ranks: Ranks) -> dict[str, list[float]]:
    """Bootstrap intervals of the mean over users, 95 %, by measure."""
    found = {m: compare_values(per_user(ranks, m), "merge", "nothing", m) for m in ("recall@10", "ndcg@10")}
    return {metric: [interval.low, interval.high] for metric, interval in found.items()}


def _reported(
    split: Split, name: str, catalog: Catalog, config: Config, exclude_seen: bool
) -> tuple[Part, list[Codes] | None, dict[str, Any]]:
    """The users to report, the items to rank for each (None for all), and what to say of their lists."""
    protocol = config.protocol
    part = split.test if name == "test" else split.validation
    if protocol.negatives is not None:
        part = part.sample(protocol.users, protocol.seed)
        pools = drawn_pools(part, protocol.negatives, catalog.active, exclude_seen, protocol.seed)
        return part, pools, {}
    if protocol.candidates is None:
        return part, None, {}
    if protocol.candidate_part not in (name, "any"):
        raise LeakError(
            f"{protocol.candidates} was made for {protocol.candidate_part}: what was mined for one part has "
            f"seen the targets of the other, so {name} cannot be reported on it (candidate_part says this)"
        )
    part, pools = fixed_pools(
        protocol.candidates,
        part,
        split.log.users,
        catalog,
        source=protocol.candidate_source,
        count=protocol.candidate_count,
        seed=protocol.seed,
    )
    rows = part.drawn(protocol.users, protocol.seed)
    part, pools = part.take(rows), [pools[row] for row in rows]
    held = float(np.mean([target in pool for target, pool in zip(part.targets, pools, strict=True)]))
    digest = hashlib.sha256(protocol.candidates.read_bytes()).hexdigest()
    return part, pools, {"candidates_sha256": digest, "target_in_candidates": held, "seen_items": "as listed"}


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


def _protocol(config: Config, part: str, sampled: Part, log: EventLog, exclude_seen: bool) -> dict[str, Any]:
    protocol: ProtocolConfig = config.protocol
    return {
        "split": protocol.split,
        "part": part,
        "ranking": protocol.ranking,
        "comparable": protocol.full_ranking,
        "seen_items": "excluded" if exclude_seen else "included",
        "ties": config.data.ties,
        "clock": config.data.clock,
        "users": len(sampled),
        "users_without_history": sum(not len(history) for history in sampled.histories),
        "targets_seen": _seen(sampled),
        "users_sha256": sampled.sha256(log.users),
        "seed": protocol.seed,
    }


def _seen(part: Part) -> int:
    """Users whose target is in their history: nobody finds it where seen items do not return."""
    return sum(int(target) in history for target, history in zip(part.targets, part.histories, strict=True))


def _latency(part: Part, pipeline: Pipeline, catalog: Catalog, fresh: Callable[[], None]) -> dict[str, Any]:
    """Time requests with 20 history items, by the plain merge and with the language model in the blend.

    Where fewer than 32 users have so many, those with the longest histories are asked: a history that comes
    twice in a batch would be read once.
    """
    longest = sorted(part.histories, key=len, reverse=True)
    histories = [h[-20:] for h in part.histories if len(h) >= 20][:32]
    if len(histories) < 32:
        histories = [h[-20:] for h in longest[:32]]
    queries = [Query(h, "", catalog.active) for h in histories]
    plain = replace(pipeline, history=pipeline.history.with_lm(0.0))
    timed: dict[str, Any] = {"merge": latency(plain, queries, fresh)}
    timed["history_items"] = float(np.mean([len(h) for h in histories])) if histories else 0.0
    if pipeline.scorer is not None:
        blended = replace(pipeline, history=pipeline.history.with_lm(pipeline.history.most_lm or 1.0))
        timed["blend"] = latency(blended, queries, fresh)
    return timed


def _order_bias(part: Part, pipeline: Pipeline, catalog: Catalog, exclude_seen: bool) -> dict[str, Any]:
    """Order bias of the language model over the first candidates of some users."""
    assert pipeline.scorer is not None
    queries = part.sample(BIASED_USERS, 0).held_out(catalog.active, exclude_seen).queries
    plain = replace(pipeline, history=pipeline.history.with_lm(0.0))
    shortlists = [found.items for found in plain.recommend(queries, pipeline.scored or 20)]
    return order_bias(pipeline.scorer, queries, shortlists)


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 1)
        self._last = now
