"""LangChain: a retriever, a document compressor, and the tools of a chat model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self

try:
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
        Callbacks,
    )
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables.config import run_in_executor
    from langchain_core.tools import BaseTool, ToolException
except ImportError as missing:
    raise ImportError('the adapter for LangChain needs: pip install "llmrec[langchain]"') from missing
from pydantic import ConfigDict, Field, model_validator

from llmrec.adapters.common import Asker, Defaults, as_documents, reordered
from llmrec.adapters.tools import verb_of
from llmrec.errors import LLMRecError, told
from llmrec.recommender import Recommender
from llmrec.serve.models import problems
from llmrec.types import Recommendation


class RecommenderRetriever(BaseRetriever):
    """Items for a typed query, or without words for who asks, as documents.

    A document's text is the item's line; its id and ``metadata["item_id"]`` are the item's; further metadata
    are title, rank, score, attributes, sources, and a reason where `rules` has ``explain``.

    Every field but the recommender can be given to a call, ``retriever.invoke("funny", user="42")``, or made
    configurable, ``retriever.configurable_fields(user=ConfigurableField("user"))``. A user or a history of a
    call takes the place of both.

    Parameters
    ----------
    recommender
        Fitted or loaded.
    user, history
        Whose stored history counts, or the ids of chosen items, oldest first.
    k
        How many documents at most.
    where
        Conditions on attributes, as in `Request`.
    rules
        Further fields of `Request`: seen, exclude, caps, pins, diversity, explain.

    Raises
    ------
    RequestError
        From a call, if the request is invalid or names what is not there.
    """

    recommender: Recommender = Field(repr=False)
    user: str | None = None
    history: list[str] | None = None
    k: int = Field(10, ge=1)
    where: dict[str, Any] | None = None
    rules: dict[str, Any] = Field(default_factory=dict)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **call: Any
    ) -> list[Document]:
        defaults = Defaults(self.user, self.history, self.k, self.where, self.rules)
        return as_documents(self.recommender, defaults.request(query, **call), _document)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **call: Any
    ) -> list[Document]:
        # A recommendation is computed, not waited for: a thread keeps the event loop free.
        answer = partial(self._get_relevant_documents, query, run_manager=run_manager.get_sync(), **call)
        return await run_in_executor(None, answer)


def _document(found: Recommendation, line: str, about: dict[str, Any]) -> Document:
    return Document(id=found.item_id, page_content=line, metadata=about)


class RecommenderCompressor(BaseDocumentCompressor):
    """Orders given documents by a query and by who asks, and keeps the first ones.

    Documents whose metadata name an item of the catalogue are known by it, all others are read. Where all are
    items the recommender ranks them as it ranks for recommendations; otherwise their texts are compared.
    ``metadata["relevance_score"]`` of what comes back is in [0, 1].

    Parameters
    ----------
    recommender
        Fitted or loaded.
    user, history
        Whose stored history counts, or the ids of chosen items, oldest first; a call may name others.
    top_n
        How many documents to keep; all if None.
    id_key
        Where the metadata of a document name its item.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    recommender: Recommender = Field(repr=False)
    user: str | None = None
    history: list[str] | None = None
    top_n: int | None = Field(None, ge=1)
    id_key: str = "item_id"

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        user: str | None = None,
        history: Sequence[str] | None = None,
    ) -> Sequence[Document]:
        """Return copies of the first documents, the most relevant first.

        Raises
        ------
        RequestError
            If there is nothing to be relevant to, or a document has neither text nor a known id.
        """
        asker = Asker(self.user, self.history).or_else(user, history)
        given = [(d.metadata.get(self.id_key), d.page_content) for d in documents]
        return [
            documents[row].model_copy(
                update={"metadata": {**documents[row].metadata, "relevance_score": score}}
            )
            for row, score in reordered(self.recommender, given, query, asker, self.top_n)
        ]

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        user: str | None = None,
        history: Sequence[str] | None = None,
    ) -> Sequence[Document]:
        """The same in a thread."""
        compress = partial(self.compress_documents, documents, query, callbacks, user=user, history=history)
        return await run_in_executor(None, compress)


class RecommenderTool(BaseTool):
    """One verb of a recommender as a tool for a chat model; arguments as in `llmrec.adapters.tools`.

    The model reads the items as JSON; the artifact of the message is the list of `Recommendation`. What is
    wrong with a call is told to the model, in words that help it to mend the call.

    Parameters
    ----------
    recommender
        Fitted or loaded.
    name
        The verb: recommend, search_items, similar_items or rank_items.
    user
        Id of the user whom the model talks to. Where it is given, the model can ask for no other.

    Raises
    ------
    RequestError
        If there is no such verb.
    """

    recommender: Recommender = Field(repr=False)
    name: str = "recommend"
    description: str = ""
    user: str | None = None
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    handle_tool_error: Any = True
    handle_validation_error: Any = problems

    @model_validator(mode="after")
    def _describe(self) -> Self:
        verb = verb_of(self.name)
        self.description = self.description or verb.description
        if self.args_schema is None:
            self.args_schema = verb.schema(self.recommender.catalog, bound=self.user is not None)
        return self

    def _run(self, **arguments: Any) -> tuple[str, list[Recommendation]]:
        try:
            answer = verb_of(self.name).run(self.recommender, arguments, self.user)
        except LLMRecError as error:
            raise ToolException(told(error)) from error
        return answer.as_json(), answer.items
