"""How relevant documents are to words and to who asks: items of the catalogue, or words of any origin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmrec.errors import RequestError
from llmrec.protocols import Floats
from llmrec.recommender import Recommender
from llmrec.serve.models import Document
from llmrec.text import neutralise, query_text
from llmrec.types import Request

DOCUMENT_LIMIT = 5_000
"""Longest document to rerank in characters; the rest is not read."""


def by_relevance(
    recommender: Recommender,
    documents: Sequence[Document],
    query: str = "",
    user: str | None = None,
    history: Sequence[str] | None = None,
) -> list[tuple[int, float]]:
    """Order documents by how relevant they are to a query and to a user or a history.

    Ids of the catalogue alone are ordered by the recommender, as `rank` does; as soon as there are words
    among them, all are compared by `score_documents`, and equal ones keep their order.

    Returns
    -------
    list
        Position and relevance in [0, 1] of each document, the most relevant first.

    Raises
    ------
    RequestError
        If there is nothing to be relevant to, an id is unknown (of a history, all), or both a user and a
        history are given.
    """
    if not query_text(query) and user is None and history is None:
        raise RequestError("relevant to what? give a query, a user or a history")
    ids = [d.id for d in documents if d.text is None and d.id is not None]
    Request(user=user, history=history)
    if ids and len(ids) == len(documents):
        found = recommender.rank(list(dict.fromkeys(ids)), user, history, query or None)
        # By rank: items of the same score have an order too.
        rank = {r.item_id: r.rank for r in found}
        order = sorted(range(len(ids)), key=lambda row: (rank[ids[row]], row))
        return [(row, 1.0 / (1.0 + math.exp(-found[rank[ids[row]] - 1].score))) for row in order]
    if history is None:
        past = [e.item_id for e in recommender.history(user)] if user is not None else []
        history = [item_id for item_id in past if item_id in recommender.catalog]
    scores = score_documents(recommender, documents, query, history).tolist()
    return sorted(enumerate(scores), key=lambda one: (-one[1], one[0]))


def score_documents(
    recommender: Recommender, documents: Sequence[Document], query: str, history: Sequence[str]
) -> Floats:
    """Relevance of documents to a query and a history in [0, 1], shape (len(documents),).

    (1 + c) / 2, where c is the mean of the cosines between a document and what there is of: the query, and
    the mean vector of the history's items. A document is words, or an item of the catalogue.

    Raises
    ------
    RequestError
        If the id of a document is unknown, or all of a history.
    """
    catalog, texts = recommender.catalog, recommender.texts
    past = catalog.known(list(history))
    words = [neutralise(d.text, DOCUMENT_LIMIT) if d.text is not None else "" for d in documents]
    wish = query_text(query)
    encoded = texts.encoder.encode([*words, wish])
    vectors, asked = encoded[:-1].copy(), [encoded[-1]] if wish else []
    items = [row for row, d in enumerate(documents) if d.text is None]
    vectors[items] = texts.vectors[catalog.codes([documents[row].id or "" for row in items])]
    if len(past):
        mean = texts.vectors[past].mean(axis=0)
        asked.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
    if not asked:
        return np.full(len(documents), 0.5, dtype=np.float32)
    cosines = np.clip(vectors @ np.mean(asked, axis=0), -1.0, 1.0)
    relevance: Floats = ((1.0 + cosines) / 2.0).astype(np.float32)
    return relevance
