"""From a configuration to an index, and how near it comes to exact search."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from llmrec.index.config import IndexConfig, of_milvus
from llmrec.index.faiss_index import CHUNK, FaissIndex
from llmrec.index.server import ServerIndex
from llmrec.protocols import Floats, VectorIndex

JUDGED, NEAREST = 100, 10


def new_name() -> str:
    """Return a name that no collection has yet."""
    return f"llmrec_vectors_{uuid.uuid4().hex[:12]}"


def server_index(url: str, name: str, dim: int) -> ServerIndex:
    """Connect to the collection of this name; it need not be there.

    Raises
    ------
    StoreError
        If the server cannot be reached.
    ImportError
        If its client is not installed.
    """
    if of_milvus(url):
        from llmrec.index.milvus_index import MilvusIndex

        return MilvusIndex(url, name, dim)
    from llmrec.index.pgvector_index import PgVectorIndex

    return PgVectorIndex(url, name, dim)


def make_index(
    vectors: Floats,
    config: IndexConfig,
    on_stage: Callable[[str], None] | None = None,
    *,
    url: str | None = None,
    name: str | None = None,
) -> VectorIndex:
    """Index vectors, or open the index of that name if it holds them.

    Parameters
    ----------
    vectors
        Shape (n, dim); may be mapped from a file.
    on_stage
        Told how many of the nearest are found, where a new index is not exact; not measured if None.
    url
        Of a server; None for FAISS.

    Raises
    ------
    StoreError
        If the server cannot be used.
    ImportError
        If its client is not installed.
    """
    made: VectorIndex
    if url is None:
        made = FaissIndex(vectors.shape[1], config.exact_up_to, config.compressed_above)
        made.add(vectors)
    else:
        made = server_index(url, name or new_name(), vectors.shape[1])
        if made.open(vectors):
            return made
        if on_stage is not None:
            on_stage(f"writing {len(vectors):,} vectors to {made.shown}")
        made.build(vectors)
    if on_stage is not None and not made.exact and len(vectors):
        share = recall(made, vectors)
        on_stage(f"vector index: finds {share:.1%} of the {NEAREST} nearest that exact search finds")
    return made


@contextmanager
def dropped_on_error(index: VectorIndex) -> Iterator[None]:
    """Remove a new collection from its server if what it was made for fails: nobody knows its name."""
    try:
        yield
    except BaseException:
        if isinstance(index, ServerIndex):
            index.drop()
            index.close()
        raise


def recall(index: VectorIndex, vectors: Floats, k: int = NEAREST, judged: int = JUDGED) -> float:
    """Share of the k nearest by exact search that an index finds, for a seeded sample of its own vectors."""
    n = len(vectors)
    rows = np.sort(np.random.default_rng(0).choice(n, min(judged, n), replace=False))
    asked = np.ascontiguousarray(vectors[rows], np.float32)
    best = np.empty((len(rows), 0), np.int64)
    scores = np.empty((len(rows), 0), np.float32)
    for start in range(0, n, CHUNK):
        block = asked @ np.asarray(vectors[start : start + CHUNK], np.float32).T
        codes = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
        scores, best = np.hstack([scores, block]), np.hstack([best, codes])
        kept = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, best = np.take_along_axis(scores, kept, 1), np.take_along_axis(best, kept, 1)
    found = index.search(asked, k, [None] * len(rows))
    # Equal scores stand for each other: what is found must be as near as the k-th by exact search.
    near = [
        np.count_nonzero(np.asarray(vectors[hits.items], np.float32) @ query >= row[-1] - 1e-5) / len(row)
        for hits, query, row in zip(found, asked, scores, strict=True)
    ]
    return float(np.mean(np.minimum(near, 1.0)))
