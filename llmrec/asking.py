"""The verbs of a recommender that ask: one state, many kinds of requests, nothing changed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmrec.answering import Asked, answer, ask, only, recommendations, units_of
from llmrec.candidates import Weights
from llmrec.config import Config
from llmrec.errors import EngineError, RequestError
from llmrec.events import in_seconds
from llmrec.fetch import resolve
from llmrec.pipeline import Pipeline
from llmrec.protocols import Codes, Retriever
from llmrec.rules import allowed_items
from llmrec.saved import load_tuned
from llmrec.seeds import seeds
from llmrec.state import State
from llmrec.store.places import Slot
from llmrec.text import query_text
from llmrec.timing import Timing
from llmrec.titles import TitleIndex
from llmrec.types import Event, Item, Recommendation, Request, as_id, as_ids, at_most

if TYPE_CHECKING:
    from llmrec.explain.wording import Writer

logger = logging.getLogger(__name__)

E = TypeVar("E", str, Event, str | Event)

CHUNK = 64
"""Requests that go through the pipeline at once."""

LONGEST = 10_000
"""Latest stored events of a user that a request reads: what came before neither counts nor stays out."""


class Asking:
    """What `Recommender` answers; it makes, keeps and changes what these verbs read.

    A request runs on the state it started with.
    """

    config: Config
    _state: State
    _slot: Slot
    _adapter: Path | None
    _writer: Writer | None
    _phrasing: threading.Lock
    _titles: tuple[Retriever, TitleIndex] | None
    _timing: Timing
    _changing: threading.RLock

    def asks_lm(self, request: Request) -> bool:
        """Whether leaving the language model out could change the answer to a request."""
        return self._state.for_adapter(request.adapter).recipe.asks_lm(request)

    def _ready(self, *, lm: bool, adapter: str | None = None) -> State:
        """The present state, with the language model in it if it is wanted and there is one.

        With the name of an adapter that one is the language model.
        """
        if adapter is not None:
            return self._state.for_adapter(adapter)
        if not lm or self._state.lm is not None or self._adapter is None:
            return self._state
        with self._changing:
            if self._state.lm is None and self._adapter is not None:
                state, served = self._state, self.config.engine.model
                loaded = load_tuned(
                    self.config, self._adapter, state.texts, state.catalog.ids, state.log, served
                )
                self._state = replace(self._state, lm=loaded)
        return self._state

    def recommend(self, request: Request | None = None, **fields: Any) -> list[Recommendation]:
        """Return up to k recommendations for one request, given as a `Request` or by its fields.

        Raises
        ------
        RequestError
            If the request is invalid, or none of the items of its history is in the catalogue.
        """
        return self.recommend_many([_request(request, fields)])[0]

    def recommend_many(self, requests: Sequence[Request], *, lm: bool = True) -> list[list[Recommendation]]:
        """Answer many requests; those of a chunk go through each component as one batch.

        With ``lm=False`` the language model is neither loaded nor run: the answers are in retrieval order,
        as are those to requests whose budget it would overrun, or whose inference server gives no scores;
        these are marked `degraded`.
        """
        for one in requests:
            if not isinstance(one, Request):
                raise RequestError(f"expected a list of requests, and one of them is {one!r:.100}")
        late = self._late(requests) if lm else [False] * len(requests)
        begun = time.monotonic()
        try:
            answers = self._answers([r for r, out in zip(requests, late, strict=True) if not out], lm)
        except EngineError as gone:
            logger.warning("answering without the language model: %s", gone)
            # So that who has a budget does not wait for it again.
            self._timing.note(sum(map(units_of, requests)), time.monotonic() - begun)
            late = [self.asks_lm(request) for request in requests]
            answers = self._answers([r for r, out in zip(requests, late, strict=True) if not out], False)
        kept = iter(answers)
        plain = iter(self._answers([r for r, out in zip(requests, late, strict=True) if out], False))
        return [[replace(item, degraded=True) for item in next(plain)] if out else next(kept) for out in late]

    def _late(self, requests: Sequence[Request]) -> list[bool]:
        """Whether the language model would overrun each budget, all requests being answered together."""
        asking = [self.asks_lm(request) for request in requests]
        if not any(r.budget_ms is not None and asks for r, asks in zip(requests, asking, strict=True)):
            return [False] * len(requests)
        expected = self._timing.estimate(sum(map(units_of, requests)), idle=True)
        return [
            asks and r.budget_ms is not None and (expected is None or expected > r.budget_ms / 1e3)
            for r, asks in zip(requests, asking, strict=True)
        ]

    def warm_up(self) -> tuple[str, ...]:
        """Load the language model and measure it, so that the first `budget_ms` is kept.

        What searches words and titles is built too. Returns the item ids of the history that was asked about.
        """
        self.recommend_many([Request(query="a title", k=1)], lm=False)
        self.complete("", k=1)
        catalog, weights = self._state.catalog, self._state.recipe.history
        # The shortest history that it reads.
        least = min((n for n, own in ((1, weights), *weights.longer) if own.lm > 0), default=1)
        history = tuple(catalog.ids[code] for code in np.flatnonzero(catalog.active)[: max(least, 1)])
        for _ in range(2):  # the first forward of a model takes longer than all others
            self._timing = Timing()
            self.recommend_many([Request(history=history, k=1)])
        return history

    def _answers(self, requests: Sequence[Request], lm: bool) -> list[list[Recommendation]]:
        if not requests:
            return []
        adapter = requests[0].adapter
        if any(request.adapter != adapter for request in requests):
            answered = {
                name: iter(self._answers([r for r in requests if r.adapter == name], lm))
                for name in {request.adapter for request in requests}
            }
            return [next(answered[request.adapter]) for request in requests]
        state = self._ready(lm=lm and self._state.recipe.uses_lm, adapter=adapter)
        pipeline = state.pipeline()
        if not lm:
            pipeline = _without_lm(pipeline)
        answers: list[list[Recommendation]] = []
        for start in range(0, len(requests), CHUNK):
            begun, chunk = time.monotonic(), requests[start : start + CHUNK]
            asked = [self._ask(request, state) for request in chunk]
            answers += answer(asked, state, pipeline)
            if lm and any(pipeline.weights_for(one.query).lm > 0 for one in asked):
                self._timing.note(sum(map(units_of, chunk)), time.monotonic() - begun)
        return answers

    def stages(self, request: Request | None = None, **fields: Any) -> dict[str, list[Recommendation]]:
        """Return what each stage alone would answer: ``retrieval``, ``language model``, ``default``.

        `default` is what `recommend` returns. Without a tuned model ``language model`` is not there.
        """
        found = dict(self.each_stage(_request(request, fields)))
        return {name: found[name] for name in ("retrieval", "language model", "default") if name in found}

    def each_stage(self, request: Request, *, lm: bool = True) -> Iterator[tuple[str, list[Recommendation]]]:
        """Yield the stages of `stages` one after another, `default` before ``language model``.

        With ``lm=False`` the language model is not loaded.

        A stage is answered when it is asked for, so that a caller can time it; what the language model keeps
        of a history would make the second of those two look faster than it is when it is served.
        """
        state = self._ready(lm=lm, adapter=request.adapter)
        pipeline = state.pipeline()
        plain = _without_lm(pipeline)
        stages = {"retrieval": plain, "default": pipeline}
        if state.lm is not None:
            # It orders what words find; by history what the merge gives, unless it proposes items itself.
            most = 1000.0
            alone = replace(pipeline, history=Weights({}, lm=1.0), query=plain.query.with_lm(most))
            if state.lm.scored is not None:
                alone = replace(plain, history=plain.history.with_lm(most), query=alone.query)
            stages["language model"] = alone
        asked = [self._ask(request, state)]
        for name, stage in stages.items():
            yield name, answer(asked, state, stage)[0]

    def lm_weight(self, request: Request | None = None, **fields: Any) -> float | None:
        """Return the language model's weight for a request: 0 where it is left out, None without a model."""
        request = _request(request, fields)
        state = self._ready(lm=True, adapter=request.adapter)
        if state.lm is None:
            return None
        asked = self._ask(request, state)
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
            If all ids are unknown, or one is both chosen and passed.
        """
        state = self._state
        request = Request(history=chosen, k=k, where=where)
        mask = allowed_items(request, state.catalog)
        return seeds(request, as_ids(passed, "passed"), mask, state, _without_lm(state.pipeline()))

    def complete(self, text: str, k: int = 10) -> list[Item]:
        """Return up to k items whose titles have words that begin as those typed do; see `TitleIndex`.

        Raises
        ------
        RequestError
            If k is no whole number of at least 1.
        """
        if not isinstance(text, str):
            raise RequestError(f"what was typed must be text, got {text!r:.100}")
        k, state = Request(k=k).k, self._state
        popularity, known = state.retrievers["popularity"], self._titles
        if known is None or known[0] is not popularity or known[1].catalog is not state.catalog:
            shares = state.pipeline().prior
            assert shares is not None
            self._titles = known = (popularity, TitleIndex(state.catalog, shares))
        return state.catalog.items(known[1].find(text, min(k, len(state.catalog))))

    def phrase(self, found: Sequence[Recommendation]) -> list[Recommendation]:
        """Put the reasons of recommendations into the language model's own words, where they stay true.

        The base model of the configuration writes a sentence for each; one that names anything but the
        evidence, or nothing of it, is thrown away, and the template's sentence stays (`Reason.worded`
        tells). Takes some seconds for ten items on two cores.

        Raises
        ------
        RequestError
            If a recommendation has no reason: ask with ``explain=True``.
        FetchError, ImportError
            If the model or its packages cannot be had.
        """
        if any(one.reason is None for one in found):
            raise RequestError("there are no reasons to phrase; ask with explain=True")
        try:
            from llmrec.explain.wording import Writer, worded
        except ImportError as missing:
            raise ImportError('phrasing needs: pip install "llmrec[lm]"') from missing
        with self._phrasing:
            if self._writer is None:
                self._writer = Writer(resolve(self.config.lm.base, allow_hub=self.config.allow_hub))
            return worded(found, self._writer)

    def search(
        self, query: str, user: str | None = None, k: int = 10, where: Mapping[str, Any] | None = None
    ) -> list[Recommendation]:
        """Return up to k items for a typed query, personalised where the user has a history.

        Seen items may come back: who searches for something wants to find it.
        """
        if not isinstance(query, str) or not query_text(query):
            raise RequestError(f"search needs words, got {query!r:.100}")
        return self.recommend(Request(user=user, query=query, k=k, where=where, seen="include"))

    def similar(
        self, item_id: str, k: int = 10, where: Mapping[str, Any] | None = None
    ) -> list[Recommendation]:
        """Return up to k items like one item: by text, and by what people chose around it; none if none is.

        Raises
        ------
        RequestError
            If the item is unknown.
        """
        state, item_id = self._state, as_id(item_id, "item_id")
        state.catalog.code(item_id)
        request = Request(history=[item_id], k=k, where=where, exclude=[item_id])
        pipeline = replace(state.pipeline(), history=state.recipe.similar, popular=False)
        return answer([self._ask(request, state)], state, pipeline, fill=False)[0]

    def rank(
        self,
        items: Sequence[str | Item],
        user: str | None = None,
        history: Sequence[str | Event] | None = None,
        query: str | None = None,
        adapter: str | None = None,
    ) -> list[Recommendation]:
        """Order the caller's own candidates, best first; every one comes back, seen ones too.

        An `Item` need not be in the catalogue: for this call it is there, known by its text, and it stands in
        for the item of the same id. Language models that know no lines but the catalogue's (`likelihood`,
        `generate`) are left out then. Items that no component knows how to score keep the caller's order, at
        the end.

        Raises
        ------
        RequestError
            If an id or the adapter is unknown, or an id given twice.
        DataError
            If an `Item` breaks the data contract.
        """
        if isinstance(items, str | Item) or not hasattr(items, "__len__"):
            raise RequestError(f"rank takes a list of ids and items, got {items!r:.100}")
        given = list(items)
        ids = as_ids([one.item_id if isinstance(one, Item) else one for one in given], "items")
        unlisted = [replace(o, item_id=i) for o, i in zip(given, ids, strict=True) if isinstance(o, Item)]
        state = self._ready(lm=self._state.recipe.uses_lm, adapter=adapter)
        state = state.with_unlisted(unlisted)
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
        adapter: str | None = None,
    ) -> dict[str, float]:
        """Return, for each item, the probability that the next event of a user is this item.

        Over the whole catalogue the probabilities sum to 1, so those of some items to at most 1. They are
        calibrated on held-out events when the recommender is fitted or fine-tuned.

        Raises
        ------
        RequestError
            If an id or the adapter is unknown.
        """
        ids = as_ids(items, "items", ordered=False)
        state = self._ready(lm=self._state.recipe.uses_lm, adapter=adapter)
        codes = state.catalog.codes(ids)
        asked = self._ask(Request(user=user, history=history), state)
        p = state.pipeline().predict([asked.query])[0]
        return {item_id: float(p[code]) for item_id, code in zip(ids, codes, strict=True)}

    def _ask(self, request: Request, state: State) -> Asked:
        return ask(request, self._history(request, state), state)

    def _history(self, request: Request, state: State) -> Codes:
        if request.history is not None:
            past = _until(request.now, request.history)
            return state.catalog.known([e.item_id if isinstance(e, Event) else e for e in past])
        if request.user is None:
            return np.empty(0, dtype=np.int32)
        # What came before is nothing to go by; a replay needs all to find its moment.
        stored = _until(request.now, self.history(request.user, LONGEST if request.now is None else None))
        codes = state.catalog.find([e.item_id for e in stored])
        return codes[codes >= 0]

    def history(self, user: str, limit: int | None = None) -> list[Event]:
        """Return the latest `limit` stored events of a user, oldest first; none for an unknown user."""
        user, limit = as_id(user, "user"), at_most(limit)
        with self._slot.use() as store:
            return store.history(user, limit)

    def events(self) -> list[Event]:
        """Return all stored events, oldest first.

        Ratings and types have been counted into their weights: fit on them without `rating_threshold` and
        `event_weights`.
        """
        with self._slot.use() as store:
            return store.events()

    def users(self, prefix: str = "", limit: int | None = 10) -> list[str]:
        """Return the first `limit` ids of users with stored events that begin with `prefix`; None for all."""
        limit = at_most(limit)
        with self._slot.use() as store:
            return store.users(prefix, 2**31 - 1 if limit is None else limit)


def _until(now: int | None, past: Sequence[E]) -> Sequence[E]:
    """The events up to a moment; ids alone have no time and stay."""
    if now is None:
        return past
    stamps = [in_seconds(one.timestamp) if isinstance(one, Event) else now for one in past]
    if None in stamps:
        raise RequestError("now needs events with time stamps, and there are some without")
    return [one for one, stamp in zip(past, stamps, strict=True) if stamp is not None and stamp <= now]


def _request(request: Request | None, fields: Mapping[str, Any]) -> Request:
    if request is None:
        try:
            return Request(**fields)
        except TypeError as wrong:
            known = ", ".join(Request.__dataclass_fields__)
            raise RequestError(f"{wrong}; a request has the fields {known}") from None
    if not isinstance(request, Request):
        raise RequestError(f"expected a Request or fields such as user='42', got {request!r:.100}")
    if fields:
        raise RequestError(f"give a Request or its fields, not both: {', '.join(fields)}")
    return request


def _without_lm(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, history=pipeline.history.with_lm(0.0), query=pipeline.query.with_lm(0.0))
