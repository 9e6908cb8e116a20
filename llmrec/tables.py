"""Tables in: one reader for every kind of source."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec.errors import DataError
from llmrec.types import Event, Item

_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".inter", ".item")
_LONG_TEXT = 2**31 - 1


def is_untyped(source: Any) -> bool:
    """Return whether the values of `source` come as text, so that numbers must be recognised."""
    return isinstance(source, str | Path) and _suffix(Path(source)) not in (".parquet", ".jsonl", ".jsonl.gz")


def read_table(
    source: Any, what: str, mapping: Mapping[str, str] | None = None, ignore: Collection[str] = ()
) -> pl.DataFrame:
    """Read a table from a file or an object.

    Parameters
    ----------
    source
        Path of a .parquet, .csv(.gz), .tsv(.gz), .jsonl(.gz), .inter or .item file (the last two are
        RecBole's atomic files), a polars or pandas DataFrame, a polars LazyFrame, a `datasets.Dataset`,
        or a list of Item, Event or dict. Values of text files stay text. A .csv file without a comma in its
        header may have semicolons or tabs instead. A column without a name in a file or frame, as the index
        of a table that pandas wrote, is left out.
    what
        Name of the table in messages, e.g. ``"items"``.
    mapping
        Columns to rename, ``{name in the source: name in the data contract}``.
    ignore
        Columns of the source that are left out, whatever they hold.

    Raises
    ------
    DataError
        If the source is missing, unreadable, of an unknown kind, or has no rows, or if `mapping` names a
        column that is not there or makes two columns of one name.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        frame, what = _read_file(path, ignore), f"{what} ({path})"
        atomic = _suffix(path) in (".inter", ".item")
    else:
        frame, atomic = _read_object(source, what, ignore), False
    frame = frame.drop([name for name in frame.columns if name in ignore or not name.strip()])
    if not frame.width or not frame.height:
        raise DataError(f"{what}: the table has no rows")
    frame = _rename(frame, what, mapping or {})
    if is_untyped(source):
        ids = [name for name in ("user_id", "item_id") if frame.schema.get(name) == pl.String]
        frame = frame.with_columns(pl.col(ids).str.strip_chars())
    if atomic:
        # RecBole writes titles as token_seq: the words are one title, not a list of values.
        lists = [name for name in ("title", "text") if frame.schema.get(name) == pl.List(pl.String)]
        frame = frame.with_columns(pl.col(lists).list.join(" "))
    return frame


def _rename(frame: pl.DataFrame, what: str, mapping: Mapping[str, str]) -> pl.DataFrame:
    missing = [name for name in mapping if name not in frame.columns]
    if missing:
        raise DataError(
            f"{what}: mapping names columns that are not there: {', '.join(map(repr, missing))}; "
            f"the columns are {', '.join(frame.columns)}"
        )
    names = [mapping.get(name, name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{what}: two columns would be called {', '.join(map(repr, twice))}; change mapping")
    return frame.rename(dict(zip(frame.columns, names, strict=True)))


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")


def _read_file(path: Path, ignore: Collection[str]) -> pl.DataFrame:
    suffix = _suffix(path)
    if not suffix:
        raise DataError(f"cannot read {path}: unknown kind of file; known are {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"cannot read {path}: there is no such file")
    if suffix == ".parquet":
        return _guard(lambda: pl.read_parquet(path, glob=False), str(path))
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"cannot read {path}: the file is empty")
    if suffix.startswith(".jsonl"):
        return _from_records(_json_lines(text, path), str(path), ignore)
    if suffix in (".inter", ".item"):
        return _split_types(_parse_csv(text, "\t", None, path), path)
    return _parse_csv(text, _separator(text) if suffix.startswith(".csv") else "\t", '"', path)


def _separator(text: str) -> str:
    """What stands between the fields of a CSV file, by its header: a comma, unless there is none."""
    header = text.lstrip().partition("\n")[0]
    return next((mark for mark in ",;\t" if mark in header), ",")


def _guard(read: Callable[[], pl.DataFrame], what: str) -> pl.DataFrame:
    """Run a reader of another library; whatever it raises leaves as a DataError."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {what}: {type(error).__name__}: {str(error).strip()[:300]}") from error
    except BaseException as error:
        # A bug in polars' Rust code arrives as a PanicException, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"cannot read {what}: the file is damaged") from error


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"cannot read {path}: line {line} (data row {line - 1}) is not UTF-8 "
            f"(byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from error


def _parse_csv(text: str, separator: str, quote: str | None, path: Path) -> pl.DataFrame:
    csv.field_size_limit(_LONG_TEXT)

    def rows() -> Iterator[list[str]]:
        lines = io.StringIO(text, newline="")
        if quote:
            return csv.reader(lines, delimiter=separator)
        return csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)

    header = next(rows())
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"cannot read {path}: several columns are called {', '.join(map(repr, twice))}")

    def check_fields() -> None:
        for number, row in enumerate(rows()):
            if row and len(row) != len(header):
                raise DataError(
                    f"cannot read {path}: data row {number} has {len(row)} fields, the header {len(header)}; "
                    f"a value with the separator, a quote or a line end in it stands in quotes"
                )

    try:
        frame = _guard(
            lambda: pl.read_csv(
                text.encode(), separator=separator, quote_char=quote, infer_schema=False, null_values=[""]
            ),
            str(path),
        )
    except DataError:
        check_fields()
        if not quote:
            raise
        raise DataError(
            f"cannot read {path}: a quote that is opened is not closed, or stands within a value: write "
            f'"" for a quote, and the value in quotes'
        ) from None
    # polars fills short rows up without a word; a row that lacks fields has a null in the last column.
    if frame.height and frame.to_series(frame.width - 1).null_count():
        check_fields()
    return frame.filter(~pl.all_horizontal(pl.all().is_null())) if frame.width > 1 else frame


def _split_types(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Apply the types in the header of a RecBole atomic file (``name:type``)."""
    columns = []
    for column in frame.get_columns():
        name, _, kind = column.name.rpartition(":")
        if not name or kind not in ("token", "token_seq", "float", "float_seq"):
            raise DataError(
                f"cannot read {path}: column {column.name!r} has no type; atomic files have a header like "
                "user_id:token item_id:token timestamp:float, separated by tabs"
            )
        if kind.endswith("_seq"):
            column = column.str.split(" ")
        elif kind == "float":
            numbers = column.cast(pl.Float64, strict=False)
            bad = np.flatnonzero((numbers.is_null() & column.is_not_null()).to_numpy())
            if len(bad):
                raise DataError(f"cannot read {path}: {name!r} is not a number in data row {bad[0] + 1}")
            column = numbers
        columns.append(column.alias(name))
    return pl.DataFrame(columns)


def _json_lines(text: str, path: Path) -> list[Any]:
    records = []
    for number, line in enumerate(filter(str.strip, text.split("\n")), start=1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read {path}: row {number} is not JSON: {error}") from error
    return records


def _read_object(source: Any, what: str, ignore: Collection[str]) -> pl.DataFrame:
    if isinstance(source, pl.DataFrame):
        return source
    if isinstance(source, pl.LazyFrame):
        return _guard(source.collect, what)
    # By name, so that these packages need not be installed.
    package, kind = type(source).__module__.partition(".")[0], type(source).__name__
    if package == "pandas" and kind == "DataFrame":
        return _from_pandas(source.drop(columns=[n for n in source.columns if str(n) in ignore]), what)
    if package == "datasets":
        if kind != "Dataset":
            raise DataError(f"{what}: got a datasets.{kind}; pass one split of it, a datasets.Dataset")
        return _guard(lambda: pl.DataFrame(pl.from_arrow(source.with_format("arrow")[:])), what)
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        return _from_records(source, what, ignore)
    raise DataError(
        f"{what}: cannot read a {type(source).__name__}; pass a path, a polars or pandas DataFrame, a "
        "datasets.Dataset, or a list of Item, Event or dict"
    )


def _from_pandas(source: Any, what: str) -> pl.DataFrame:
    names = [str(name) for name in source.columns]
    if len(set(names)) != len(names):
        raise DataError(f"{what}: the DataFrame has several columns of one name")
    columns = []
    for position, name in enumerate(names):
        column = source.iloc[:, position]
        kind = getattr(column.dtype, "kind", "O")
        if kind == "M":
            zoned = getattr(column.dtype, "tz", None) is not None
            naive = column.dt.tz_convert("UTC").dt.tz_localize(None) if zoned else column
            columns.append(pl.Series(name, naive.to_numpy().astype("datetime64[us]")))
        elif kind in "iufb" and not (kind != "f" and bool(column.isna().any())):
            columns.append(
                pl.Series(name, column.to_numpy(dtype=getattr(column.dtype, "numpy_dtype", column.dtype)))
            )
        else:
            columns.append(_series(name, column.astype(object).tolist(), what))
    return pl.DataFrame(columns)


def _from_records(source: Sequence[Any], what: str, ignore: Collection[str]) -> pl.DataFrame:
    if all(isinstance(row, Event) for row in source):
        typed = ("event",) if any(row.event is not None for row in source) else ()
        names = ("user_id", "item_id", "timestamp", "weight", *typed)
        return pl.DataFrame([_series(name, [getattr(row, name) for row in source], what) for name in names])
    rows = [_as_dict(row, number, what) for number, row in enumerate(source, start=1)]
    columns = dict.fromkeys(name for row in rows for name in row if name not in ignore)
    if not all(str(name).strip() for name in columns):
        raise DataError(f"{what}: an attribute has no name")
    return pl.DataFrame([_series(str(name), [row.get(name) for row in rows], what) for name in columns])


def _as_dict(row: Any, number: int, what: str) -> Mapping[str, Any]:
    if isinstance(row, Item):
        clash = {"item_id", "title", "text"} & row.attributes.keys()
        if clash:
            raise DataError(f"{what}: row {number} has an attribute called {min(clash)!r}; use another name")
        return {"item_id": row.item_id, "title": row.title, "text": row.text, **row.attributes}
    if isinstance(row, Mapping):
        return row
    raise DataError(f"{what}: row {number} is a {type(row).__name__}, not an Item, an Event or a dict")


def _series(name: str, values: list[Any], what: str) -> pl.Series:
    """Return Python values as a column of one type."""
    values = [_plain(value) for value in values]
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        values = [None if value is None else float(value) for value in values]
    elif kinds == {int, str} and name in ("user_id", "item_id"):
        values = [None if value is None else str(value) for value in values]
    elif len(kinds) > 1:
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        out = (
            ", or leave the column out: data.items_ignore, in Python ignore"
            if what.startswith("items")
            else ""
        )
        raise DataError(f"{what}: column {name!r} mixes {found}; make all its values of one type{out}")
    try:
        return pl.Series(name, values, strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        if kinds == {str} and not name.endswith("_id"):
            # Lone surrogates are in no encoding; the clean-up of texts would remove them anyway.
            return pl.Series(name, [v and v.encode("utf-8", "ignore").decode() for v in values], pl.String)
        raise DataError(f"{what}: column {name!r} has values that cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    """Return None for every kind of missing value, and lists for arrays and tuples."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, tuple | list | set | frozenset):
        return [
            _plain(part) for part in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        ]
    return None if type(value).__name__ in ("NAType", "NaTType") else value
