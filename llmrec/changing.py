"""The verbs of a recommender that change what it knows while it serves: events, items, adapters."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrec.asking import Asking
from llmrec.assembly import read_log
from llmrec.errors import ModelError, RequestError, StoreError
from llmrec.events import live_events
from llmrec.persistence import manifest_of, remove_stray_events
from llmrec.protocols import ItemChange
from llmrec.rows import LoadReport
from llmrec.saved import Saved, adapter_in, load_tuned, model_of
from llmrec.state import Named, State
from llmrec.types import Event, Item, as_id, as_ids


def _taken(known: Counter[tuple[str, str, int | None]], event: Event) -> bool:
    """Whether an event is among those that are known, which then are one less."""
    key = (event.user_id, event.item_id, event.timestamp)
    there = known[key] > 0
    known[key] -= there
    return there


class Changing(Asking):
    """What may be done to a `Recommender` that serves.

    Each change puts a new state in the place of the old one, which requests under way still have.
    """

    _saved: Saved | None
    _applied: int

    def _ready(self, *, lm: bool, adapter: str | None = None) -> State:
        if lm and adapter is None and self._state.lm is None and self._adapter is not None:
            self._find_adapter()
        return super()._ready(lm=lm, adapter=adapter)

    def _find_adapter(self) -> None:
        """Look where the adapter is now, if others have saved the same model with other items since."""
        with self._changing:
            if self._adapter is None or self._adapter.is_dir() or self._saved is None:
                return
            manifest = manifest_of(self._saved.folder)
            if model_of(manifest) == self._saved.model and manifest["language_model"]:
                # It may know items that were put since.
                self.follow()
                self._adapter = self._saved.folder / manifest["state"] / "adapter"

    def observe(
        self,
        user: str,
        item: str,
        timestamp: int | None = None,
        weight: float = 1.0,
        event_id: str | None = None,
        event: str | None = None,
    ) -> bool:
        """Store a live event; it counts in the next request. `timestamp` is now unless given.

        Once this has returned, the event of a saved recommender survives a kill and a power loss. With an
        `event_id` it is safe to send it again when no answer came: returns whether it was new. `event` is its
        type, which counts as `data.event_weights` has it: one of weight 0 is not stored.

        Raises
        ------
        RequestError
            If the item is unknown, the user blank, the time no seconds, the weight out of range, or the type
            without a weight.
        DataError
            If the user has another event with this id.
        """
        return self.observe_many([Event(user, item, timestamp, weight, event_id, event)]) == 1

    def observe_many(self, events: Iterable[Event]) -> int:
        """Store live events in the order given, in one transaction: all of them, or none if one is refused.

        Returns how many were new: an event is stored once, however often it comes with the same `event_id`.

        Raises
        ------
        RequestError, DataError
            As `observe` does, for the first event that cannot be stored.
        StoreError
            If the event store cannot be used, or the saved recommender was replaced by another.
        """
        given, now = list(events), int(time.time())
        clock, weights = self.config.data.clock, self.config.data.event_weights
        catalog = self._state.catalog
        try:
            checked = live_events(given, catalog, clock, now, weights)
        except RequestError:
            # Another process may have put the item just now, and another thread may be taking it over.
            self.follow()
            if self._state.catalog is catalog:
                raise
            checked = live_events(given, self._state.catalog, clock, now, weights)
        with self._slot.use() as store:
            if self._saved is not None:
                self._saved.check_events()
            new = store.append(checked)
            if self._saved is not None:
                # What was stored while the directory was replaced is read by nobody.
                self._saved.check_events()
            return new

    def observe_table(self, source: Any) -> tuple[LoadReport, int]:
        """Store the events of a file or table, read as `fit` reads one, that are not stored yet.

        An event is stored already if the user has one of that item at that second, so that tables may
        overlap; without a clock nothing tells, and all are stored. What others store meanwhile is not seen:
        one process at a time takes tables in.

        Returns
        -------
        tuple
            What was read, and how many events were new.

        Raises
        ------
        DataError
            If the table breaks the data contract, as in `fit`.
        StoreError
            As `observe_many` does.
        """
        self.follow()
        catalog = self._state.catalog
        log = read_log(source, catalog, self.config.data)
        events = log.to_events(catalog)
        if log.timestamp is not None:
            with self._slot.use() as store:
                stored = store.columns()
            users = set(log.users)
            rows = zip(stored.users, stored.items, stored.timestamps, strict=True)
            known = Counter(row for row in rows if row[0] in users)
            events = [event for event in events if not _taken(known, event)]
        return log.report, self.observe_many(events)

    def forget(self, user: str | Sequence[str]) -> int:
        """Erase the events of a user, or of several, and the states that this process keeps.

        Returns how many events there were. The store is written anew without them, once for all of them.

        Other processes that serve the same directory keep states, which hold no ids, until they are full or
        end. Aggregates fitted earlier (item weights, the adapter) stay until `refit` and `finetune`.

        Raises
        ------
        StoreError
            If the event store cannot be used, or could not erase all; the message says what is left.
        """
        alone = isinstance(user, str) or not hasattr(user, "__len__")
        users = [as_id(user, "user")] if alone else as_ids(user, "user", ordered=False)
        try:
            with self._slot.use() as store:
                if self._saved is not None:
                    self._saved.check_events()
                count = store.forget(*users)
            if self._saved is not None:
                try:
                    # Copies that a killed save or move left.
                    remove_stray_events(self._saved.folder)
                except (OSError, ModelError) as failed:
                    raise StoreError(
                        f"{count} events are erased, but copies that a killed save left in "
                        f"{self._saved.folder} could not be removed: {failed}"
                    ) from failed
            return count
        finally:
            with self._changing:
                # Requests under way have read the history: what they keep goes with the old state.
                old = self._state
                self._state = old.fresh()
            for model in (old.lm, *(named.model for named in old.adapters.values())):
                if model is not None:
                    model.scorer.forget()

    def add_items(self, items: Sequence[Item]) -> None:
        """Add items, or replace those with the same id; recommendable at once by their text.

        Those of a saved recommender are in its event store once this has returned: a kill does not lose
        them, and other processes that serve it take them over.

        Raises
        ------
        RequestError
            If it is no list of items: tables are for `Recommender.fit`.
        DataError
            If an item breaks the data contract.
        StoreError
            If the event store cannot be used.
        """
        if isinstance(items, Item):
            raise RequestError(f"add_items takes a list of items, got one: {items!r:.100}")
        given = list(items)
        wrong = next((one for one in given if not isinstance(one, Item | Mapping)), None)
        if wrong is not None:
            raise RequestError(f"add_items takes a list of items (llmrec.Item), got {wrong!r:.100}")
        self._change(given, [])

    def remove_items(self, item_ids: Sequence[str]) -> None:
        """Remove items: never returned again, unless added again. Events that name them stay.

        Raises
        ------
        RequestError
            If an id is unknown.
        StoreError
            If the event store cannot be used.
        """
        self._change([], as_ids(item_ids, "item_ids", ordered=False))

    def _change(self, items: Sequence[Item], removed: Sequence[str]) -> None:
        with self._changing:
            catalog = self._state.catalog

            def decide(missed: list[ItemChange]) -> list[ItemChange]:
                nonlocal catalog
                catalog = self._state.catalog.after(missed).with_items(items)
                if removed:
                    catalog = catalog.without_items(removed)
                return catalog.changes(items, removed)

            with self._slot.use() as store:
                if self._saved is not None:
                    self._saved.check_events()
                applied, _ = store.change_items(self._applied, decide)
                if self._saved is not None:
                    self._saved.check_events()
            # An adapter that is not loaded yet is grown when it is.
            self._state = self._state.with_catalog(catalog)
            self._applied = applied

    def add_adapter(self, name: str, folder: str | Path, weight: float | None = None) -> None:
        """Put another tuned language model beside the own one, for requests that name it (`Request.adapter`).

        All of them stand on the same weights of the base model, in memory once, so that one process serves
        many tenants or both sides of a test; the recommender's own model is merged into weights of its own
        and answers sooner. An adapter of the same name is replaced. It is not saved with the recommender.

        Parameters
        ----------
        folder
            A recommender saved by `save`, of which the language model is taken, or the folder of an adapter.
        weight
            Of the language model in the blend; None for that of the recipe, which is 0 where the own model
            is left out.

        Raises
        ------
        ModelError
            If there is no adapter, or it was trained with another base, prompt, renderer or encoder, or on
            other items.
        FetchError, ImportError
            If the base model or its packages cannot be had.
        RequestError
            If the name is blank, or the weight below 0.
        """
        if not isinstance(name, str) or not name.strip():
            raise RequestError(f"an adapter needs a name, got {name!r:.100}")
        if weight is not None and not 0 <= weight < float("inf"):
            raise RequestError(
                f"the weight of an adapter must be a number of at least 0, got {weight!r:.100}"
            )
        texts, ids = self._state.texts, self._state.catalog.ids
        model = load_tuned(self.config, adapter_in(Path(folder)), texts, ids, None, name, shares=True)
        with self._changing:
            # Items may have been added meanwhile.
            named = Named(model.grown(self._state.texts), weight)
            self._state = replace(self._state, adapters={**self._state.adapters, name: named})

    def remove_adapter(self, name: str) -> None:
        """Take away what `add_adapter` put there; requests that are under way still have it.

        Raises
        ------
        RequestError
            If there is none of this name.
        """
        with self._changing:
            self._state.for_adapter(name)
            kept = {other: named for other, named in self._state.adapters.items() if other != name}
            self._state = replace(self._state, adapters=kept)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that a request can give as its `adapter`."""
        return tuple(self._state.adapters)

    def follow(self) -> int:
        """Take over items that other processes have put or removed since; return how many.

        Loading, saving and changing items do it by themselves, and a server does it every second. Events
        need no such call: every request reads them from the store.

        Raises
        ------
        StoreError
            If the event store cannot be used.
        """
        with self._changing:
            with self._slot.use() as store:
                applied, changes = store.item_changes(self._applied)
            if changes:
                self._state = self._state.with_catalog(self._state.catalog.after(changes))
                self._applied = applied
            return len(changes)
