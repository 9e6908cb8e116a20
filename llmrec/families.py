"""The families of retrievers: how each is fitted, kept and made again, and what it needs and cannot do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llmrec.encode.topics import TopicEncoder
from llmrec.errors import ConfigError
from llmrec.index.faiss_index import FaissIndex
from llmrec.protocols import Codes, Encoder, Floats, Retriever, VectorIndex
from llmrec.retrieve.again import AgainConfig, AgainRetriever
from llmrec.retrieve.dense import (
    NearestConfig,
    NearestRetriever,
    ProfileConfig,
    ProfileRetriever,
    TextQueryRetriever,
)
from llmrec.retrieve.factors import ALSConfig, ALSRetriever
from llmrec.retrieve.graph import LightGCNConfig, LightGCNRetriever
from llmrec.retrieve.lexical import BM25Retriever
from llmrec.retrieve.linear import EASEConfig, EASERetriever
from llmrec.retrieve.popularity import PopularityRetriever, RecentConfig, RecentRetriever
from llmrec.retrieve.sequence_config import GRU4RecConfig, Kind, SequenceConfig
from llmrec.retrieve.transitions import TransitionsConfig, TransitionsRetriever
from llmrec.text import changed_lines

if TYPE_CHECKING:
    from llmrec.sequences import Source

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Texts:
    """The catalogue in words and vectors, by code: what text retrievers are made of."""

    lines: Sequence[str]
    vectors: Floats
    encoder: Encoder
    index: VectorIndex


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """Histories to fit on, oldest first, with what is known of their events, one array a history.

    Parameters
    ----------
    weights
        None if all are 1.
    stamps
        Seconds since 1970; None if the log has no clock.
    """

    histories: Sequence[Codes]
    weights: Sequence[Floats] | None = None
    stamps: Sequence[NDArray[np.int64]] | None = None

    def counts(self, items: int) -> NDArray[Any]:
        """Weight of the events of each item, shape (items,)."""
        events = np.concatenate([np.empty(0, np.int32), *self.histories])
        weights = None if self.weights is None else np.concatenate([np.empty(0, np.float32), *self.weights])
        return np.bincount(events, weights, minlength=items)

    @property
    def users(self) -> int:
        """Users with events."""
        return sum(len(history) > 0 for history in self.histories)

    @property
    def events(self) -> int:
        """Events of all users."""
        return sum(map(len, self.histories))

    def sha256(self) -> str:
        """Hash of the histories and of weights that are not 1: says on which events something was fitted."""
        digest = hashlib.sha256()
        for history in self.histories:
            digest.update(len(history).to_bytes(8, "little") + history.astype("<i4").tobytes())
        for weights in self.weights or ():
            digest.update(weights.astype("<f4").tobytes())
        return digest.hexdigest()

    def source(self) -> Source:
        """What a training run draws its windows from.

        Raises
        ------
        DataError
            If there are no events.
        """
        from llmrec.sequences import Source

        return Source(self.histories, self.weights)


class NoConfig(BaseModel):
    """A family without settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Family:
    """One family.

    Parameters
    ----------
    settings
        The class of its configuration.
    fit
        Makes the retriever from a log, texts and settings.
    load
        Makes it again from its arrays (empty for what has none), texts and settings.
    asks
        What a query must have to be answered: ``history``, ``words``, or ``""`` for nothing.
    learns
        Whether it is fitted on the log; the others are made from the catalogue alone.
    clock
        Whether fitting needs time stamps.
    grow
        Makes the retriever for texts that changed or grew since it was made; None loads it from its arrays.
    new_items
        Whether it can propose items without events; EASE those that it was fitted with, by their text.
    """

    settings: type[BaseModel]
    fit: Callable[[TrainingLog, Texts, Any], Retriever]
    load: Callable[[Arrays, Texts, Any], Retriever]
    asks: str = "history"
    learns: bool = True
    clock: bool = False
    new_items: bool = False
    grow: Callable[[Any, Texts], Retriever] | None = None


def _popularity(log: TrainingLog, texts: Texts, _: NoConfig) -> Retriever:
    return PopularityRetriever.fit(log.histories, len(texts.lines), log.weights, log.stamps)


def _recent(trend: bool) -> Family:
    def fit(log: TrainingLog, texts: Texts, config: RecentConfig) -> Retriever:
        if log.stamps is None:
            raise ConfigError("recent and trending popularity need time stamps; the log has no clock")
        return RecentRetriever.fit(
            log.histories, log.stamps, len(texts.lines), config, log.weights, trend=trend
        )

    def load(arrays: Arrays, texts: Texts, config: RecentConfig) -> Retriever:
        return RecentRetriever(arrays["scores"], config, trend=trend).grown(len(texts.lines))

    return Family(RecentConfig, fit, load, asks="", clock=True, grow=_by_size)


def _by_size(old: Any, texts: Texts) -> Retriever:
    grown: Retriever = old.grown(len(texts.lines))
    return grown


def _counted(retriever: Any, settings: type[BaseModel]) -> Family:
    """A family that learns from histories alone."""

    def fit(log: TrainingLog, texts: Texts, config: Any) -> Retriever:
        made: Retriever = retriever.fit(log.histories, len(texts.lines), config, log.weights)
        return made

    def load(arrays: Arrays, texts: Texts, config: Any) -> Retriever:
        made: Retriever = retriever.from_arrays(arrays, config).grown(len(texts.lines))
        return made

    return Family(settings, fit, load, grow=_by_size)


def _ease(log: TrainingLog, texts: Texts, config: EASEConfig) -> Retriever:
    return EASERetriever.fit(log.histories, len(texts.lines), config, log.weights, texts.vectors)


def _sequence(kind: Kind, settings: type[SequenceConfig] = SequenceConfig) -> Family:
    def retriever() -> Any:
        try:
            from llmrec.retrieve.sequence import SequenceRetriever
        except ImportError as missing:
            raise ImportError(f'{kind} needs: pip install "llmrec[lm]"') from missing
        return SequenceRetriever

    def fit(log: TrainingLog, texts: Texts, config: SequenceConfig) -> Retriever:
        made: Retriever = retriever().fit(kind, log.histories, texts.vectors, config, log.weights)
        return made

    def load(arrays: Arrays, texts: Texts, config: SequenceConfig) -> Retriever:
        made: Retriever = retriever().from_arrays(kind, arrays, texts.vectors, config)
        return made

    return Family(settings, fit, load, new_items=True, grow=lambda old, texts: old.grown(texts.vectors))


def _from_texts(
    settings: type[BaseModel], make: Callable[[Texts, Any], Retriever], asks: str = "history"
) -> Family:
    """A family that needs no log."""
    return Family(
        settings,
        lambda log, texts, config: make(texts, config),
        lambda arrays, texts, config: make(texts, config),
        asks=asks,
        learns=False,
        new_items=True,
    )


class TopicsConfig(BaseModel):
    """Settings of the topic profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(50, ge=2, description="topics")
    decay: float = Field(0.8, gt=0, le=1, description="weight of a history item, per step of age")


class TopicsRetriever(ProfileRetriever):
    """Items whose topics are those of the history."""

    name = "topics"

    def __init__(
        self, encoder: TopicEncoder, lines: Sequence[str], vectors: Floats, index: VectorIndex, decay: float
    ) -> None:
        super().__init__(vectors, index, ProfileConfig(decay=decay))
        self.encoder, self.lines = encoder, list(lines)

    @classmethod
    def of(cls, encoder: TopicEncoder, lines: Sequence[str], config: TopicsConfig) -> TopicsRetriever:
        """Place all items among the topics."""
        vectors, index = encoder.encode(lines), FaissIndex(encoder.dim)
        index.add(vectors)
        return cls(encoder, lines, vectors, index, config.decay)

    def grown(self, lines: Sequence[str]) -> TopicsRetriever:
        """The same topics for a catalogue that changed or grew; what did not change is not read again."""
        changed = np.array(changed_lines(self.lines, lines), np.int32)
        more = np.zeros((len(lines) - len(self.lines), self.encoder.dim), np.float32)
        vectors = np.concatenate([self.vectors, more])
        if len(changed):
            vectors[changed] = self.encoder.encode([lines[code] for code in changed])
        index = self.index.grown(vectors, changed)
        return TopicsRetriever(self.encoder, lines, vectors, index, self.config.decay)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The topics: items that are added later are placed among them."""
        return self.encoder.arrays()


FAMILIES: Mapping[str, Family] = {
    "popularity": Family(
        NoConfig,
        _popularity,
        lambda arrays, texts, _: PopularityRetriever.from_arrays(arrays).grown(len(texts.lines)),
        asks="",
        new_items=True,
        grow=_by_size,
    ),
    "recent": _recent(trend=False),
    "trending": _recent(trend=True),
    "ease": replace(_counted(EASERetriever, EASEConfig), fit=_ease, new_items=True),
    "transitions": _counted(TransitionsRetriever, TransitionsConfig),
    "als": _counted(ALSRetriever, ALSConfig),
    "lightgcn": _counted(LightGCNRetriever, LightGCNConfig),
    "gru4rec": _sequence("gru4rec", GRU4RecConfig),
    "caser": _sequence("caser"),
    "sasrec": _sequence("sasrec"),
    "profile": _from_texts(ProfileConfig, lambda t, c: ProfileRetriever(t.vectors, t.index, c)),
    "nearest": _from_texts(NearestConfig, lambda t, c: NearestRetriever(t.vectors, t.index, c)),
    "topics": Family(
        TopicsConfig,
        lambda log, texts, config: TopicsRetriever.of(
            TopicEncoder.fit(texts.lines, config.dim), texts.lines, config
        ),
        lambda arrays, texts, config: TopicsRetriever.of(
            TopicEncoder.from_arrays(arrays), texts.lines, config
        ),
        new_items=True,
        grow=lambda old, texts: old.grown(texts.lines),
    ),
    "again": Family(
        AgainConfig,
        lambda log, texts, config: AgainRetriever(len(texts.lines), config),
        lambda arrays, texts, config: AgainRetriever(len(texts.lines), config),
        learns=False,
    ),
    "text": _from_texts(NoConfig, lambda t, _: TextQueryRetriever(t.encoder, t.index), asks="words"),
    "bm25": replace(
        _from_texts(NoConfig, lambda t, _: BM25Retriever(t.lines), asks="words"),
        grow=lambda old, texts: old.grown(texts.lines),
    ),
}
"""Every family, by the name of its retriever."""
