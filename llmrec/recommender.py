"""The one object that users meet: fit, fine-tune, save, load, then verbs."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl

from llmrec import persistence
from llmrec.answering import Asked, answer, ask, only, recommendations
from llmrec.assembly import encode, read_catalog, read_log
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.errors import RequestError
from llmrec.evaluation.run import Systems, run_systems
from llmrec.evaluation.split import Part, tail
from llmrec.events import EventLog, live_events
from llmrec.families import Texts
from llmrec.fetch import resolve
from llmrec.pipeline import Pipeline, Weights
from llmrec.protocols import Codes
from llmrec.recipe import Recipe
from llmrec.rules import allowed_items
from llmrec.seeds import seeds
from llmrec.selection import choose_recipe
from llmrec.state import State
from llmrec.store.sqlite import SQLiteStore
from llmrec.titles import TitleIndex
from llmrec.types import Event, Item, Recommendation, Request

if TYPE_CHECKING:
    from llmrec.training import Progress
    from llmrec.tuning import FinetuneReport

CHUNK = 64
"""Requests that go through the pipeline at once."""


class Recommender:
    """Recommendations from a log and a catalogue. Made by `fit` or `load`, not by the constructor.

    Thread-safe: a request runs on the state it started with while items are added or models refitted.
    """

    def __init__(self, config: Config, state: State, store: SQLiteStore, folder: Path | None = None) -> None:
        self.config = config
        self.folder = folder
        self._state = state
        self._store = store
        self._adapter: Path | None = None
        self._run: Path | None = None
        self._titles: TitleIndex | None = None
        self._changing = threading.RLock()

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
            `datasets.Dataset`, or lists of `Item` and `Event`.
        config
            A `Config`, a mapping, or the path of a TOML file.
        on_stage
            Told the name of each stage as it begins.

        Raises
        ------
        DataError, ConfigError, FetchError
            If data or configuration are invalid, or the encoder cannot be had.
        """
        config = Config.of(config)
        on_stage("reading items and events")
        catalog = read_catalog(items, config.data)
        log = read_log(events, catalog, config.data)
        texts = encode(catalog.lines(), config, on_stage)
        train, part = tail(log)
        repeats = config.retrieval.has_repeats(log.repeat_share())
        search = config.retrieval.for_repeats(repeats)
        held_out = part.sample(search.search_users, search.seed).held_out(catalog.active, not repeats)
        recipe, _ = choose_recipe(train, held_out, texts, search, lambda s: on_stage(f"choosing {s}"))
        on_stage("fitting on all events")
        store = SQLiteStore(":memory:")
        store.append(log.to_events(catalog))
        state = State(catalog, texts, recipe, {}, repeats, search.depth)
        return cls(config, state.refitted(log), store)

    def finetune(
        self,
        minutes: float | None = None,
        *,
        on_step: Callable[[Progress, float], None] | None = None,
        folder: str | Path | None = None,
    ) -> FinetuneReport:
        """Fine-tune the language model on the stored log with LoRA, and fit its weight in the blend.

        The last event of each user is held out: it decides which state is kept and the weight.

        Parameters
        ----------
        minutes
            Time to train; the configuration's `training.minutes` and `steps` if None.
        on_step
            Called after each step with the progress and the finished share.
        folder
            Where checkpoints go; an interrupted run on the same data and settings is continued from
            there. By default ``training/`` in the directory of a saved recommender, else a temporary one.

        Raises
        ------
        DataError, FetchError, ImportError
            If there is nothing to train on, or the language model or its packages cannot be had.
        """
        try:
            from llmrec.tuning import tune
        except ImportError as missing:
            raise ImportError('fine-tuning needs: pip install "llmrec[lm]"') from missing

        run = Path(folder) if folder else (self.folder / "training" if self.folder else None)
        lm, recipe, report = tune(self._state, self._log(), self.config, minutes, run, on_step)
        with self._changing:
            # Items may have been added meanwhile.
            self._state = replace(self._state, lm=lm.grown(self._state.texts), recipe=recipe)
            self._adapter, self._run = None, run
        return report

    def refit(self) -> None:
        """Fit the retrievers again on all stored events; settings, weights and language model stay."""
        with self._changing:
            self._state = self._state.refitted(self._log() if self._store.count() else None)

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

    def _log(self) -> EventLog:
        columns = self._store.columns()
        frame = pl.DataFrame(
            {
                "user_id": columns.users,
                "item_id": columns.items,
                "timestamp": columns.timestamps,
                "weight": columns.weights,
            },
            schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "weight": pl.Float64},
        )
        # The store keeps the order of events, ties included.
        data = self.config.data
        return EventLog.load(frame, self._state.catalog, clock=data.clock, ties="input", policy="drop")

    # ---- saving and loading ---------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write one directory, atomically: a reader or a kill finds the old state or the new one.

        From then on observed events go to the event store in that directory.
        """
        folder = Path(folder).resolve()
        with self._changing:
            state, store = self._state, self._store
            same = folder == self.folder
            folder.mkdir(parents=True, exist_ok=True)
            before = persistence.state_of(folder)
            name = persistence.write_state(folder, lambda target: state.write(target, self._adapter))
            events = Path(store.path).name if same else f"events-{uuid.uuid4().hex[:12]}.sqlite"
            moving = contextlib.nullcontext() if same else store.moving(folder / events)
            with moving:
                persistence.replace_manifest(
                    folder,
                    {
                        "llmrec": _version(),
                        "state": name,
                        "events": events,
                        "config": self.config.model_dump(),
                        "recipe": state.recipe.as_dict(),
                        "repeats": state.repeats,
                        "encoder": state.texts.encoder.fingerprint,
                        "catalog": state.catalog.fingerprint,
                        "log": state.log,
                        "language_model": (folder / name / "adapter").is_dir(),
                    },
                )
            if (folder / name / "adapter").is_dir():
                self._adapter = folder / name / "adapter"
            # A reader may have read the old manifest just now: what it names stays for one more save.
            persistence.remove_stale(folder, [name, events, *before])
            self.folder = folder
            if self._run is not None:
                persistence.clear_run(self._run)
                self._run = None

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load a saved recommender. The language model is loaded when a request first needs it.

        Raises
        ------
        ModelError
            If the directory is none, is damaged, of another format, or was saved with another encoder.
        """
        folder = Path(folder).resolve()
        manifest = persistence.read_manifest(folder)
        config = Config.of(manifest["config"])
        target = folder / manifest["state"]
        state = State.read(target, config, manifest)
        made = cls(config, state, SQLiteStore(folder / manifest["events"]), folder)
        made._adapter = target / "adapter" if manifest["language_model"] else None
        return made

    def configure(self, config: Config | Mapping[str, Any] | str | Path) -> None:
        """Take over the sections `lm` and `training` of a configuration for the next fine-tuning.

        The other sections describe what is fitted already and stay.
        """
        given = Config.of(config)
        sections: dict[str, Any] = {n: getattr(given, n) for n in given.model_fields_set & {"lm", "training"}}
        self.config = self.config.model_copy(update=sections)

    def _ready(self, *, lm: bool) -> State:
        """The present state, with the language model in it if it is wanted and there is one."""
        if not lm or self._state.lm is not None or self._adapter is None:
            return self._state
        try:
            from llmrec.language_model import load_language_model
        except ImportError as missing:
            raise ImportError('the language model needs: pip install "llmrec[lm]"') from missing

        with self._changing:
            if self._state.lm is None and self._adapter is not None:
                base = resolve(self.config.lm.base, allow_hub=self.config.allow_hub)
                loaded = load_language_model(self._adapter, base, self._state.texts, self._state.log)
                self._state = replace(self._state, lm=loaded)
        return self._state

    # ---- asking ---------------------------------------------------------------------------------

    def recommend(self, request: Request | None = None, **fields: Any) -> list[Recommendation]:
        """Return up to k recommendations for one request, given as a `Request` or by its fields.

        Raises
        ------
        RequestError
            If the request is invalid or names unknown items.
        """
        return self.recommend_many([_request(request, fields)])[0]

    def recommend_many(self, requests: Sequence[Request], *, lm: bool = True) -> list[list[Recommendation]]:
        """Answer many requests; those of a chunk go through each component as one batch.

        With ``lm=False`` the language model is neither loaded nor run: the answers are in retrieval order.
        """
        state = self._ready(lm=lm and self._state.recipe.uses_lm)
        pipeline = state.pipeline()
        if not lm:
            pipeline = _without_lm(pipeline)
        answers: list[list[Recommendation]] = []
        for start in range(0, len(requests), CHUNK):
            chunk = [self._ask(request, state) for request in requests[start : start + CHUNK]]
            answers += answer(chunk, state, pipeline)
        return answers

    def stages(self, request: Request | None = None, **fields: Any) -> dict[str, list[Recommendation]]:
        """Return what each stage alone would answer: ``retrieval``, ``language model``, ``default``.

        `default` is what `recommend` returns. Without a tuned model ``language model`` is not there.
        """
        found = dict(self.each_stage(_request(request, fields)))
        return {name: found[name] for name in ("retrieval", "language model", "default") if name in found}

    def each_stage(self, request: Request) -> Iterator[tuple[str, list[Recommendation]]]:
        """Yield the stages of `stages` one after another, `default` before ``language model``.

        A stage is answered when it is asked for, so that a caller can time it; what the language model keeps
        of a history would make the second of those two look faster than it is when it is served.
        """
        state = self._ready(lm=True)
        pipeline = state.pipeline()
        plain = _without_lm(pipeline)
        stages = {"retrieval": plain, "default": pipeline}
        if state.lm is not None:
            alone = replace(pipeline, history=Weights({}, lm=1.0), query=Weights({}, lm=1.0))
            if state.lm.scored is not None:
                # It orders what the merge gives it.
                most = 1000.0
                alone = replace(plain, history=plain.history.with_lm(most), query=plain.query.with_lm(most))
            stages["language model"] = alone
        asked = [self._ask(request, state)]
        for name, stage in stages.items():
            yield name, answer(asked, state, stage)[0]

    def lm_weight(self, request: Request | None = None, **fields: Any) -> float | None:
        """Return the language model's weight for a request: 0 where it is left out, None without a model."""
        state = self._ready(lm=True)
        if state.lm is None:
            return None
        asked = self._ask(_request(request, fields), state)
        return state.pipeline().weights_for(asked.query).lm

    def seeds(
        self,
        k: int = 8,
        chosen: Sequence[str] = (),
        passed: Sequence[str] = (),
        where: Mapping[str, Any] | None = None,
    ) -> list[Recommendation]:
        """Return up to k items to ask somebody about of whom little is known: popular, and unlike each other.

        Ask which of them they like, and call again with all that was chosen and all that was passed over:
        what comes next is near to the one and not near to the other. What was chosen is a history for
        `recommend`. Scores are what an item adds to the popularity that is covered: `llmrec.seeds.spread`.

        Raises
        ------
        RequestError
            If an id is unknown, or both chosen and passed.
        """
        state = self._state
        request = Request(history=chosen, k=k, where=where)
        mask = allowed_items(request, state.catalog)
        return seeds(request, passed, mask, state, _without_lm(state.pipeline()))

    def complete(self, text: str, k: int = 10) -> list[Item]:
        """Return up to k items whose titles have words that begin as those typed do; see `TitleIndex`.

        Raises
        ------
        RequestError
            If k is no whole number of at least 1.
        """
        k, state = Request(k=k).k, self._state
        if self._titles is None or self._titles.catalog is not state.catalog:
            shares = state.pipeline().prior
            assert shares is not None
            self._titles = TitleIndex(state.catalog, shares)
        return state.catalog.items(self._titles.find(text, k))

    def search(
        self, query: str, user: str | None = None, k: int = 10, where: Mapping[str, Any] | None = None
    ) -> list[Recommendation]:
        """Return up to k items for a typed query, personalised where the user has a history.

        Seen items may come back: who searches for something wants to find it.
        """
        if not query or not query.strip():
            raise RequestError("search needs words, got an empty query")
        return self.recommend(Request(user=user, query=query, k=k, where=where, seen="include"))

    def similar(
        self, item_id: str, k: int = 10, where: Mapping[str, Any] | None = None
    ) -> list[Recommendation]:
        """Return up to k items like one item: by text, and by what people chose around it.

        Raises
        ------
        RequestError
            If the item is unknown.
        """
        state = self._state
        state.catalog.code(item_id)
        request = Request(history=[item_id], k=k, where=where, exclude=[item_id])
        pipeline = replace(state.pipeline(), history=state.recipe.similar)
        return answer([self._ask(request, state)], state, pipeline)[0]

    def rank(
        self,
        items: Sequence[str],
        user: str | None = None,
        history: Sequence[str | Event] | None = None,
        query: str | None = None,
    ) -> list[Recommendation]:
        """Order the caller's own candidates, best first; every known one comes back, seen ones too.

        Items that no component knows how to score keep the caller's order, at the end.

        Raises
        ------
        RequestError
            If an id is unknown or given twice.
        """
        ids = list(items)
        state = self._ready(lm=self._state.recipe.uses_lm)
        codes = state.catalog.codes(ids)
        if len(set(ids)) < len(ids):
            raise RequestError("an item is given twice; ids to rank must differ")
        if not ids:
            return []
        asked = self._ask(Request(user=user, history=history, query=query, k=len(ids)), state)
        pipeline = replace(state.pipeline(), depth=len(ids))
        query_of_these = replace(asked.query, mask=only(codes, len(state.catalog)))
        return recommendations(pipeline.order(query_of_these, codes), state.catalog)

    def predict(
        self,
        items: Sequence[str],
        user: str | None = None,
        history: Sequence[str | Event] | None = None,
    ) -> dict[str, float]:
        """Return, for each item, the probability that the next event of a user is this item.

        Over the whole catalogue the probabilities sum to 1, so those of some items to at most 1. They are
        calibrated on held-out events when the recommender is fitted or fine-tuned.

        Raises
        ------
        RequestError
            If an id is unknown.
        """
        ids = list(items)
        state = self._ready(lm=self._state.recipe.uses_lm)
        codes = state.catalog.codes(ids)
        asked = self._ask(Request(user=user, history=history), state)
        p = state.pipeline().predict([asked.query])[0]
        return {item_id: float(p[code]) for item_id, code in zip(ids, codes, strict=True)}

    def _ask(self, request: Request, state: State) -> Asked:
        return ask(request, self._history(request, state), state)

    def _history(self, request: Request, state: State) -> Codes:
        if request.history is not None:
            ids = [e.item_id if isinstance(e, Event) else e for e in request.history]
            return state.catalog.codes(ids)
        if request.user is None:
            return np.empty(0, dtype=np.int32)
        codes = state.catalog.find([e.item_id for e in self._store.history(request.user)])
        return codes[codes >= 0]

    def history(self, user: str, limit: int | None = None) -> list[Event]:
        """Return the latest `limit` stored events of a user, oldest first; none for an unknown user."""
        return self._store.history(user, limit)

    def users(self, prefix: str = "", limit: int = 10) -> list[str]:
        """Return up to `limit` ids of users with stored events that begin with `prefix`, in their order."""
        return self._store.users(prefix, limit)

    # ---- what changes while serving ---------------------------------------------------------------

    def observe(self, user: str, item: str, timestamp: int | None = None, weight: float = 1.0) -> None:
        """Store a live event; it counts in the next request. `timestamp` is now unless given.

        Once this has returned, the event of a saved recommender survives a kill and a power loss.

        Raises
        ------
        RequestError
            If the item is unknown, the user blank, the time no whole seconds, or the weight not above 0.
        """
        self.observe_many([Event(user, item, timestamp, weight)])

    def observe_many(self, events: Iterable[Event]) -> None:
        """Store live events in the order given, in one transaction: all of them, or none if one is refused.

        Raises
        ------
        RequestError
            As `observe` does, for the first event that cannot be stored.
        """
        state = self._state
        self._store.append(live_events(events, state.catalog, self.config.data.clock, int(time.time())))

    def forget(self, user: str) -> int:
        """Erase a user's events and cached states; return how many events there were.

        Aggregates fitted earlier (item weights, the adapter) stay until `refit` and `finetune`.
        """
        count = self._store.forget(user)
        if self._state.lm is not None:
            self._state.lm.scorer.forget()
        return count

    def add_items(self, items: Sequence[Item]) -> None:
        """Add items, or replace those with the same id; recommendable at once by their text.

        Raises
        ------
        DataError
            If an item breaks the data contract.
        """
        with self._changing:
            # An adapter that is not loaded yet is grown when it is.
            self._state = self._state.with_catalog(self._state.catalog.with_items(items))

    def remove_items(self, item_ids: Sequence[str]) -> None:
        """Remove items: never returned again, unless added again. Events that name them stay.

        Raises
        ------
        RequestError
            If an id is unknown.
        """
        with self._changing:
            self._state = replace(self._state, catalog=self._state.catalog.without_items(item_ids))

    def close(self) -> None:
        """Release the event store."""
        self._store.close()


def _request(request: Request | None, fields: Mapping[str, Any]) -> Request:
    if request is None:
        try:
            return Request(**fields)
        except TypeError as wrong:
            known = ", ".join(Request.__dataclass_fields__)
            raise RequestError(f"{wrong}; a request has the fields {known}") from None
    if fields:
        raise RequestError(f"give a Request or its fields, not both: {', '.join(fields)}")
    return request


def _without_lm(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, history=pipeline.history.with_lm(0.0), query=pipeline.query.with_lm(0.0))


def _version() -> str:
    from llmrec import __version__

    return __version__
