"""From a configuration and data to parts: catalogue, log, encoder, text vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.catalog import Catalog
from llmrec.config import Config, DataConfig
from llmrec.encode.light import LightEncoder
from llmrec.errors import ConfigError
from llmrec.events import EventLog
from llmrec.families import Texts
from llmrec.fetch import resolve
from llmrec.index.aside import beside
from llmrec.index.config import IndexConfig
from llmrec.index.making import make_index
from llmrec.protocols import Encoder, Floats
from llmrec.text import changed_lines

LIGHT = "light"
"""Name of the encoder that needs no download."""


def read_catalog(items: Any, config: DataConfig, kinds: Mapping[str, str] | None = None) -> Catalog:
    """Load the items, which may be to join others of known `kinds`; a `Catalog` is taken as it is."""
    if isinstance(items, Catalog):
        return items
    return Catalog.load(
        items,
        mapping=config.items_mapping or None,
        policy=config.policy,
        ignore=config.items_ignore,
        lists=config.lists,
        kinds=kinds,
    )


def read_log(events: Any, catalog: Catalog, config: DataConfig, *, empty: bool = False) -> EventLog:
    """Load the events, of which nothing may be left if `empty`; an `EventLog` is taken as it is."""
    if isinstance(events, EventLog):
        return events
    return EventLog.load(
        events,
        catalog,
        mapping=config.events_mapping or None,
        clock=config.clock,
        ties=config.ties,
        policy=config.policy,
        rating_threshold=config.rating_threshold,
        event_weights=config.event_weights,
        empty=empty,
        timestamp_format=config.timestamp_format,
    )


def make_encoder(
    config: Config,
    lines: Sequence[str],
    arrays: Mapping[str, NDArray[Any]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Encoder:
    """Make the encoder that the configuration names.

    Parameters
    ----------
    lines
        What a light encoder is fitted on.
    arrays
        State of a light encoder that was fitted before.
    on_progress
        Called with (texts done, texts in all) while a sentence encoder reads many.

    Raises
    ------
    FetchError, ImportError
        If the model or its packages cannot be had.
    """
    if config.encoder.name == LIGHT:
        return LightEncoder.from_arrays(arrays) if arrays else LightEncoder.fit(lines, config.encoder.dim)
    from llmrec.encode.sentence import SentenceEncoder

    folder = resolve(config.encoder.name, allow_hub=config.allow_hub)
    return SentenceEncoder(folder, on_progress=on_progress)


def encode(
    lines: Sequence[str], config: Config, on_stage: Callable[[str], None], url: str | None = None
) -> Texts:
    """Encode and index the catalogue's lines; `on_stage` is told of each tenth that is done.

    `url` is that of a server for the vectors.
    """
    on_stage("encoding item texts")
    told = 0

    def show(done: int, total: int) -> None:
        nonlocal told
        if 10 * done // total > told:
            told = 10 * done // total
            on_stage(f"encoding item texts, {done:,} of {total:,}")

    encoder = make_encoder(config, lines, on_progress=show)
    vectors = encoder.encode(lines)
    return Texts(lines, vectors, encoder, make_index(vectors, config.index, on_stage, url=url))


def make_texts(
    lines: Sequence[str],
    encoder: Encoder,
    vectors: Floats | None = None,
    config: IndexConfig | None = None,
    *,
    url: str | None = None,
    name: str | None = None,
) -> Texts:
    """Encode the catalogue's lines, unless their vectors are given, and index them (see `make_index`)."""
    if vectors is None:
        vectors = encoder.encode(lines)
    if vectors.shape != (len(lines), encoder.dim):
        raise ConfigError(
            f"{len(lines)} items of {encoder.dim} dimensions need as many vectors, got {vectors.shape}"
        )
    return Texts(lines, vectors, encoder, make_index(vectors, config or IndexConfig(), url=url, name=name))


def grown_texts(texts: Texts, lines: Sequence[str], *, listed: bool = True) -> Texts:
    """Encode only the lines that are new or changed, by code; those not `listed` are put on no server."""
    changed = changed_lines(texts.lines, lines)
    vectors = np.empty((len(lines), texts.encoder.dim), dtype=np.float32)
    vectors[: len(texts.vectors)] = texts.vectors
    if changed:
        vectors[changed] = texts.encoder.encode([lines[code] for code in changed])
    codes = np.array(changed, dtype=np.int32)
    index = texts.index.grown(vectors, codes) if listed else beside(texts.index, vectors, codes)
    return Texts(lines, vectors, texts.encoder, index)
