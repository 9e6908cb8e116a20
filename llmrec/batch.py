"""Recommendations for many users, or vectors for many texts: parquet in, parquet out, part by part.

A part is a slice of the rows and a file with the same number, written under another name and renamed. So a
run that was interrupted goes on with the parts that are missing, on one machine or a cluster, and no process
ever holds more than a part. With several workers the parts are spread by Ray Data over a pool of actors; one
that dies is started again, and its part with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from llmrec import errors
from llmrec.errors import DataError, EngineError, LLMRecError, RequestError
from llmrec.persistence import read_manifest
from llmrec.recommender import Recommender
from llmrec.rows import id_strings
from llmrec.types import Request, as_ids

Task = Literal["recommend", "embed"]

RUN, ROWS = ".run/run.json", ".run/rows.parquet"
"""Beside the parts, where who reads `*.parquet` of the folder does not look."""

FORMAT = 2
"""Raised when parts get other columns: a run with those of before begins anew."""

ATTEMPTS = 3
"""How often a part is tried whose actor died."""

_COLUMNS: Mapping[Task, tuple[str, ...]] = {
    "recommend": ("user_id", "history", "query"),
    "embed": ("item_id", "id", "text"),
}


@dataclass(frozen=True)
class Batch:
    """What is to be done.

    Parameters
    ----------
    task
        `recommend` reads the columns user_id, history (a list of item ids) and query, of which one at least
        must be there; `embed` reads text, and item_id or id if there is one.
    model
        Directory of a saved recommender.
    out
        Folder of the parts.
    source
        Parquet file, folder or pattern; None for all users with events, or all items of the catalogue.
    k
        Items for each row.
    size
        Rows of a part.
    store, index
        URLs of the servers for events and vectors; see `Recommender.load`.
    """

    task: Task
    model: Path
    out: Path
    source: str | None = None
    k: int = 10
    size: int = 1000
    store: str | None = None
    index: str | None = None

    def path(self, part: int) -> Path:
        """File of a part."""
        return self.out / f"part-{part:06d}.parquet"


class PartWorker:
    """Does parts, in this process or as an actor."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.rec = Recommender.load(batch.model, store=batch.store, index=batch.index)

    def __call__(self, asked: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
        """Do the parts of these numbers under the key `id`, as Ray Data gives them; return what is wrong."""
        kinds, words = [], []
        for part in asked["id"]:
            kind, message = "", ""
            try:
                self.do(int(part))
            except LLMRecError as error:
                # Raised here, it would be tried again, and come back as an error of Ray.
                kind, message = type(error).__name__, str(error)
            kinds.append(kind)
            words.append(message)
        return {"kind": kinds, "words": words}

    def do(self, part: int) -> None:
        """Do one part and write its file."""
        batch = self.batch
        rows = _scan(batch).slice(part * batch.size, batch.size).collect()
        what = str(batch.source or batch.out / ROWS)
        for name in (name for name in ("user_id", "item_id", "id") if name in rows.columns):
            rows = rows.with_columns(id_strings(rows[name], what))
        made = self._recommended(rows, part) if batch.task == "recommend" else self._embedded(rows)
        path = batch.path(part)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        made.write_parquet(draft)
        draft.replace(path)

    def _recommended(self, rows: pl.DataFrame, part: int) -> pl.DataFrame:
        first = part * self.batch.size
        requests = [self._request(row, n) for n, row in enumerate(rows.iter_rows(named=True), start=first)]
        found = self.rec.recommend_many(requests)
        if any(r.degraded for answer in found for r in answer):
            # A part that is written is not done again.
            raise EngineError("the inference server gave no scores; the same command goes on from here")
        table = {
            "rank": [r.rank for answer in found for r in answer],
            "item_id": [r.item.item_id for answer in found for r in answer],
            "score": [r.score for answer in found for r in answer],
        }
        # Where a user asks twice, only the row says which answer is which.
        row = (part * self.batch.size + pl.int_range(pl.len())).alias("row")
        kept = rows.select(row, *(c for c in ("user_id",) if c in rows.columns))
        who = kept[np.repeat(np.arange(len(kept)), [len(answer) for answer in found])]
        schema = {"rank": pl.Int32, "item_id": pl.String, "score": pl.Float64}
        return who.hstack(pl.DataFrame(table, schema=schema))

    def _request(self, row: Mapping[str, Any], number: int) -> Request:
        """What a row asks for; what is wrong with it names the row, counted from 0."""
        user, history, query = row.get("user_id"), row.get("history"), row.get("query")
        if history is not None:
            # Missing values are no items; in lists that had some, whole numbers come as floats.
            history = [item for item in history if item is not None and item == item]
        try:
            if user is None and history is None and query is None:
                raise RequestError("nobody is asked for: user_id, history and query are empty")
            request = Request(user=user, history=history, query=query, k=self.batch.k)
            self.rec.catalog.known(as_ids(request.history or (), "history"))
        except RequestError as wrong:
            raise DataError(f"{self.batch.source}: row {number:,}: {wrong}") from None
        return request

    def _embedded(self, rows: pl.DataFrame) -> pl.DataFrame:
        encoder = self.rec.texts.encoder
        texts = [text or "" for text in rows["text"].to_list()]
        vectors = pl.Series("vector", encoder.encode(texts), dtype=pl.Array(pl.Float32, encoder.dim))
        return rows.select(c for c in ("item_id", "id") if c in rows.columns).with_columns(vectors)


def run(
    batch: Batch,
    workers: int = 1,
    address: str | None = None,
    on_part: Callable[[int, int], None] = lambda done, parts: None,
) -> int:
    """Do all parts that are missing; return the number of rows in all.

    Parameters
    ----------
    workers
        Actors of Ray; 1 does everything in this process.
    address
        Of a Ray cluster; None starts Ray on this machine.
    on_part
        Told how many parts are done, and how many there are.

    Raises
    ------
    DataError
        If the source cannot be read, lacks the columns, or holds a row that cannot be answered; or if the
        folder holds parts of another run.
    ImportError
        If Ray is needed and not installed.
    """
    if batch.size < 1 or workers < 1:
        raise RequestError(f"size and workers must be at least 1, got {batch.size} and {workers}")
    # Actors may run in other folders.
    source = None if batch.source is None else str(Path(batch.source).absolute())
    batch = replace(batch, model=batch.model.absolute(), out=batch.out.absolute(), source=source)
    batch.out.mkdir(parents=True, exist_ok=True)
    rows = _begin(batch)
    parts = math.ceil(rows / batch.size)
    missing = [part for part in range(parts) if not batch.path(part).exists()]
    done = parts - len(missing)
    on_part(done, parts)
    if missing:
        spread = workers > 1 or address is not None
        for _ in _spread(batch, missing, workers, address) if spread else _here(batch, missing):
            done += 1
            on_part(done, parts)
    return rows


def _here(batch: Batch, missing: Sequence[int]) -> Iterator[None]:
    worker = PartWorker(batch)
    try:
        for part in missing:
            worker.do(part)
            yield
    finally:
        worker.rec.close()


def _spread(batch: Batch, missing: Sequence[int], workers: int, address: str | None) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as absent:
        raise ImportError('several workers need: pip install "llmrec[batch]"') from absent
    mine = not ray.is_initialized()
    if mine and address is None:
        # One processor more than actors, for Ray's own reading.
        ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    elif mine:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        settings = ray.data.DataContext.get_current()
        settings.enable_progress_bars = False
        numbers = ray.data.from_items([{"id": part} for part in missing], override_num_blocks=len(missing))
        done = numbers.map_batches(
            PartWorker,
            fn_constructor_args=(batch,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
            max_restarts=ATTEMPTS,
            max_task_retries=ATTEMPTS,
        )
        for row in done.iter_rows():
            if row["kind"]:
                raise getattr(errors, row["kind"], DataError)(row["words"])
            yield
    except ray.exceptions.RayError as failed:
        raise DataError(f"a part could not be done: {str(failed).strip().splitlines()[-1]}") from failed
    finally:
        if mine:
            ray.shutdown()


def _begin(batch: Batch) -> int:
    """Check the folder and the source, or write down the rows where there is none; return their number."""
    where = dict.fromkeys(("out", "store", "index"), "")
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(batch)]
    state = read_manifest(batch.model)["state"]
    said = {**asdict(batch), **where, "model": state, "files": files, "format": FORMAT}
    key = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
    path = batch.out / RUN
    known: dict[str, Any] = {}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{path} is damaged: remove {batch.out}, or take another folder") from None
    elif any(batch.out.glob("part-*.parquet")):
        raise DataError(
            f"{batch.out} holds parts of something else, or of an earlier version: take another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if known and known.get("key") != key:
        raise DataError(
            f"{batch.out} holds parts of another run (model, source or its contents, k or size differ): take "
            f"another folder, or remove it"
        )
    if known:
        return int(known["rows"])
    if batch.source is None:
        _write_rows(batch)
    try:
        columns = _source(batch).collect_schema()
        rows = int(_source(batch).select(pl.len()).collect().item())
    except (OSError, pl.exceptions.PolarsError) as broken:
        raise DataError(f"cannot read {batch.source}: {str(broken).splitlines()[0]}") from broken
    found = [name for name in _COLUMNS[batch.task] if name in columns]
    if not found or (batch.task == "embed" and "text" not in found):
        needed = "text" if batch.task == "embed" else "one of user_id, history, query"
        raise DataError(f"{batch.source} needs the column {needed}, and has {', '.join(columns)}")
    if "history" in found and not isinstance(columns["history"], pl.List):
        raise DataError(f"{batch.source}: history must be lists of item ids, got {columns['history']}")
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"key": key, "rows": rows}), encoding="utf-8")
    draft.replace(path)
    return rows


def _write_rows(batch: Batch) -> None:
    rec = Recommender.load(batch.model, store=batch.store)
    try:
        if batch.task == "embed":
            catalog = rec.catalog
            table = pl.DataFrame({"item_id": catalog.ids, "text": catalog.lines()}).filter(catalog.active)
        else:
            table = pl.DataFrame({"user_id": rec.users(limit=None)}, schema={"user_id": pl.String})
    finally:
        rec.close()
    rows = batch.out / ROWS
    draft = rows.with_suffix(".tmp")
    table.write_parquet(draft)
    draft.replace(rows)


def _scan(batch: Batch) -> pl.LazyFrame:
    """The rows, in order; nothing is read yet."""
    frame = _source(batch)
    known = frame.collect_schema()
    chosen = []
    for name in (name for name in _COLUMNS[batch.task] if name in known):
        column, kind = pl.col(name), known[name]
        if isinstance(kind, pl.List):
            whole = kind.inner is not None and kind.inner.is_float()
            column = column if whole else column.cast(pl.List(pl.String))
        elif name in ("query", "text"):
            column = column.cast(pl.String)
        chosen.append(column)
    return frame.select(chosen)


def _files(batch: Batch) -> list[Path]:
    """Files of the source as they are now; none if it is the events or items of the model."""
    if batch.source is None:
        return []
    place = Path(batch.source)
    if place.is_dir():
        return sorted(place.glob("*.parquet"))
    if place.exists():
        return [place]
    return sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))


def _source(batch: Batch) -> pl.LazyFrame:
    place = Path(batch.source) if batch.source is not None else batch.out / ROWS
    return pl.scan_parquet(place / "*.parquet" if place.is_dir() else str(place))
