"""One method for each verb, over a `Recommender`, without any transport: what HTTP and MCP have in common.

    recommend, search -> gathered into batches -> Recommender.recommend_many
    everything else   -> a bounded pool of threads

There are two lanes of batches, with the language model and without it. The second one answers what the model
has no weight in, and requests with a budget that the model would overrun: those are degraded.
"""

from __future__ import annotations

import base64
import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from llmrec.answering import units_of
from llmrec.errors import FetchError, NotFoundError, RequestError
from llmrec.protocols import Floats
from llmrec.recommender import Recommender
from llmrec.serve.batching import Batcher, Pool
from llmrec.serve.config import ServeConfig
from llmrec.serve.models import (
    Document,
    DocumentOut,
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EventIn,
    EventsResponse,
    ItemIn,
    ItemOut,
    ItemsResponse,
    PredictRequest,
    PredictResponse,
    RankRequest,
    Recommended,
    RecommendRequest,
    RerankRequest,
    RerankResponse,
    RerankResult,
    SearchRequest,
    SimilarRequest,
    TextScore,
    TextsRequest,
    check,
    item_of,
    plain,
)
from llmrec.serve.relevance import DOCUMENT_LIMIT, by_relevance
from llmrec.serve.summary import summarise
from llmrec.text import neutralise
from llmrec.types import Event, Request

logger = logging.getLogger(__name__)

A = TypeVar("A")
_Asked = tuple[Request, bool]
"""A request, and whether the language model is left out to keep its budget."""


def request_of(body: RecommendRequest | SearchRequest) -> Request:
    """What a recommender is asked; budgets and phrasing are the service's."""
    request = Request(**body.model_dump(exclude={"budget_ms", "phrase"}))
    # Who searches for something wants to find it.
    return replace(request, seen="include") if isinstance(body, SearchRequest) else request


PHRASED = 20
"""Most items of an answer whose reasons are phrased."""


class Service:
    """Answers requests from many threads. Made for one recommender, which it does not close.

    Parameters
    ----------
    recommender
        Fitted or loaded.
    config
        Limits, sizes of batches and queues; defaults if None.
    on_batch
        Told of every batch: how many requests it held, and how many of them were degraded.
    """

    def __init__(
        self,
        recommender: Recommender,
        config: ServeConfig | None = None,
        on_batch: Callable[[int, int], None] = lambda size, degraded: None,
    ) -> None:
        self.recommender = recommender
        self.config = config or ServeConfig()
        self.on_batch = on_batch
        self.changed = False  # whether items were put or removed here
        self.lm_is_missing = False  # whether it is left out and cannot be loaded either
        c = self.config
        lane = partial(Batcher[_Asked, ItemsResponse], batch=c.batch, wait=c.wait_ms / 1e3, limit=c.queue)
        self.with_lm = lane(partial(self._answer, lm=True))
        self.without_lm = lane(partial(self._answer, lm=False))
        self.pool = Pool(c.threads, c.queue)
        # Takes seconds, so that it may not hold up what takes milliseconds.
        self.phrasing = Pool(1, c.queue)
        self._closing = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="llmrec-follower", daemon=True)
        self._follower.start()

    def close(self) -> None:
        """Answer what is under way and end the threads."""
        self._closing.set()
        self._follower.join()
        for part in (self.with_lm, self.without_lm, self.pool, self.phrasing):
            part.close()

    def _follow(self) -> None:
        """Take over the items that other processes change, so that no request has to wait for it."""
        well = True
        while not self._closing.wait(self.config.follow_seconds):
            try:
                self.recommender.follow()
            except Exception as error:  # the next look may go well
                if well:
                    logger.warning("items that other processes changed are not seen: %s", error)
                well = False
            else:
                well = True

    def warm_up(self) -> None:
        """Load the language model and measure a request, so that the first budget is kept."""
        asked = self.recommender.warm_up()
        self.recommend(RecommendRequest(history=list(asked), k=1))

    # ---- in batches -------------------------------------------------------------------------------

    def begin(self, body: RecommendRequest | SearchRequest) -> Future[ItemsResponse]:
        """Queue a request and return the answer to come.

        Raises
        ------
        RequestError
            If the request is invalid or beyond a limit; what only the catalogue can tell is raised by
            the future.
        OverloadError
            If too many requests wait.
        """
        check(body, self.config)
        request = request_of(body)
        if not self.recommender.asks_lm(request):
            return self.without_lm.submit((request, False), units_of(request))
        if body.budget_ms is not None and self._seconds_with_lm(request) > body.budget_ms / 1e3:
            return self.without_lm.submit((request, True), units_of(request))
        return self.with_lm.submit((request, False), units_of(request))

    def _seconds_with_lm(self, request: Request) -> float:
        """How long the language model would take for one more, after all who wait for it."""
        return self.with_lm.load.expected(units_of(request)) + self.config.wait_ms / 1e3

    def _answer(self, asked: Sequence[_Asked], *, lm: bool) -> list[ItemsResponse]:
        found = self.recommender.recommend_many([request for request, _ in asked], lm=lm)
        # By the budget, or since the language model's server gave no scores.
        late = [out or any(r.degraded for r in items) for items, (_, out) in zip(found, asked, strict=True)]
        self.on_batch(len(asked), sum(late))
        return [
            ItemsResponse.model_construct(items=[Recommended.of(r) for r in items], degraded=out)
            for items, out in zip(found, late, strict=True)
        ]

    def recommend(self, body: RecommendRequest) -> ItemsResponse:
        """Recommend items to a user, for a history, for words, or for nobody in particular."""
        return self.begin(body).result()

    def search(self, body: SearchRequest) -> ItemsResponse:
        """Find items by words, in the order that suits who asks; seen items may come back."""
        return self.begin(body).result()

    # ---- one by one -------------------------------------------------------------------------------

    def phrased(self, body: RecommendRequest) -> ItemsResponse:
        """Recommend with reasons in the language model's own words; see `Recommender.phrase`."""
        check(body, self.config)
        if body.budget_ms is not None or body.k > PHRASED:
            raise RequestError(f"phrase takes seconds: it goes with k of at most {PHRASED} and no budget_ms")
        request = replace(request_of(body), explain=True)
        try:
            found = self.recommender.phrase(self.recommender.recommend(request))
        except (ImportError, FetchError) as missing:
            raise RequestError("this server has no language model to phrase reasons with") from missing
        return ItemsResponse(items=[Recommended.of(r) for r in found])

    def submit(self, verb: Callable[..., A], *arguments: Any) -> Future[A]:
        """Run a verb in the pool and return its result to come; OverloadError if too many wait."""
        return self.pool.submit(verb, *arguments)

    def similar(self, body: SimilarRequest) -> ItemsResponse:
        """Return items like one item."""
        check(body, self.config)
        found = self.recommender.similar(body.item_id, body.k, body.where)
        return ItemsResponse(items=[Recommended.of(r) for r in found])

    def rank(self, body: RankRequest) -> ItemsResponse:
        """Order given items, best first; all of them come back."""
        check(body, self.config)
        items = [one if isinstance(one, str) else one.given() for one in body.items]
        found = self.recommender.rank(items, body.user, body.history, body.query, body.adapter)
        return ItemsResponse(items=[Recommended.of(r) for r in found])

    def predict(self, body: PredictRequest) -> PredictResponse:
        """Return how probable each item is to be the next."""
        check(body, self.config)
        found = self.recommender.predict(body.items, body.user, body.history, body.adapter)
        return PredictResponse(probabilities=found)

    def rerank(self, body: RerankRequest) -> RerankResponse:
        """Order documents by relevance to the query and to who asks.

        See `by_relevance`.
        """
        check(body, self.config)
        documents = [Document(text=d) if isinstance(d, str) else d for d in body.documents]
        for row, document in enumerate(documents):
            if document.text is None and document.id is None:
                raise RequestError(f"document {row} has neither text nor id; give text, {{text}} or {{id}}")
        order = by_relevance(self.recommender, documents, body.query, body.user, body.history)
        results = [
            RerankResult(
                index=row,
                relevance_score=score,
                document=self._shown(documents[row]) if body.return_documents else None,
            )
            for row, score in order[: body.top_n]
        ]
        words = len(body.query.split()) + sum(len((d.text or "").split()) for d in documents)
        return RerankResponse(
            id=uuid.uuid4().hex,
            model=body.model,
            results=results,
            meta={"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
            usage={"total_tokens": words},
        )

    def rerank_texts(self, body: TextsRequest) -> list[TextScore]:
        """Order texts by relevance to the query and to who asks."""
        check(body, self.config)
        documents = [Document(text=text) for text in body.texts]
        order = by_relevance(self.recommender, documents, body.query, body.user, body.history)
        return [
            TextScore(index=row, score=score, text=body.texts[row] if body.return_text else None)
            for row, score in order
        ]

    def _shown(self, document: Document) -> DocumentOut:
        if document.text is not None or document.id is None:
            return DocumentOut(text=document.text or "", id=document.id)
        catalog = self.recommender.catalog
        return DocumentOut(text=catalog.titles[catalog.code(document.id)], id=document.id)

    def embed(self, body: EmbeddingsRequest) -> EmbeddingsResponse:
        """Turn texts into unit vectors with the encoder of the catalogue."""
        check(body, self.config)
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not texts:
            raise RequestError("nothing to embed: input is an empty list")
        encoder = self.recommender.texts.encoder
        if body.dimensions not in (None, encoder.dim):
            raise RequestError(f"this encoder's vectors have {encoder.dim} numbers, got {body.dimensions}")
        vectors = encoder.encode([neutralise(text, DOCUMENT_LIMIT) for text in texts])
        shown = vectors.tolist() if body.encoding_format == "float" else [_base64(v) for v in vectors]
        words = sum(len(text.split()) for text in texts)
        return EmbeddingsResponse(
            data=[Embedding(index=row, embedding=vector) for row, vector in enumerate(shown)],
            model=body.model,
            usage={"prompt_tokens": words, "total_tokens": words},
        )

    # ---- what changes -----------------------------------------------------------------------------

    def store(self, events: Sequence[EventIn], key: str | None = None) -> EventsResponse:
        """Store events; they count in the next request. If an item is unknown, none is stored.

        Parameters
        ----------
        key
            Of the request: events without an id get one from it, so that it may be sent again.
        """
        if len(events) > self.config.max_events:
            raise RequestError(f"{self.config.max_events:,} events at most at once, got {len(events):,}")
        ids = [e.event_id or (f"{key}/{row}" if key else None) for row, e in enumerate(events)]
        new = self.recommender.observe_many(
            Event(e.user_id, e.item_id, e.timestamp, e.weight, event_id, e.event)
            for e, event_id in zip(events, ids, strict=True)
        )
        return EventsResponse(events=len(events), repeated=len(events) - new or None)

    def put_item(self, item_id: str, body: ItemIn) -> tuple[ItemOut, bool]:
        """Add an item or replace the one with this id; return it as kept, and whether it is new."""
        new = not self._is_known(item_id)
        self.recommender.add_items([item_of(item_id, body)])
        self.changed = True
        return self.item(item_id), new

    def remove_item(self, item_id: str) -> None:
        """Never return an item again; NotFoundError if it is unknown."""
        self._known(item_id)
        self.recommender.remove_items([item_id])
        self.changed = True

    def forget(self, user_id: str) -> EventsResponse:
        """Erase a user's events; return how many there were."""
        return EventsResponse(events=self.recommender.forget(user_id))

    # ---- the catalogue ----------------------------------------------------------------------------

    def item(self, item_id: str) -> ItemOut:
        """Return an item of the catalogue; NotFoundError if it is unknown."""
        self._known(item_id)
        catalog = self.recommender.catalog
        code = catalog.code(item_id)
        item = catalog.item(code)
        return ItemOut(
            item_id=item.item_id,
            title=item.title,
            text=item.text,
            attributes=plain(dict(item.attributes)),
            active=bool(catalog.active[code]),
        )

    def attributes(self) -> dict[str, dict[str, Any]]:
        """Return what conditions can name, see `llmrec.serve.summary.summarise`."""
        return summarise(self.recommender.catalog)

    def _is_known(self, item_id: str) -> bool:
        """Whether an item is in the catalogue, that of another process just now included."""
        if item_id not in self.recommender.catalog:
            self.recommender.follow()
        return item_id in self.recommender.catalog

    def _known(self, item_id: str) -> None:
        if not self._is_known(item_id):
            try:
                self.recommender.catalog.code(item_id)
            except RequestError as unknown:
                raise NotFoundError(str(unknown)) from None


def _base64(vector: Floats) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
