"""Vectors in Milvus: a file, a server, or a cluster, by the same client."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from llmrec.errors import StoreError
from llmrec.index.config import VECTORS
from llmrec.index.server import FEW, ServerIndex
from llmrec.protocols import Codes, Floats, Hits, Mask
from llmrec.ranking import NO_HITS

SECONDS = 30
"""How long to wait for an answer."""

SENT = 4_000_000
"""Numbers that are sent at once: a message may have 64 MB."""

MOST = 16_384
"""Hits that a server gives at most; those of a longer list are compared here."""

FETCHED = 5000
"""Vectors that are asked for at once."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")


class MilvusIndex(ServerIndex):
    """Inner-product search in a collection ``<name>`` of Milvus, with a graph (HNSW).

    The mask of a query goes along as the codes that are allowed or those that are not, whichever are fewer.

    Parameters
    ----------
    url
        ``http://host:19530``, with ``user:password@`` where it is asked for, or a path that ends in ``.db``.

    Raises
    ------
    StoreError
        If it cannot be reached.
    ImportError
        If the client is not installed.
    """

    def __init__(self, url: str, name: str, dim: int) -> None:
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r} cannot be the name of a {VECTORS}: use letters, digits, underscores")
        super().__init__(name, dim)
        try:
            import grpc
            import pymilvus
        except ImportError as missing:
            raise ImportError('Milvus needs: pip install "llmrec[milvus]"') from missing
        # It logs every call that fails, which is raised as well.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        try:
            parts = urlsplit(url)
            self.shown = f"{parts.scheme}://{parts.hostname}:{parts.port or 19530}" if parts.scheme else url
        except ValueError:
            # Its words repeat the URL.
            raise StoreError(
                f"the URL of the {VECTORS} cannot be read; write it as http://user:password@host:19530, "
                "signs in the password as %XX"
            ) from None
        self._milvus: Any = pymilvus
        self._failed: Any = grpc.RpcError
        with self._told():
            # Its own habit of a ping every ten seconds makes servers hang up.
            calm = {"grpc.keepalive_time_ms": 300_000, "grpc.keepalive_permit_without_calls": False}
            self._client: Any = pymilvus.MilvusClient(url, timeout=SECONDS, grpc_options=calm)

    def stored(self) -> int:
        """Number of rows on the server; 0 if there is no such collection."""
        with self._told():
            return self._stored()

    def _stored(self) -> int:
        if not self._client.has_collection(self.collection):
            return 0
        self._client.load_collection(self.collection)
        found = self._client.query(
            self.collection,
            filter="",
            output_fields=["count(*)"],
            consistency_level="Strong",
            timeout=SECONDS,
        )
        return int(found[0]["count(*)"])

    def drop(self) -> None:
        """Remove the collection; one that is gone already is no error."""
        with self._told():
            if self._client.has_collection(self.collection):
                self._client.drop_collection(self.collection)

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    def _replace(self, vectors: Floats) -> None:
        kinds = self._milvus.DataType
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("code", kinds.INT64, is_primary=True)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=self.dim)
        graph = self._client.prepare_index_params()
        graph.add_index("vector", index_type="HNSW", metric_type="IP", params={"M": 16, "efConstruction": 80})
        draft = f"{self.collection}_{uuid.uuid4().hex[:8]}"
        with self._told():
            self._client.create_collection(
                draft, schema=schema, index_params=graph, consistency_level="Strong"
            )
            try:
                self._send(draft, self._client.insert, np.arange(len(vectors), dtype=np.int32), vectors)
                self._client.flush(draft)
                if 0 < self._stored() < len(vectors):
                    self._client.drop_collection(self.collection)
                if self._stored():
                    self._client.drop_collection(draft)  # another process has written it meanwhile
                else:
                    self._client.rename_collection(draft, self.collection)
            except BaseException as failed:
                self._client.drop_collection(draft)
                if not isinstance(failed, self._milvus.MilvusException) or self._stored() < len(vectors):
                    raise
            self._client.load_collection(self.collection)

    def _write(self, codes: Codes, vectors: Floats) -> None:
        with self._told():
            self._send(self.collection, self._client.upsert, codes, vectors)

    def _send(self, name: str, send: Any, codes: Codes, vectors: Floats) -> None:
        step = max(1, SENT // self.dim)
        for start in range(0, len(codes), step):
            block = np.asarray(vectors[start : start + step], np.float32)
            rows = zip(codes[start : start + step].tolist(), block, strict=True)
            send(name, [{"code": code, "vector": vector} for code, vector in rows], timeout=10 * SECONDS)

    def _search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        hits: list[Hits] = [NO_HITS] * len(vectors)
        # Those with the same filter go together.
        filters: dict[str, list[int]] = {}
        for i, mask in enumerate(masks):
            filters.setdefault(self._filter(mask), []).append(i)
        if k > MOST:
            with self._told():
                asked = [np.arange(self._rows) if mask is None else np.flatnonzero(mask) for mask in masks]
                return [self._compared(vector, k, own) for vector, own in zip(vectors, asked, strict=True)]
        with self._told():
            for words, rows in filters.items():
                found = self._client.search(
                    self.collection,
                    data=list(vectors[rows]),
                    limit=k,
                    anns_field="vector",
                    filter=words,
                    search_params={"metric_type": "IP", "params": {"ef": max(128, 2 * k)}},
                    output_fields=["code"],
                    consistency_level="Strong",
                    timeout=SECONDS,
                )
                for i, those in zip(rows, found, strict=True):
                    codes = np.array([hit["code"] for hit in those], np.int32)
                    hits[i] = Hits(codes, np.array([hit["distance"] for hit in those], np.float32))
            for i, mask in enumerate(masks):
                allowed = self._rows if mask is None else int(np.count_nonzero(mask))
                # The graph may end before enough allowed items were met.
                if mask is not None and len(hits[i].items) < min(k, allowed):
                    hits[i] = self._compared(vectors[i], k, np.flatnonzero(mask))
        return hits

    def _compared(self, vector: Floats, k: int, codes: Any) -> Hits:
        """The nearest of some codes, all of them compared here."""
        found, scores = [], []
        for start in range(0, len(codes), FETCHED):
            rows = self._client.get(
                self.collection,
                ids=codes[start : start + FETCHED].tolist(),
                output_fields=["code", "vector"],
                timeout=SECONDS,
            )
            found += [row["code"] for row in rows]
            scores += [float(np.dot(np.asarray(row["vector"], np.float32), vector)) for row in rows]
        order = np.argsort(-np.array(scores), kind="stable")[:k]
        return Hits(np.array(found, np.int32)[order], np.array(scores, np.float32)[order])

    def _filter(self, mask: Mask | None) -> str:
        known = f"code < {self._rows}"
        if mask is None:
            return known
        allowed = np.flatnonzero(mask)
        if len(allowed) <= max(FEW, len(mask) // 2):
            return f"code in {allowed.tolist()}"
        ruled_out = np.flatnonzero(~mask)
        return f"{known} and code not in {ruled_out.tolist()}" if len(ruled_out) else known

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (self._milvus.MilvusException, self._failed) as error:
            words = str(getattr(error, "message", "") or type(error).__name__).splitlines()[0]
            raise StoreError(f"the {VECTORS} {self.shown} cannot be used: {words}") from error
