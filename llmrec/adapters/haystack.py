"""Haystack: a retriever and a ranker, components that are saved in pipelines by the folder of a model."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary

try:
    from haystack import Document, component, default_to_dict
    from haystack.core.errors import DeserializationError
    from haystack.core.serialization import generate_qualified_class_name
except ImportError as missing:
    raise ImportError('the adapter for Haystack needs: pip install "llmrec[haystack]"') from missing

from llmrec.adapters.common import Asker, Defaults, as_documents, reordered
from llmrec.errors import ModelError, RequestError
from llmrec.persistence import read_manifest
from llmrec.recommender import Recommender
from llmrec.types import Recommendation

_loaded: WeakValueDictionary[tuple[Path, str], Recommender] = WeakValueDictionary()
_loading = threading.Lock()


def _load(folder: Path) -> Recommender:
    """Load a saved recommender, or return the one that another component of this process has loaded."""
    folder = folder.resolve()
    with _loading:
        # A folder that was saved again is another recommender.
        key = folder, str(read_manifest(folder)["state"])
        found = _loaded.get(key)
        if found is None:
            found = _loaded[key] = Recommender.load(folder)
        return found


class _OfRecommender:
    """A component over one recommender: given, or loaded from a folder when it is first needed."""

    _recommender: Recommender | None = None
    _folder: Path | None = None

    def _take(self, recommender: Recommender | str | Path) -> None:
        if isinstance(recommender, Recommender):
            self._recommender = recommender
        elif isinstance(recommender, str | Path):
            self._folder = Path(recommender)
        else:
            raise RequestError(
                f"a Recommender or the folder of a saved one is needed, got {type(recommender).__name__}"
            )

    @property
    def recommender(self) -> Recommender:
        """The recommender; loading it may raise ModelError."""
        if self._recommender is None:
            assert self._folder is not None
            self._recommender = _load(self._folder)
        return self._recommender

    def warm_up(self) -> None:
        """Load the recommender; a pipeline does this before it first runs."""
        _ = self.recommender

    def _saved(self, **settings: Any) -> dict[str, Any]:
        """The component as plain values; its recommender is the folder that it is saved in."""
        folder = self._folder or (self._recommender.folder if self._recommender is not None else None)
        if folder is None:
            raise ModelError(
                "a pipeline holds the folder of its recommender, and this one has none: call its save first"
            )
        return default_to_dict(self, recommender=str(folder), **settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the component that `to_dict` described; the folder is not read yet.

        Raises
        ------
        DeserializationError
            If the values are of another component.
        """
        # Not `default_from_dict`: it would take a condition on an attribute called "type" for an object.
        if data.get("type") != generate_qualified_class_name(cls):
            raise DeserializationError(f"{data.get('type')!r} cannot be read as {cls.__name__!r}")
        return cls(**data.get("init_parameters", {}))


@component
class RecommenderRetriever(_OfRecommender):
    """Items for a typed query, or without words for who asks, as documents.

    A document's content is the item's line; its id and ``meta["item_id"]`` are the item's; further meta are
    title, rank, score, attributes, sources, and a reason where `rules` has ``explain``. Its score compares
    within one answer only.

    Parameters
    ----------
    recommender
        Fitted or loaded, or the folder of a saved one.
    user, history
        Whose stored history counts, or the ids of chosen items, oldest first; a run may name others.
    top_k
        How many documents at most.
    where
        Conditions on attributes, as in `Request`.
    rules
        Further fields of `Request`: seen, exclude, caps, pins, diversity, explain.

    Raises
    ------
    RequestError
        If a setting is invalid.
    """

    def __init__(
        self,
        recommender: Recommender | str | Path,
        user: str | None = None,
        history: list[str] | None = None,
        top_k: int = 10,
        where: dict[str, Any] | None = None,
        rules: dict[str, Any] | None = None,
    ) -> None:
        self._take(recommender)
        self.defaults = Defaults(user, history, top_k, where, rules or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the component as plain values; ModelError if its recommender was never saved."""
        d = self.defaults
        return self._saved(
            user=d.user, history=d.history, top_k=d.k, where=d.where, rules=dict(d.rules) or None
        )

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        user: str | None = None,
        history: list[str] | None = None,
        top_k: int | None = None,
        where: dict[str, Any] | None = None,
    ) -> dict[str, list[Document]]:
        """Return ``documents``, best first; what is None is as the component was made.

        Raises
        ------
        RequestError
            If the request is invalid or names what is not there.
        ModelError
            If the folder holds no recommender that can be loaded.
        """
        request = self.defaults.request(query, user, history, top_k, where)
        return {"documents": as_documents(self.recommender, request, _document)}


def _document(found: Recommendation, line: str, about: dict[str, Any]) -> Document:
    return Document(id=found.item_id, content=line, meta=about, score=found.score)


@component
class RecommenderRanker(_OfRecommender):
    """Orders given documents by a query and by who asks, and keeps the first ones.

    Documents whose meta name an item of the catalogue are known by it, all others are read. Where all are
    items the recommender ranks them as it ranks for recommendations; otherwise their texts are compared. The
    score of what comes back is its relevance in [0, 1].

    Parameters
    ----------
    recommender
        Fitted or loaded, or the folder of a saved one.
    user, history
        Whose stored history counts, or the ids of chosen items, oldest first; a run may name others.
    top_k
        How many documents to keep; all if None.
    id_key
        Where the meta of a document name its item.

    Raises
    ------
    RequestError
        If both a user and a history are given.
    """

    def __init__(
        self,
        recommender: Recommender | str | Path,
        user: str | None = None,
        history: list[str] | None = None,
        top_k: int | None = None,
        id_key: str = "item_id",
    ) -> None:
        self._take(recommender)
        self.asker = Asker(user, history)
        self.top_k = top_k
        self.id_key = id_key

    def to_dict(self) -> dict[str, Any]:
        """Return the component as plain values; ModelError if its recommender was never saved."""
        a = self.asker
        return self._saved(user=a.user, history=a.history, top_k=self.top_k, id_key=self.id_key)

    @component.output_types(documents=list[Document])
    def run(
        self,
        documents: list[Document],
        query: str = "",
        user: str | None = None,
        history: list[str] | None = None,
        top_k: int | None = None,
    ) -> dict[str, list[Document]]:
        """Return ``documents``, the most relevant first; what is None is as the component was made.

        Raises
        ------
        RequestError
            If there is nothing to be relevant to, or a document has neither text nor a known id.
        ModelError
            If the folder holds no recommender that can be loaded.
        """
        given = [(one.meta.get(self.id_key), one.content) for one in documents]
        limit = self.top_k if top_k is None else top_k
        order = reordered(self.recommender, given, query, self.asker.or_else(user, history), limit)
        return {"documents": [dataclasses.replace(documents[row], score=score) for row, score in order]}
