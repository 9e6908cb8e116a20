"""Vectors in a PostgreSQL database with the extension pgvector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from llmrec.database import make_engine, shown, unusable
from llmrec.errors import StoreError
from llmrec.index.config import VECTORS
from llmrec.index.server import CHUNK, FEW, ServerIndex
from llmrec.protocols import Codes, Floats, Hits, Mask

A = TypeVar("A")

LONGEST = 2000
"""Dimensions up to which pgvector indexes its type `vector`."""

GRAPH = "m = 16, ef_construction = 80"
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,50}")
_EF_MOST = 1000


class PgVectorIndex(ServerIndex):
    """Inner-product search in a table ``<name>`` of a database, with a graph (HNSW).

    The mask of a query goes along as a bitmap and is applied while the graph is walked, on and on until
    enough are found; where few items are allowed they are named, and compared exactly.

    Parameters
    ----------
    url
        ``postgresql+psycopg://user:password@host/database``.

    Raises
    ------
    StoreError
        If the database cannot be reached, has no pgvector, or the vectors are too long for it.
    ImportError
        If the driver is not installed.
    """

    def __init__(self, url: str, name: str, dim: int) -> None:
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r} cannot be the name of a {VECTORS}: use a-z, 0-9 and underscores")
        if dim > LONGEST:
            raise StoreError(
                f"pgvector indexes up to {LONGEST} dimensions, these vectors have {dim}: use Milvus or FAISS"
            )
        super().__init__(name, dim)
        self._engine = make_engine(url, VECTORS)
        try:
            from pgvector.psycopg import register_vector
        except ImportError as missing:
            raise ImportError('pgvector needs: pip install "llmrec[postgres]"') from missing
        import psycopg
        import sqlalchemy

        def prepare(connection: Any, record: object) -> None:
            # One at a time: two that find it missing would both make it.
            connection.execute("SELECT pg_advisory_xact_lock(hashtext('llmrec vector'))")
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            connection.commit()
            register_vector(connection)

        sqlalchemy.event.listen(self._engine, "connect", prepare)
        self._errors = (sqlalchemy.exc.SQLAlchemyError, psycopg.Error)
        self.shown = shown(self._engine)

    def stored(self) -> int:
        """Number of rows on the server; 0 if there is no such collection."""
        return self._do(self._count)

    def _count(self, connection: Any) -> int:
        if connection.execute("SELECT to_regclass(%s)", (self.collection,)).fetchone()[0] is None:
            return 0
        # Codes go up from 0 without gaps.
        found = connection.execute(f"SELECT coalesce(max(code) + 1, 0) FROM {self.collection}")
        return int(found.fetchone()[0])

    def drop(self) -> None:
        """Remove the table; one that is gone already is no error."""
        self._do(lambda connection: connection.execute(f"DROP TABLE IF EXISTS {self.collection}"))

    def close(self) -> None:
        """Release the connections."""
        self._engine.dispose()

    def _replace(self, vectors: Floats) -> None:
        def write(connection: Any) -> None:
            # One transaction: who opens the table meanwhile waits for it.
            connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (self.collection,))
            if self._count(connection) >= len(vectors):
                return  # another process has written it meanwhile
            connection.execute(f"DROP TABLE IF EXISTS {self.collection}")
            connection.execute(
                f"CREATE TABLE {self.collection} (code INT PRIMARY KEY, vector VECTOR({self.dim}))"
            )
            self._copy(connection, self.collection, np.arange(len(vectors), dtype=np.int32), vectors)
            connection.execute("SET LOCAL maintenance_work_mem = '1GB'")
            connection.execute(
                f"CREATE INDEX ON {self.collection} USING hnsw (vector vector_ip_ops) WITH ({GRAPH})"
            )

        self._do(write)

    def _write(self, codes: Codes, vectors: Floats) -> None:
        def write(connection: Any) -> None:
            connection.execute(f"CREATE TEMP TABLE changed (LIKE {self.collection}) ON COMMIT DROP")
            self._copy(connection, "changed", codes, vectors)
            connection.execute(
                f"INSERT INTO {self.collection} SELECT code, vector FROM changed ORDER BY code "
                "ON CONFLICT (code) DO UPDATE SET vector = excluded.vector"
            )

        self._do(write)

    @staticmethod
    def _copy(connection: Any, table: str, codes: Codes, vectors: Floats) -> None:
        with connection.cursor().copy(f"COPY {table} (code, vector) FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(["int4", "vector"])
            for start in range(0, len(codes), CHUNK):
                block = np.asarray(vectors[start : start + CHUNK], np.float32)
                for code, vector in zip(codes[start : start + CHUNK].tolist(), block, strict=True):
                    copy.write_row((code, vector))

    def _search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        asked = [self._statement(v, k, m) for v, m in zip(vectors, masks, strict=True)]
        allowed = [self._rows if mask is None else int(np.count_nonzero(mask)) for mask in masks]

        def ask(connection: Any) -> list[Hits]:
            wide = min(max(100, 2 * k), _EF_MOST)
            connection.execute(
                "SELECT set_config('hnsw.ef_search', %s, true), set_config('enable_sort', 'off', true), "
                "set_config('hnsw.iterative_scan', 'strict_order', true)",
                (str(wide),),
            )
            walked = [i for i, count in enumerate(allowed) if count > FEW]
            found = dict(zip(walked, self._fetch(connection, [asked[i] for i in walked]), strict=True))
            # Few are compared one by one; and the graph may end before enough allowed items were met.
            rest = [i for i, n in enumerate(allowed) if i not in found or len(found[i].items) < min(k, n)]
            if rest:
                connection.execute("SET LOCAL enable_sort = on")
                connection.execute("SET LOCAL enable_indexscan = off")
                found |= dict(zip(rest, self._fetch(connection, [asked[i] for i in rest]), strict=True))
            return [found[i] for i in range(len(asked))]

        return self._do(ask)

    def _statement(self, vector: Floats, k: int, mask: Mask | None) -> tuple[str, dict[str, Any]]:
        values: dict[str, Any] = {"v": vector, "n": self._rows, "k": k}
        allowed = "code < %(n)s"
        if mask is not None and np.count_nonzero(mask) <= FEW:
            allowed, values["codes"] = "code = ANY(%(codes)s)", np.flatnonzero(mask).tolist()
        elif mask is not None:
            # Bit i of the bytes is the least significant one first, as here.
            allowed = "CASE WHEN code < %(n)s THEN get_bit(%(bits)s, code) = 1 ELSE false END"
            values["bits"] = np.packbits(mask, bitorder="little").tobytes()
        near = "ORDER BY vector <#> %(v)s LIMIT %(k)s"
        return f"SELECT code, -(vector <#> %(v)s) FROM {self.collection} WHERE {allowed} {near}", values

    @staticmethod
    def _fetch(connection: Any, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[Hits]:
        with connection.pipeline():
            cursors = [connection.execute(text, values, binary=True, prepare=False) for text, values in asked]
        found = []
        for cursor in cursors:
            rows = cursor.fetchall()
            codes = np.array([row[0] for row in rows], np.int32)
            found.append(Hits(codes, np.array([row[1] for row in rows], np.float32)))
        return found

    def _do(self, work: Callable[[Any], A]) -> A:
        with self._connected() as connection:
            return work(connection)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """Lend a connection for one transaction."""
        try:
            pooled = self._engine.raw_connection()
            try:
                connection = pooled.driver_connection
                assert connection is not None
                with connection.transaction():
                    yield connection
            finally:
                pooled.close()
        except self._errors as error:
            raise StoreError(unusable(self._engine, error, VECTORS)) from error
