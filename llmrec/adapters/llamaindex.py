"""LlamaIndex: a retriever and a node postprocessor, and a query that says who asks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
except ImportError as missing:
    raise ImportError('the adapter for LlamaIndex needs: pip install "llmrec[llamaindex]"') from missing
from pydantic import Field

from llmrec.adapters.common import Asker, Defaults, as_documents, reordered
from llmrec.recommender import Recommender
from llmrec.types import Recommendation


@dataclass
class PersonalQuery(QueryBundle):
    """A query with who asks it, so that one query engine serves everybody.

    Query engines pass it on to retriever and postprocessors as it is. A user or a history takes the place
    of both that the retriever was made with.
    """

    user: str | None = None
    history: Sequence[str] | None = None


def _asker(query: QueryBundle | None, default: Asker) -> Asker:
    return default.or_else(query.user, query.history) if isinstance(query, PersonalQuery) else default


class RecommenderRetriever(BaseRetriever):
    """Items for a typed query, or without words for who asks, as nodes.

    A node's text is the item's line; its id and ``metadata["item_id"]`` are the item's; further metadata are
    title, rank, score, attributes, sources, and a reason where `rules` has ``explain``. Language models read
    id, title, attributes and reason besides the text, embeddings the text alone. The score compares within
    one answer only.

    Parameters
    ----------
    recommender
        Fitted or loaded.
    user, history
        Whose stored history counts, or the ids of chosen items, oldest first; see `PersonalQuery`.
    similarity_top_k
        How many nodes at most.
    where
        Conditions on attributes, as in `Request`.
    rules
        Further fields of `Request`: seen, exclude, caps, pins, diversity, explain.

    Raises
    ------
    RequestError
        If a setting is invalid; from a call, if it names what is not there.
    """

    def __init__(
        self,
        recommender: Recommender,
        *,
        user: str | None = None,
        history: Sequence[str] | None = None,
        similarity_top_k: int = 10,
        where: Mapping[str, Any] | None = None,
        rules: Mapping[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        self.recommender = recommender
        self.defaults = Defaults(user, history, similarity_top_k, where, rules or {})
        super().__init__(callback_manager=callback_manager, verbose=verbose)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asker = _asker(query_bundle, Asker(self.defaults.user, self.defaults.history))
        request = self.defaults.request(query_bundle.query_str, asker.user, asker.history)
        return as_documents(self.recommender, request, _node)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        # A recommendation is computed, not waited for: a thread keeps the event loop free.
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(found: Recommendation, line: str, about: dict[str, Any]) -> NodeWithScore:
    node = TextNode(
        id_=found.item_id,
        text=line,
        metadata=about,
        excluded_llm_metadata_keys=["rank", "score", "sources"],
        excluded_embed_metadata_keys=list(about),
    )
    return NodeWithScore(node=node, score=found.score)


class RecommenderPostprocessor(BaseNodePostprocessor):
    """Orders given nodes by the query and by who asks, and keeps the first ones.

    Nodes whose metadata name an item of the catalogue are known by it, all others are read. Where all are
    items the recommender ranks them as it ranks for recommendations; otherwise their texts are compared. The
    score of what comes back is its relevance in [0, 1].

    Parameters
    ----------
    recommender
        Fitted or loaded.
    user, history
        Whose stored history counts, or the ids of chosen items, oldest first; see `PersonalQuery`.
    top_n
        How many nodes to keep; all if None.
    id_key
        Where the metadata of a node name its item.
    """

    recommender: Recommender = Field(repr=False, exclude=True)
    user: str | None = None
    history: list[str] | None = None
    top_n: int | None = Field(None, ge=1)
    id_key: str = "item_id"

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in serialised form."""
        return "RecommenderPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        asker = _asker(query_bundle, Asker(self.user, self.history))
        given = [(one.node.metadata.get(self.id_key), one.get_content()) for one in nodes]
        words = query_bundle.query_str if query_bundle is not None else ""
        order = reordered(self.recommender, given, words, asker, self.top_n)
        return [NodeWithScore(node=nodes[row].node, score=score) for row, score in order]
