"""The one object that users meet: fit, fine-tune, save, load, then verbs."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl

from llmrec import persistence
from llmrec.assembly import encode, read_catalog, read_log
from llmrec.catalog import Catalog
from llmrec.changing import Changing
from llmrec.config import Config, located, one_base
from llmrec.errors import ConfigError, ConflictError, DataError, RequestError
from llmrec.evaluation.run import Systems, run_systems
from llmrec.evaluation.split import Part, tail
from llmrec.events import EventLog
from llmrec.families import Texts
from llmrec.index.making import dropped_on_error, make_index
from llmrec.index.server import ServerIndex
from llmrec.protocols import Retriever
from llmrec.recipe import Recipe, RetrievalConfig
from llmrec.saved import Saved, drop_index, drop_replaced, index_of, open_events
from llmrec.selection import choose_recipe
from llmrec.state import State
from llmrec.store.places import Slot, Store, check, copied, new_name, remove
from llmrec.store.sqlite import SQLiteStore
from llmrec.timing import Timing
from llmrec.titles import TitleIndex
from llmrec.types import Request
from llmrec.weights import HEAVIEST

if TYPE_CHECKING:
    from llmrec.continuing import Since
    from llmrec.explain.wording import Writer
    from llmrec.progress import Progress
    from llmrec.tuning import FinetuneReport


class Recommender(Changing):
    """Recommendations from a log and a catalogue. Made by `fit` or `load`, not by the constructor.

    Thread-safe: a request runs on the state it started with while items are added or models refitted.
    """

    def __init__(
        self,
        config: Config,
        state: State,
        store: Store,
        saved: Saved | None = None,
        url: str | None = None,
        index_url: str | None = None,
    ) -> None:
        self.config = config
        self._state = state
        self._slot = Slot(store)
        self._saved = saved
        self._url, self._index_url = url, index_url
        self._model = uuid.uuid4().hex if saved is None else saved.model
        self._applied = 0 if saved is None else saved.changes
        self._refitting = threading.Lock()
        self._adapter: Path | None = None
        self._run: Path | None = None
        self._writer: Writer | None = None
        self._phrasing = threading.Lock()
        self._titles: tuple[Retriever, TitleIndex] | None = None
        self._changing = threading.RLock()
        self._timing = Timing()

    @property
    def folder(self) -> Path | None:
        """Where it is saved, None if it is not."""
        return self._saved.folder if self._saved is not None else None

    @property
    def catalog(self) -> Catalog:
        """The items, those that were removed included."""
        return self._state.catalog

    @property
    def recipe(self) -> Recipe:
        """Settings and weights that were chosen, with the log of all trials."""
        return self._state.recipe

    @property
    def texts(self) -> Texts:
        """The items in words and vectors, by code, and the encoder that made the vectors."""
        return self._state.texts

    @property
    def has_language_model(self) -> bool:
        """Whether there is a tuned language model, loaded or not, of whatever weight."""
        return self._state.lm is not None or self._adapter is not None

    @property
    def fitted_on(self) -> str:
        """Fingerprint of the log that the retrievers were fitted on."""
        return self._state.log

    @property
    def unsaved_items(self) -> bool:
        """Whether items were put or removed that the saved directory has in its event store alone."""
        return self._saved is None or self._applied > self._saved.changes

    # ---- making one -----------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        items: Any,
        events: Any,
        config: Config | Mapping[str, Any] | str | Path | None = None,
        *,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> Self:
        """Fit the retrievers; settings and weights are chosen on a held-out tail, then all events are used.

        Parameters
        ----------
        items, events
            Paths (parquet, csv, jsonl, RecBole atomic files), frames of polars or pandas,
            `datasets.Dataset`, or lists of `Item` and `Event`. Without a log yet, `events` is None: texts
            decide until events were observed and `refit`.
        config
            A `Config`, a mapping, or the path of a TOML file.
        on_stage
            Told the name of each stage as it begins.

        Raises
        ------
        DataError, ConfigError, FetchError
            If data or configuration are invalid, or the encoder cannot be had.
        """
        config = located(Config.of(config))
        url = config.store.wanted()
        check(url)
        on_stage("reading items and events")
        catalog = read_catalog(items, config.data)
        log = EventLog.none(config.data.clock) if events is None else read_log(events, catalog, config.data)
        index_url = config.index.wanted()
        texts = encode(catalog.lines(), config, on_stage, index_url)
        with dropped_on_error(texts.index):
            recipe, repeats = _chosen(log, catalog, texts, config.retrieval, on_stage)
            on_stage("fitting on all events")
            store = SQLiteStore(":memory:")
            store.append(log.to_events(catalog))
            state = State(catalog, texts, recipe, {}, repeats, config.retrieval.depth)
            return cls(config, state.refitted(log), store, url=url, index_url=index_url)

    def finetune(
        self,
        minutes: float | None = None,
        *,
        on_step: Callable[[Progress, float], None] | None = None,
        folder: str | Path | None = None,
        since: Since | None = None,
        stream: Any = None,
    ) -> FinetuneReport:
        """Fine-tune the language model on the stored log with LoRA, and fit its weight in the blend.

        The last event of each user is held out: it decides which state is kept and the weight. With `since`
        the tuned model that is there is continued on newer events instead, with some older ones
        (`training.replay`), and replaced unless the result is shown to be worse on new held-out events; its
        weight stays, and the report says which of the two was kept.

        Parameters
        ----------
        minutes
            Time to train, each model if there are several; the configuration's `training.minutes` and
            `steps` if None.
        on_step
            Called after each step with the progress and the finished share.
        folder
            Where checkpoints go; an interrupted run on the same data and settings is continued from
            there. By default ``training/`` in the directory of a saved recommender, else a temporary one.
        since
            ``"last"`` continues on the events after those that the tuned model knows, a number on those
            after so many seconds since 1970, None trains anew.
        stream
            Events to learn from instead, which need not fit into memory: see `llmrec.streaming.StreamedLog`.
            The stored log still gives the held-out users, who are left out of the stream, and the retrievers.

        Raises
        ------
        DataError, FetchError, ImportError
            If there is nothing to train on, or the language model or its packages cannot be had.
        ModelError, ConfigError
            If there is no model to continue, or one of another shape than the configuration has.
        """
        try:
            from llmrec.tuning import tune
        except ImportError as missing:
            raise ImportError('fine-tuning needs: pip install "llmrec[lm]"') from missing

        run = Path(folder) if folder else (self.folder / "training" if self.folder else None)
        self.follow()
        if since is not None:
            if stream is not None:
                raise ConfigError("a tuned model is continued on stored events; give `since` or `stream`")
            return self._continue(minutes, on_step, run, since)
        # Items that come meanwhile are in neither.
        state = self._state
        log = self._log(state.catalog)
        lm, recipe, report = tune(state, log, self.config, minutes, run, on_step, stream)
        with self._changing:
            if self._state.recipe.settings != state.recipe.settings:
                raise ConflictError(
                    "settings were chosen anew while the language model was tuned: its weight was fitted "
                    "beside other retrievers; fine-tune again"
                )
            # Items may have been added meanwhile.
            self._state = replace(self._state, lm=lm.grown(self._state.texts), recipe=recipe)
            self._adapter, self._run, self._model = None, run, uuid.uuid4().hex
        return report

    def _continue(
        self,
        minutes: float | None,
        on_step: Callable[[Progress, float], None] | None,
        run: Path | None,
        since: Since,
    ) -> FinetuneReport:
        from llmrec.continuing import continue_tuning

        state = self._ready(lm=True)
        log = self._log(state.catalog)
        lm, report = continue_tuning(state, log, self.config, minutes, run, on_step, since)
        if report.continued is not None and report.continued.kept:
            with self._changing:
                self._state = replace(self._state, lm=lm.grown(self._state.texts))
                self._adapter, self._run, self._model = None, run, uuid.uuid4().hex
        elif run is not None:
            persistence.clear_run(run)
        return report

    def refit(self, *, choose: bool = False, on_stage: Callable[[str], None] = lambda stage: None) -> None:
        """Fit the retrievers again on all stored events; settings, weights and language model stay.

        Parameters
        ----------
        choose
            Choose settings and weights anew on a held-out tail, as `fit` does: the log has grown much, or
            there was none. A tuned language model, whose weight is chosen beside the others, is dropped; it
            comes back with `finetune`.
        on_stage
            Told the name of each stage as it begins.

        Raises
        ------
        DataError
            If there is nothing to choose on: no event is stored.
        """
        with self._refitting:
            self.follow()
            # Others go on with the old state meanwhile, and may put items.
            state = self._state
            with self._slot.use() as store:
                empty = store.count() == 0
            log = None if empty and not choose else self._log(state.catalog)
            if log is not None and choose:
                recipe, repeats = _chosen(log, state.catalog, state.texts, self.config.retrieval, on_stage)
                state = replace(state, recipe=recipe, repeats=repeats, lm=None)
            on_stage("fitting on all events")
            fitted = state.refitted(log)
            with self._changing:
                self._state = fitted.after(self._state, chosen=choose)
                self._model = uuid.uuid4().hex
                if choose:
                    self._adapter, self._run = None, None

    def evaluate(self, events: Any, *, users: int | None = None, seed: int = 0) -> Systems:
        """Rank the catalogue for users whose next event is known, and compare the stages.

        Parameters
        ----------
        events
            Events later than the stored ones, in any form that `fit` takes: the first one of each user is
            the target, the stored history is the input. They must not be in the log that was fitted.
        users
            Size of a seeded sample; all if None.
        """
        if users is not None and users < 1:
            raise RequestError(f"users must be at least 1, got {users}")
        state = self._ready(lm=True)
        log = read_log(events, state.catalog, self.config.data)
        first = log.offsets[:-1][np.diff(log.offsets) > 0]
        those, targets = log.user[first].astype(np.int64), log.item[first]
        histories = [self._history(Request(user=log.users[u]), state) for u in those]
        seen = sum(int(t) in h for t, h in zip(targets, histories, strict=True))
        if not state.repeats and 2 * seen > len(targets):
            raise RequestError(
                f"{seen} of {len(targets)} users have the target in their stored history already: "
                "give only events later than those that were fitted"
            )
        part = Part(those, histories, targets, first).sample(users, seed)
        return run_systems(
            part,
            state.pipeline(),
            state.catalog.active,
            not state.repeats,
            with_lm=state.lm is not None,
            best=state.recipe.best_alone,
        )

    def _log(self, catalog: Catalog | None = None) -> EventLog:
        """Stored events, in codes of a catalogue; of the one that is served by default."""
        with self._slot.use() as store:
            columns = store.columns()
        if not len(columns.users):
            raise DataError("no events are stored: there is nothing to learn from")
        frame = pl.DataFrame(
            {
                "user_id": columns.users,
                "item_id": columns.items,
                "timestamp": columns.timestamps,
                # Larger ones may have been stored by an earlier version.
                "weight": np.minimum(columns.weights, HEAVIEST),
            },
            schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "weight": pl.Float64},
            # These are seconds, whatever they look like.
        ).with_columns(pl.from_epoch("timestamp", "s"))
        # The store keeps the order of events, ties included.
        data = self.config.data
        own = self._state.catalog if catalog is None else catalog
        return EventLog.load(frame, own, clock=data.clock, ties="input", policy="drop")

    # ---- saving and loading ---------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write one directory, atomically: a reader or a kill finds the old state or the new one.

        From then on observed events go to the event store of that directory.

        Raises
        ------
        ConflictError
            If this was loaded from or saved into the same directory, and another process has fitted or
            fine-tuned what is there since.
        StoreError
            If the event store cannot be used.
        """
        folder = Path(folder).resolve()
        with self._changing, persistence.saving(folder):
            before = persistence.manifest_of(folder)
            same = self._saved is not None and folder == self._saved.folder
            # A directory that was copied by hand names the tables of the one that it was copied from.
            came_from = None if same or self._saved is None else self._saved.events
            if self._saved is not None and same:
                self._saved.check_model()
            self.follow()
            self._find_adapter()
            came_with = self._state.texts.index.name

            def write(target: Path) -> None:
                self._state.write(target, self._adapter)
                if (target / "adapter").is_dir():
                    persistence.keep_log([self._run, self._adapter], target / "adapter")

            name = persistence.write_state(folder, write)
            if self._saved is not None and not same and came_with is not None:
                # A copy is a model of its own: others go on with the vectors of the one that it is of.
                vectors = self._state.texts.vectors
                self._state = self._state.with_index(
                    make_index(vectors, self.config.index, url=self._index_url)
                )
            manifest = self._manifest(name, (folder / name / "adapter").is_dir())
            # Processes that serve what is replaced still search its vectors: they go with the next save.
            if before.get("index") not in (None, came_with, manifest["index"]):
                manifest["index_before"] = before["index"]
            if self._saved is not None and same:
                manifest |= {"events": self._saved.events, "changes": self._applied}
                persistence.replace_manifest(folder, manifest)
            else:
                # A copy is a model of its own: what is put into the one is not in the other.
                self._model = uuid.uuid4().hex
                manifest |= {"model": self._model, "events": new_name(self._url), "changes": 0}
                self._move_events(folder, manifest)
            if manifest["language_model"]:
                self._adapter = folder / name / "adapter"
            self._saved = Saved(folder, manifest)
            # A reader may have read the old manifest just now: its state stays for one more save.
            kept = [before["state"]] if before else []
            persistence.remove_stale(folder, [name, manifest["events"], *kept])
            self._forget_replaced(before, manifest, came_from, came_with)
            if self._run is not None:
                persistence.clear_run(self._run)
                self._run = None

    def _forget_replaced(
        self,
        before: Mapping[str, Any],
        manifest: Mapping[str, Any],
        came_from: str | None,
        came_with: str | None,
    ) -> None:
        """Remove from their servers what nobody will open again, unless it is where this one came from."""
        if before.get("events") != came_from:
            drop_replaced(before, manifest["events"], self._url)
        if before.get("index_before") not in (None, came_with, manifest["index"]):
            known = Config.of(before["config"]).index.known() or self._index_url
            drop_index(before["index_before"], known, f" of what was in {self.folder}")

    def _manifest(self, state: str, language_model: bool) -> dict[str, Any]:
        return {
            "llmrec": _version(),
            "model": self._model,
            "state": state,
            "config": self.config.model_dump(),
            "recipe": self._state.recipe.as_dict(),
            "repeats": self._state.repeats,
            "encoder": self._state.texts.encoder.fingerprint,
            "catalog": self._state.catalog.fingerprint,
            "log": self._state.log,
            "index": self._state.texts.index.name,
            "language_model": language_model,
        }

    def _move_events(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Copy the events to the store that a manifest names, write it, and go on there; others wait."""
        with self._slot.alone() as store:
            there = copied(store, manifest["events"], folder, self._url)
            try:
                persistence.replace_manifest(folder, manifest)
            except BaseException:
                there.close()
                remove(manifest["events"], folder, self._url)
                raise
            self._slot.put(there)
        self._applied = 0

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        store: str | None = None,
        index: str | None = None,
        engine: str | None = None,
    ) -> Self:
        """Load a saved recommender. The language model is loaded when a request first needs it.

        Parameters
        ----------
        store
            URL of the PostgreSQL database that keeps the events. Where they are in a file beside the model
            they are moved there first, once. If None, events in a database are looked for by the variable
            that the configuration names, or LLMREC_STORE_URL.
        index
            URL of the server that searches the vectors (see `IndexConfig`), written there first where they
            are not yet. If None, one that the model was saved with is looked for by the variable that the
            configuration names, or LLMREC_INDEX_URL.
        engine
            URL of the inference server that runs the language model (see `EngineConfig`). If None, the
            variable that the configuration names, or LLMREC_ENGINE_URL, says where; else it runs here.

        Raises
        ------
        ModelError
            If the directory is none, is damaged, of another format, or was saved with another encoder.
        StoreError
            If the event store or the vector index cannot be opened.
        """
        folder = Path(folder).resolve()
        config = Config.of(persistence.read_manifest(folder)["config"])
        if engine is not None:
            config = config.with_flags(engine={"url": engine})
        manifest, opened, url = open_events(folder, store)
        try:
            index_url, name = index_of(manifest, folder, index)
            state = State.read(folder / manifest["state"], config, manifest, index_url, name)
            made = cls(config, state, opened, Saved(folder, manifest), url, index_url)
            made._adapter = folder / manifest["state"] / "adapter" if manifest["language_model"] else None
            made.follow()
        except BaseException:
            opened.close()
            raise
        return made

    def configure(self, config: Config | Mapping[str, Any] | str | Path) -> None:
        """Take over `lm`, `training`, `beside` and `allow_hub` of a configuration for the next fine-tuning.

        The other sections describe what is fitted already and stay.
        """
        asked = Config.of(config)
        given = located(asked)
        sections: dict[str, Any] = {
            n: getattr(given, n) for n in asked.model_fields_set & {"lm", "training", "beside", "allow_hub"}
        }
        merged = self.config.model_copy(update=sections)
        one_base(merged)
        self.config = merged

    def close(self) -> None:
        """Release the event store, the inference server, and the vector index.

        Vectors on a server go if nothing was saved.
        """
        self._slot.close()
        for lm in (self._state.lm, *(named.model for named in self._state.adapters.values())):
            # One that runs in this process has nothing to let go of.
            if (close := getattr(lm, "close", None)) is not None:
                close()
        if isinstance(index := self._state.texts.index, ServerIndex):
            if self._saved is None:
                index.drop()
            index.close()


def _version() -> str:
    from llmrec import __version__

    return __version__


def _chosen(
    log: EventLog, catalog: Catalog, texts: Texts, config: RetrievalConfig, on_stage: Callable[[str], None]
) -> tuple[Recipe, bool]:
    """Settings and weights by a held-out tail of the log, and whether seen items may come back."""
    train, part = tail(log)
    repeats = config.has_repeats(log.repeat_share())
    search = config.for_repeats(repeats)
    held_out = part.sample(search.search_users, search.seed).held_out(catalog.active, not repeats)
    recipe, _ = choose_recipe(train, held_out, texts, search, lambda s: on_stage(f"choosing {s}"))
    return recipe, repeats
