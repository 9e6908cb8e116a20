"""The recipe: which retrievers there are, with which settings and weights; fitting and keeping them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llmrec.metrics import Ranks
from llmrec.pipeline import Weights
from llmrec.protocols import Codes, Encoder, Floats, Query, Retriever, VectorIndex
from llmrec.retrieve.dense import ProfileConfig, ProfileRetriever, TextQueryRetriever
from llmrec.retrieve.lexical import BM25Retriever
from llmrec.retrieve.linear import EASEConfig, EASERetriever
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.retrieve.transitions import TransitionsConfig, TransitionsRetriever


class RetrievalConfig(BaseModel):
    """Which retrievers there are, where their settings start, and how they are searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(200, ge=1, description="hits taken from each retriever")
    ease: EASEConfig = EASEConfig()
    transitions: TransitionsConfig = TransitionsConfig()
    profile: ProfileConfig = ProfileConfig()
    search: bool = Field(True, description="choose settings and weights on held-out events")
    search_users: int = Field(2000, ge=1, description="held-out users that the search looks at")
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Texts:
    """The catalogue in words and vectors, by code: what text retrievers are made of."""

    lines: Sequence[str]
    vectors: Floats
    encoder: Encoder
    index: VectorIndex


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

    def sample(self, n: int, seed: int) -> HeldOut:
        """A random part of at most n, in the old order."""
        if len(self.queries) <= n:
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(self.queries), n, replace=False))
        return HeldOut([self.queries[i] for i in rows], self.targets[rows])


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the search chose: settings, weights for each kind of request, and the log of all trials."""

    ease: EASEConfig
    transitions: TransitionsConfig
    profile: ProfileConfig
    history: Weights
    query: Weights
    similar: Weights
    log: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def default(cls, config: RetrievalConfig) -> Recipe:
        """The recipe where nothing can be searched: too few held-out events, or search switched off."""
        by_history = {"ease": 0.7, "transitions": 1.0, "profile": 0.05}
        return cls(
            ease=config.ease,
            transitions=config.transitions,
            profile=config.profile,
            history=Weights(by_history),
            query=Weights({"bm25": 1.0, "text": 1.0, **{n: w / 10 for n, w in by_history.items()}}),
            similar=Weights({"profile": 1.0, "transitions": 0.3, "ease": 0.3}),
        )

    @property
    def uses_lm(self) -> bool:
        """Whether the language model takes part in answering any kind of request."""
        return max(self.history.lm, self.query.lm) > 0

    def as_dict(self) -> dict[str, Any]:
        """The form written to the manifest."""
        weights = {
            n: {"retrievers": dict(w.retrievers), "lm": w.lm}
            for n, w in (("history", self.history), ("query", self.query), ("similar", self.similar))
        }
        settings = {n: getattr(self, n).model_dump() for n in ("ease", "transitions", "profile")}
        return {**settings, **weights, "log": self.log}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Read `as_dict()`."""
        return cls(
            ease=EASEConfig(**values["ease"]),
            transitions=TransitionsConfig(**values["transitions"]),
            profile=ProfileConfig(**values["profile"]),
            history=Weights(**values["history"]),
            query=Weights(**values["query"]),
            similar=Weights(**values["similar"]),
            log=list(values["log"]),
        )


def hash_histories(histories: Sequence[Codes]) -> str:
    """SHA-256 of histories: says on which events something was fitted."""
    digest = hashlib.sha256()
    for history in histories:
        digest.update(len(history).to_bytes(8, "little") + history.astype("<i4").tobytes())
    return digest.hexdigest()


def fit_retrievers(
    histories: Sequence[Codes], texts: Texts, recipe: Recipe, weights: Sequence[Floats] | None = None
) -> dict[str, Retriever]:
    """Fit every retriever on the histories; `weights` are those of the events, one array a history."""
    n_items = len(texts.lines)
    return {
        "popularity": PopularityRetriever.fit(histories, n_items, weights),
        "ease": EASERetriever.fit(histories, n_items, recipe.ease, weights),
        "transitions": TransitionsRetriever.fit(histories, n_items, recipe.transitions, weights),
        **text_retrievers(texts, recipe),
    }


def text_retrievers(texts: Texts, recipe: Recipe) -> dict[str, Retriever]:
    """The retrievers that need no log."""
    return {
        "profile": ProfileRetriever(texts.vectors, texts.index, recipe.profile),
        "text": TextQueryRetriever(texts.encoder, texts.index),
        "bm25": BM25Retriever(texts.lines),
    }


def retriever_arrays(retrievers: Mapping[str, Retriever]) -> dict[str, dict[str, NDArray[Any]]]:
    """State of the retrievers that were fitted on the log; the others are made from the catalogue."""
    fitted = (PopularityRetriever, EASERetriever, TransitionsRetriever)
    return {name: r.arrays() for name, r in retrievers.items() if isinstance(r, fitted)}


def load_retrievers(
    arrays: Mapping[str, Mapping[str, NDArray[Any]]], texts: Texts, recipe: Recipe
) -> dict[str, Retriever]:
    """Make the retrievers from `retriever_arrays()` and the catalogue."""
    return {
        "popularity": PopularityRetriever.from_arrays(arrays["popularity"]),
        "ease": EASERetriever.from_arrays(arrays["ease"], recipe.ease),
        "transitions": TransitionsRetriever.from_arrays(arrays["transitions"], recipe.transitions),
        **text_retrievers(texts, recipe),
    }


def grown_retrievers(
    retrievers: Mapping[str, Retriever], texts: Texts, recipe: Recipe
) -> dict[str, Retriever]:
    """The same retrievers over a catalogue that has grown or changed."""
    n_items = len(texts.lines)
    fitted = (PopularityRetriever, EASERetriever, TransitionsRetriever)
    kept: dict[str, Retriever] = {n: r.grown(n_items) for n, r in retrievers.items() if isinstance(r, fitted)}
    return {**kept, **text_retrievers(texts, recipe)}


def ranks_in(results: Iterable[Codes], targets: Codes) -> Ranks:
    """Rank of each target in its list of codes, from 1; 0 if it is not there."""
    ranks = np.zeros(len(targets), dtype=np.int64)
    for row, (items, target) in enumerate(zip(results, targets, strict=True)):
        found = np.flatnonzero(items == target)
        ranks[row] = found[0] + 1 if len(found) else 0
    return ranks
