"""The fitted stages of an offline evaluation: kept on disk, and how long they will take."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec import persistence
from llmrec.assembly import LIGHT, encode, make_encoder, make_texts
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.evaluation.cache import StageCache, sources
from llmrec.evaluation.split import Split
from llmrec.families import Texts
from llmrec.index.config import IndexConfig
from llmrec.protocols import Retriever
from llmrec.recipe import HeldOut, Recipe, RetrievalConfig, load_retrievers, retriever_arrays
from llmrec.score.config import ItemTokensConfig
from llmrec.selection import choose_recipe
from llmrec.state import State

if TYPE_CHECKING:
    from llmrec.progress import Progress


FITTING = (
    "protocols",
    "retrieve",
    "index",
    "encode",
    "families",
    "sequences",
    "recipe",
    "search",
    "selection",
    "fusion",
    "features",
    "blending",
    "candidates",
    "pipeline",
    "ranking",
    "metrics",
    "text",
    "words",
)
"""Source that decides what retrievers are fitted and which weights they get."""

TUNING = (
    "text",
    "score",
    "training",
    "progress",
    "processes",
    "tensors",
    "sequences",
    "adapter",
    "lora",
    "language_model",
    "metrics",
    "ranking",
    "recipe",
    "families",
    "sharding",
    "several",
    "word_model",
    "lm_training",
    "mining",
    "prompt",
)
"""Source that decides what a language model learns."""


def cached_texts(
    catalog: Catalog, config: Config, cache: StageCache, on_stage: Callable[[str], None]
) -> Texts:
    """Text vectors, kept by encoder and lines."""
    if config.encoder.name == LIGHT:
        return encode(catalog.lines(), config, on_stage)
    encoder = make_encoder(config, catalog.lines())
    vectors = cache.get(
        "vectors",
        [encoder.fingerprint, catalog.fingerprint, sources("encode", "text", "words")],
        lambda: encode(catalog.lines(), config, on_stage).vectors,
        lambda made, place: np.save(place / "vectors.npy", made),
        lambda place: np.load(place / "vectors.npy", allow_pickle=False),
    )
    return make_texts(catalog.lines(), encoder, vectors, config.index)


def cached_retrievers(
    catalog: Catalog,
    split: Split,
    held_out: HeldOut,
    texts: Texts,
    config: RetrievalConfig,
    index: IndexConfig,
    cache: StageCache,
    on_stage: Callable[[str], None],
) -> tuple[Recipe, dict[str, Retriever]]:
    """Recipe and fitted retrievers, kept by everything that decides them."""

    def write(made: tuple[Recipe, dict[str, Retriever]], place: Path) -> None:
        (place / "recipe.json").write_text(json.dumps(made[0].as_dict()), encoding="utf-8")
        persistence.save_arrays(place / "retrievers.safetensors", retriever_arrays(made[1]))

    def read(place: Path) -> tuple[Recipe, dict[str, Retriever]]:
        recipe = Recipe.from_dict(json.loads((place / "recipe.json").read_text(encoding="utf-8")))
        return recipe, load_retrievers(
            persistence.load_arrays(place / "retrievers.safetensors"), texts, recipe
        )

    inputs = [
        split.training.sha256(),
        split.log.fingerprint,
        catalog.fingerprint,
        held_out.sha256(),
        texts.encoder.fingerprint,
        config.model_dump(),
        index.model_dump(),
        sources(*FITTING),
    ]
    return cache.get(
        "retrievers",
        inputs,
        lambda: choose_recipe(
            split.training,
            held_out,
            texts,
            config,
            lambda stage: on_stage(f"choosing {stage}"),
        ),
        write,
        read,
    )


def tuned(
    state: State,
    split: Split,
    held_out: HeldOut,
    config: Config,
    minutes: float | None,
    cache: StageCache,
    on_step: Callable[[Progress, float], None] | None,
) -> tuple[State, dict[str, Any]]:
    """Train the language model, or take up what a run of the same settings left, and fit its weight."""
    from llmrec.lm_training import fine_tune

    settings = config.training.lasting(minutes)
    late = None
    if config.protocol.split == "cold-item":
        # Items that are held out are those that come after training.
        late = split.training.counts(len(state.catalog)) == 0
    with tempfile.TemporaryDirectory(prefix="llmrec-") as temporary:
        # The trainer keeps its own fingerprint, and a finished run is read back.
        key: list[Any] = [
            split.training.sha256(),
            held_out.sha256(),
            split.log.fingerprint,
            state.catalog.fingerprint,
            state.texts.encoder.fingerprint,
            state.repeats,
            config.lm.model_dump(),
            settings.model_dump(),
            [more.model_dump() for more in config.beside],
            sources(*TUNING),
        ]
        if config.beside or not isinstance(config.lm, ItemTokensConfig):
            # Those that read words learn from the candidates that a recipe's retrievers give.
            key += [
                {**state.recipe.as_dict(), "log": None},
                sources(*FITTING, "mining"),
            ]
        place = cache.place("lm", key) if cache.folder else Path(temporary)
        cache.found["lm"] = (place / "checkpoint.safetensors").is_file()
        model, made, recipe = fine_tune(
            state,
            split.training,
            held_out,
            config,
            settings,
            data=split.log.fingerprint,
            folder=place,
            minutes=minutes,
            late=late,
            on_step=on_step,
        )
    cards = [one.card.training if one.card else {} for one in made]
    speed = made[0].report.events_per_second
    training: dict[str, Any] = {**cards[0], "minutes": settings.minutes, "events_per_second": speed}
    if len(made) > 1:
        further = zip(made[1:], cards[1:], strict=True)
        training["beside"] = [{"mode": one.mode, **card, "joining": one.entry} for one, card in further]
    return replace(state, recipe=recipe, lm=model), training


def estimate(
    catalog: Catalog,
    split: Split,
    sampled: int,
    reported: int,
    typed: int,
    config: Config,
    *,
    lm: bool,
    minutes: float | None,
) -> dict[str, float]:
    """Seconds that the long stages take where nothing is kept, from operations and a probe of this machine.

    `sampled` and `reported` are numbers of users, with and without the language model; `typed` of queries.
    A language model that trains by steps instead of minutes is left out.
    """
    n, m = 1024, len(catalog)
    probe = np.random.default_rng(0).random((n, n), dtype=np.float32)
    probe @ probe
    begun = time.perf_counter()
    probe @ probe
    per_operation = (time.perf_counter() - begun) / n**3
    begun = time.perf_counter()
    for _ in range(5):
        scores = np.random.default_rng(1).random(m, dtype=np.float32)
        np.argsort(-np.partition(scores, m - min(m, 200)))
    per_ranking = (time.perf_counter() - begun) / 5
    search = config.retrieval
    # Some nine models are solved, each about twice n^3 operations with the rest of the work on the matrix;
    # as many decays and settings of the others again rank for every user of the search.
    solved = min(m, search.ease.max_items)
    fits = (9 if m == solved else 1) * 2 * solved**3 * per_operation
    trials = 75 * min(len(split.validation), search.search_users) * per_ranking
    chosen = 60.0 * search.search_minutes if search.search_minutes else fits + trials
    expected = {
        "encode": 0.0 if config.encoder.name == LIGHT else m * 128 * 2.2e7 / 4 * per_operation,
        "fit_retrievers": chosen if search.search or search.search_minutes else fits / 9,
        "rank": (8 * reported + 8 * sampled * lm) * per_ranking * 2,
        "search": 6 * typed * per_ranking,
    }
    train = config.training.lasting(minutes).minutes
    if lm and train is not None:
        further = (more.training.lasting(minutes).minutes or 0.0 for more in config.beside)
        expected["finetune"] = 60.0 * (train + sum(further))
    return {name: round(seconds, 1) for name, seconds in expected.items()}


def in_words(expected: Mapping[str, float]) -> str:
    """What `estimate` says, for people."""
    total = sum(expected.values()) / 60
    stages = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in expected.items() if seconds >= 6)
    return f"about {total:.1f} minutes" + (f" ({stages})" if stages else "")
