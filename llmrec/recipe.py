"""The recipe: which retrievers there are, with which settings and weights; fitting and keeping them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from llmrec.candidates import Calibration, Weights
from llmrec.families import FAMILIES, Texts, TopicsConfig, TrainingLog
from llmrec.metrics import Ranks
from llmrec.protocols import Codes, Query, Retriever
from llmrec.retrieve.again import AgainConfig
from llmrec.retrieve.dense import NearestConfig, ProfileConfig
from llmrec.retrieve.factors import ALSConfig
from llmrec.retrieve.graph import LightGCNConfig
from llmrec.retrieve.linear import EASEConfig
from llmrec.retrieve.popularity import RecentConfig
from llmrec.retrieve.sequence_config import GRU4RecConfig, SequenceConfig
from llmrec.retrieve.transitions import TransitionsConfig
from llmrec.text import query_text
from llmrec.types import Request

ALWAYS = ("popularity", "profile", "text", "bm25")
"""Families that every recipe has: the fallback, and those that the catalogue gives for nothing."""


VALIDATION_USERS = 1000
"""Held-out users that decide which state of a language model is kept, at most."""

REPEATS = 0.05
"""Share of repeated items in a log from which on seen items may come back."""


class RetrievalConfig(BaseModel):
    """Which retrievers there are, where their settings start, and how they are searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    families: tuple[str, ...] = Field(
        ("ease", "transitions"),
        description="families that are fitted, besides popularity and the texts: ease, transitions, als, "
        "lightgcn, gru4rec, caser, sasrec, recent, trending, nearest, topics, again",
    )
    depth: int = Field(200, ge=1, description="hits taken from each retriever")
    ease: EASEConfig = EASEConfig()
    transitions: TransitionsConfig = TransitionsConfig()
    als: ALSConfig = ALSConfig()
    lightgcn: LightGCNConfig = LightGCNConfig()
    gru4rec: GRU4RecConfig = GRU4RecConfig()
    caser: SequenceConfig = SequenceConfig()
    sasrec: SequenceConfig = SequenceConfig()
    recent: RecentConfig = RecentConfig()
    trending: RecentConfig = RecentConfig()
    profile: ProfileConfig = ProfileConfig()
    nearest: NearestConfig = NearestConfig()
    topics: TopicsConfig = TopicsConfig()
    again: AgainConfig = AgainConfig()
    repeats: bool | None = Field(
        None,
        description="people choose the same items again; None decides by the share of repeats in the log",
    )
    search: bool = Field(True, description="choose settings and weights on held-out events")
    search_minutes: float | None = Field(
        None, gt=0, description="try all families for so long and keep those that pay, by forward selection"
    )
    search_users: int = Field(2000, ge=1, description="held-out users that the search looks at")
    lm_users: int = Field(
        5000, ge=1, description="held-out users that choose the weight of the language model, at most"
    )
    seed: int = 0

    @field_validator("families")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in FAMILIES]
        if unknown:
            raise ValueError(
                f"unknown families {', '.join(unknown)}; known are {', '.join(sorted(FAMILIES))}"
            )
        return tuple(dict.fromkeys(names))

    def has_repeats(self, share: float) -> bool:
        """Whether seen items may come back, for a log with this share of repeats."""
        return share >= REPEATS if self.repeats is None else self.repeats

    def for_repeats(self, repeats: bool) -> RetrievalConfig:
        """The same with the family ``again`` where people choose the same items again."""
        if not repeats or "again" in self.families:
            return self
        return self.model_copy(update={"families": (*self.families, "again")})

    def settings(self) -> dict[str, BaseModel]:
        """Families that take part, each with its settings."""
        names = dict.fromkeys((*ALWAYS[:1], *self.families, *ALWAYS[1:]))
        return {name: getattr(self, name, None) or FAMILIES[name].settings() for name in names}


FEWEST = 20
"""Held-out users below which nothing is chosen by them: what a few like by chance would decide."""

TOO_FEW = "held-out events, too few to choose by"
"""Names the entry of the log that says so."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Queries and the item that followed each, shape (queries,)."""

    queries: Sequence[Query]
    targets: Codes

    def sha256(self) -> str:
        """Hash of histories and targets: says on which events something was chosen."""
        digest = hashlib.sha256()
        for query, target in zip(self.queries, self.targets, strict=True):
            digest.update(query.history.astype("<i4").tobytes() + int(target).to_bytes(8, "little") + b";")
        return digest.hexdigest()

    def with_history(self) -> HeldOut:
        """Those that have one: the others get what is popular, whatever is chosen."""
        rows = np.flatnonzero([len(query.history) > 0 for query in self.queries])
        return self if len(rows) == len(self.queries) else self.take(rows)

    def take(self, rows: NDArray[np.int64]) -> HeldOut:
        """Some of them."""
        return HeldOut([self.queries[i] for i in rows], self.targets[rows])

    def sample(self, n: int, seed: int) -> HeldOut:
        """A random part of at most n, in the old order."""
        if len(self.queries) <= n:
            return self
        return self.apart(n, seed)[0]

    def apart(self, n: int, seed: int) -> tuple[HeldOut, HeldOut]:
        """A random part of n, and the others, each in the old order."""
        drawn = np.random.default_rng(seed).choice(len(self.queries), n, replace=False)
        others = np.setdiff1d(np.arange(len(self.queries)), drawn)
        return self.take(np.sort(drawn)), self.take(others)


def roles(held_out: HeldOut, seed: int) -> tuple[HeldOut, HeldOut]:
    """Held-out users who choose which state of a language model is kept, and those who judge it.

    The best of many states looks better than it is to those who chose it. They are half of all at most.
    """
    n = len(held_out.queries)
    return held_out.apart(min(VALIDATION_USERS, -(-n // 2)), seed)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the search chose: families with settings, weights for each kind of request, and all trials."""

    settings: Mapping[str, BaseModel]
    history: Weights
    query: Weights
    similar: Weights
    log: list[dict[str, Any]] = field(default_factory=list)
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def default(cls, config: RetrievalConfig) -> Recipe:
        """The recipe where nothing can be searched: too few held-out events, or search switched off."""
        settings = config.settings()
        start = {"ease": 0.7, "transitions": 1.0, "profile": 0.05}
        asked = [name for name in config.families if FAMILIES[name].asks != "words"]
        # What is the same for everybody only tips the scales.
        weight = {name: 1.0 if FAMILIES[name].asks else 0.1 for name in asked} | start
        by_history = {name: weight[name] for name in settings if name in weight}
        return cls(
            settings,
            history=Weights(by_history),
            query=Weights(
                {"bm25": 1.0, "text": 1.0, **{n: w / 10 for n, w in by_history.items()}, "popularity": 0.3}
            ),
            similar=Weights({"profile": 1.0, **{n: 0.3 for n in ("transitions", "ease") if n in settings}}),
        )

    @property
    def uses_lm(self) -> bool:
        """Whether the language model takes part in answering any kind of request."""
        return max(self.history.most_lm, self.query.most_lm) > 0

    def asks_lm(self, request: Request) -> bool:
        """Whether leaving the language model out could change the answer to a request."""
        typed = bool(query_text(request.query))
        if not typed and request.user is None and not request.history:
            return False  # what is popular
        weights = self.query if typed else self.history
        return weights.most_lm > 0 or weights.plain is not None

    def with_lm(self, weight: float) -> Recipe:
        """The same with another weight of the language model, for all requests but items like an item."""
        return replace(self, history=self.history.with_lm(weight), query=self.query.with_lm(weight))

    @property
    def best_alone(self) -> str | None:
        """The family that was best alone, by history, where the recipe was chosen; None if unknown."""
        for entry in self.log:
            if entry["search"] == "history, each alone":
                alone: dict[str, float] = next(v for v in entry.values() if isinstance(v, dict))
                return max(alone, key=lambda name: alone[name])
        return None

    def answering(self, *asked: str) -> list[str]:
        """Families that can answer a query that has these: ``history``, ``words``."""
        return [name for name in self.settings if FAMILIES[name].asks in ("", *asked)]

    def as_dict(self) -> dict[str, Any]:
        """The form written to the manifest."""
        weights = {n: getattr(self, n).as_dict() for n in ("history", "query", "similar")}
        settings = {name: value.model_dump() for name, value in self.settings.items()}
        calibration = {"temperature": self.calibration.temperature, "mix": self.calibration.mix}
        return {"settings": settings, **weights, "calibration": calibration, "log": self.log}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Read `as_dict()`."""
        return cls(
            settings={name: FAMILIES[name].settings(**value) for name, value in values["settings"].items()},
            history=Weights.from_dict(values["history"]),
            query=Weights.from_dict(values["query"]),
            similar=Weights.from_dict(values["similar"]),
            log=list(values["log"]),
            calibration=Calibration(**values["calibration"]),
        )


def fit_retrievers(log: TrainingLog, texts: Texts, recipe: Recipe) -> dict[str, Retriever]:
    """Fit every retriever of the recipe on a log."""
    return {name: FAMILIES[name].fit(log, texts, value) for name, value in recipe.settings.items()}


def retriever_arrays(retrievers: Mapping[str, Retriever]) -> dict[str, dict[str, NDArray[Any]]]:
    """State of the retrievers that learn from the log; the others are made from the catalogue."""
    # The Protocol asks for no arrays: a caller's own retriever need not be kept.
    learned: dict[str, Any] = {n: r for n, r in retrievers.items() if n in FAMILIES and FAMILIES[n].learns}
    return {name: retriever.arrays() for name, retriever in learned.items()}


def load_retrievers(
    arrays: Mapping[str, Mapping[str, NDArray[Any]]], texts: Texts, recipe: Recipe
) -> dict[str, Retriever]:
    """Make the retrievers from `retriever_arrays()` and the catalogue, which may have grown since."""
    return {
        name: FAMILIES[name].load(arrays.get(name, {}), texts, value)
        for name, value in recipe.settings.items()
    }


def grow_retrievers(
    retrievers: Mapping[str, Retriever], texts: Texts, recipe: Recipe
) -> dict[str, Retriever]:
    """Make the retrievers for a catalogue that changed or grew, with as much of them as can be kept."""
    grown = {}
    for name in recipe.settings:
        grow, old = FAMILIES[name].grow, retrievers[name]
        if grow is not None:
            grown[name] = grow(old, texts)
        else:
            arrays = retriever_arrays({name: old}).get(name, {})
            grown[name] = FAMILIES[name].load(arrays, texts, recipe.settings[name])
    return grown


def ranks_in(results: Iterable[Codes], targets: Codes) -> Ranks:
    """Rank of each target in its list of codes, from 1; 0 if it is not there."""
    ranks = np.zeros(len(targets), dtype=np.int64)
    for row, (items, target) in enumerate(zip(results, targets, strict=True)):
        found = np.flatnonzero(items == target)
        ranks[row] = found[0] + 1 if len(found) else 0
    return ranks
