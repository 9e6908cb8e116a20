"""Everything that a request reads, as one immutable value: catalogue, texts, recipe, fitted models."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from llmrec import persistence
from llmrec.assembly import LIGHT, grown_texts, make_encoder, make_texts
from llmrec.candidates import LM
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.errors import DataError, ModelError, RequestError
from llmrec.evaluation.split import training_log
from llmrec.events import EventLog
from llmrec.families import Texts, TrainingLog
from llmrec.pipeline import Pipeline
from llmrec.protocols import Mask, Retriever, VectorIndex
from llmrec.recipe import Recipe, fit_retrievers, grow_retrievers, load_retrievers, retriever_arrays
from llmrec.retrieve.lexical import BM25Retriever
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.language_model import TunedModel


@dataclass(frozen=True)
class Named:
    """A tuned language model beside the recommender's own, for requests that name it.

    Parameters
    ----------
    weight
        In the blend, in place of the recipe's; None keeps those.
    """

    model: TunedModel
    weight: float | None = None


@dataclass(frozen=True)
class State:
    """What a recommender knows; replaced as a whole, so that a request sees one state.

    Parameters
    ----------
    retrievers
        Fitted ones and those made from the catalogue, without the language model.
    repeats
        Whether people choose the same item again in this log.
    depth
        Hits taken from each retriever.
    log
        Fingerprint of the log that the retrievers were fitted on; empty if there was none.
    lm
        None until it is trained or loaded.
    adapters
        Others, by name.
    """

    catalog: Catalog
    texts: Texts
    recipe: Recipe
    retrievers: Mapping[str, Retriever]
    repeats: bool
    depth: int
    log: str = ""
    lm: TunedModel | None = None
    adapters: Mapping[str, Named] = field(default_factory=dict)

    def pipeline(self) -> Pipeline:
        """The pipeline of these parts."""
        recipe, lm = self.recipe, self.lm
        retrievers = dict(self.retrievers)
        if lm is not None and lm.proposes:
            retrievers[LM] = cast(Retriever, lm.scorer)
        # Removed items are never chosen again.
        prior = self._popularity.shares() * self.catalog.active
        return Pipeline(
            retrievers,
            recipe.history,
            recipe.query,
            recipe.similar,
            lm.scorer if lm is not None else None,
            self.depth,
            recipe.calibration,
            prior / (prior.sum() or 1.0),
            lm.scored if lm is not None else None,
        )

    @property
    def _popularity(self) -> PopularityRetriever:
        popularity = self.retrievers["popularity"]
        assert isinstance(popularity, PopularityRetriever)
        return popularity

    @property
    def chosen(self) -> Mask:
        """Whether an item was ever chosen, shape (items,)."""
        return self._popularity.scores > 0

    def without_language_model(self) -> State:
        """The same with the merge alone."""
        return replace(self, recipe=self.recipe.with_lm(0.0), lm=None)

    def for_adapter(self, name: str | None) -> State:
        """The same with the language model that a request names, None for the recommender's own.

        Raises
        ------
        RequestError
            If there is none of this name.
        """
        if name is None:
            return self
        if name not in self.adapters:
            # The names of the others concern nobody who asks; `Recommender.adapters` has them.
            raise RequestError(f"unknown adapter {name!r}; there are {len(self.adapters)}")
        named = self.adapters[name]
        recipe = self.recipe if named.weight is None else self.recipe.with_lm(named.weight)
        return replace(self, lm=named.model, recipe=recipe)

    def refitted(self, log: EventLog | None) -> State:
        """The same with retrievers fitted on all events of a log, None if it is empty; weights stay."""
        if log is None:
            return replace(
                self, retrievers=fit_retrievers(TrainingLog([], None, []), self.texts, self.recipe), log=""
            )
        retrievers = fit_retrievers(training_log(log), self.texts, self.recipe)
        return replace(self, retrievers=retrievers, log=log.fingerprint)

    def after(self, now: State, *, chosen: bool) -> State:
        """The same with the items that came while it was fitted, and the adapters.

        Parameters
        ----------
        chosen
            Whether settings and weights are new; otherwise those of now stay, with the language model.
        """
        retrievers = self.retrievers
        if now.texts is not self.texts:
            retrievers = grow_retrievers(retrievers, now.texts, self.recipe)
        if not chosen:
            return replace(now, retrievers=retrievers, log=self.log)
        kept = replace(self, catalog=now.catalog, texts=now.texts, retrievers=retrievers)
        return replace(kept, lm=None, adapters=now.adapters)

    def with_catalog(self, catalog: Catalog, *, listed: bool = True) -> State:
        """The same over a catalogue in which items were added or replaced; for a while if not `listed`."""
        if catalog.lines() is self.texts.lines:
            return replace(self, catalog=catalog)
        texts = grown_texts(self.texts, catalog.lines(), listed=listed)
        retrievers = grow_retrievers(self.retrievers, texts, self.recipe)
        before, words = self.retrievers.get("bm25"), retrievers.get("bm25")
        if listed and isinstance(before, BM25Retriever) and isinstance(words, BM25Retriever):
            # Who changes items waits for it, not who searches next.
            words.make_ready_like(before)
        lm = self.lm.grown(texts) if self.lm is not None else None
        adapters = {n: replace(named, model=named.model.grown(texts)) for n, named in self.adapters.items()}
        return replace(self, catalog=catalog, texts=texts, retrievers=retrievers, lm=lm, adapters=adapters)

    def fresh(self) -> State:
        """The same, but that nothing is kept of what the language models have read."""
        adapters = {name: replace(own, model=own.model.fresh()) for name, own in self.adapters.items()}
        return replace(self, lm=None if self.lm is None else self.lm.fresh(), adapters=adapters)

    def with_unlisted(self, items: Sequence[Item]) -> State:
        """The same for one request about items that need not be in the catalogue."""
        if not items:
            return self
        listed_only = self.lm is not None and not self.lm.reads_unlisted
        state = replace(self, lm=None if listed_only else self.lm, adapters={})
        return state.with_catalog(self.catalog.with_items(items), listed=False)

    def with_index(self, index: VectorIndex) -> State:
        """The same with another index over the same vectors."""
        texts = replace(self.texts, index=index)
        retrievers = load_retrievers(retriever_arrays(self.retrievers), texts, self.recipe)
        return replace(self, texts=texts, retrievers=retrievers)

    def write(self, folder: Path, adapter: Path | None) -> None:
        """Write into an empty folder; `adapter` is the folder of a language model that is not loaded."""
        self.catalog.save(folder / "items.parquet")
        np.save(folder / "vectors.npy", self.texts.vectors)
        persistence.save_arrays(folder / "retrievers.safetensors", retriever_arrays(self.retrievers))
        light = getattr(self.texts.encoder, "arrays", None)
        if light is not None:
            persistence.save_arrays(folder / "encoder.safetensors", {"light": light()})
        if self.lm is not None:
            self.lm.save(folder / "adapter")
        elif adapter is not None:
            shutil.copytree(adapter, folder / "adapter")

    @classmethod
    def read(
        cls,
        folder: Path,
        config: Config,
        manifest: Mapping[str, Any],
        url: str | None = None,
        name: str | None = None,
    ) -> Self:
        """Read what `write` wrote, without the language model.

        `url` and `name` are those of a collection on a server that has the vectors, or is made if not.

        Raises
        ------
        ModelError
            If a file is missing or damaged, or the encoder is another than the one that was saved.
        """
        try:
            catalog = Catalog.read(folder / "items.parquet")
        except DataError as broken:
            raise ModelError(f"{folder / 'items.parquet'} is missing or damaged: {broken}") from broken
        if catalog.fingerprint != manifest["catalog"]:
            raise ModelError(
                f"the items in {folder} are not those that were saved: {manifest['catalog'][:12]}... then, "
                f"{catalog.fingerprint[:12]}... now; the directory is damaged, or read by a changed renderer"
            )
        try:
            recipe = Recipe.from_dict(manifest["recipe"])
        except (KeyError, TypeError, ValueError) as broken:
            raise ModelError(
                f"the recipe in {folder.parent} cannot be read: {broken!r}; fit again"
            ) from broken
        light = folder / "encoder.safetensors"
        fitted_here = light.exists() or config.encoder.name == LIGHT
        arrays = persistence.load_arrays(light)["light"] if fitted_here else None
        encoder = make_encoder(config, [], arrays)
        if encoder.fingerprint != manifest["encoder"]:
            raise ModelError(
                f"{folder.parent} was saved with another encoder: {manifest['encoder'][:12]}... then, "
                f"{encoder.fingerprint[:12]}... now; use that one, or fit again"
            )
        vectors = persistence.map_array(folder / "vectors.npy")
        texts = make_texts(catalog.lines(), encoder, vectors, config.index, url=url, name=name)
        fitted = persistence.load_arrays(folder / "retrievers.safetensors")
        try:
            retrievers = load_retrievers(fitted, texts, recipe)
        except (KeyError, ValueError, RuntimeError) as broken:
            raise ModelError(
                f"{folder / 'retrievers.safetensors'} does not hold this recipe: {broken!r}"
            ) from broken
        repeats, depth = bool(manifest["repeats"]), config.retrieval.depth
        return cls(catalog, texts, recipe, retrievers, repeats, depth, manifest["log"])
