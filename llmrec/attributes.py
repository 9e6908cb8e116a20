"""The table of items, cleaned: ids, titles, texts, and attributes of the few kinds that are allowed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from llmrec.errors import DataError
from llmrec.protocols import Mask
from llmrec.rows import LoadReport, Policy, Problems, id_strings, renaming
from llmrec.text import neutralise, neutralise_series, without_markup, without_markup_series

TITLE_LIMIT = 300
TEXT_LIMIT = 4_000
ATTRIBUTE_LIMIT = 300
"""Longest title, text, and text of an attribute in characters."""

NAME_LIMIT = 100
MOST = 1_000
"""Longest name of an attribute in characters, and most attributes of a catalogue."""

CONTRACT = ("item_id", "title", "text")
ACTIVE = "__active__"
"""Columns that are no attributes; the last is in saved catalogues only."""

# A leading zero means a code ("007", a postal code), not a number.
_INTEGER = r"^[+-]?(0|[1-9]\d{0,17})$"
_NUMBER = r"^[+-]?(0|[1-9]\d*)?(\.\d*)?([eE][+-]?\d+)?$"
# As people write prices.
_AMOUNT = r"^\p{Sc}? ?-?\d{1,3}([., ]?\d{3})*([.,]\d+)? ?(\p{Sc}|[A-Z]{3})?$"
_NOT_A_NUMBER = r"(?i)^([+-]?(nan|inf|infinity))$"
_WORDS = (pl.String, pl.Categorical, pl.Enum, pl.Null)
_BOOLEANS = {"true": True, "false": False}


def kind_of(dtype: pl.DataType) -> str:
    """Return the kind of a cleaned column in words."""
    if dtype == pl.Boolean:
        return "boolean"
    if dtype.is_numeric():
        return "number"
    return "list of strings" if isinstance(dtype, pl.List) else "string"


def clean_text(text: str) -> str:
    """Return a text as attributes hold it, so that conditions compare like with like."""
    return neutralise(without_markup(text), ATTRIBUTE_LIMIT)


def clean_attribute(column: pl.Series, untyped: bool) -> pl.Series:
    """Return a column as string, integer, float, boolean or list of strings; absent values are null.

    Parameters
    ----------
    column
        Any column of the table of items.
    untyped
        Whether the column comes from a text file, so that numbers and booleans must be recognised.

    Raises
    ------
    DataError
        If the column holds anything else.
    """
    kind = column.dtype
    if kind in (pl.Categorical, pl.Enum, pl.Null):
        column = column.cast(pl.String)
    elif kind == pl.Date:
        column = column.dt.to_string("%Y-%m-%d")
    elif isinstance(kind, pl.Datetime):
        column = (column.dt.convert_time_zone("UTC") if kind.time_zone else column).dt.to_string(
            "%Y-%m-%dT%H:%M:%S"
        )
    if column.dtype == pl.String:
        return _recognise(column) if untyped else _texts(column)
    if kind == pl.Boolean:
        return column
    if kind.is_integer():
        return column.cast(pl.Float64 if kind in (pl.UInt64, pl.Int128) else pl.Int64)
    if kind.is_float() or kind.is_decimal():
        numbers = column.cast(pl.Float64)
        return numbers.set(~numbers.is_finite(), None)
    if isinstance(kind, pl.List | pl.Array) and (kind.inner in _WORDS or kind.inner.is_integer()):
        return _lists(column.cast(pl.List(pl.String)))
    raise DataError(
        f"attribute {column.name!r} holds {kind}; allowed are text, numbers, booleans, dates, lists of text"
    )


def _texts(column: pl.Series) -> pl.Series:
    clean = _cleaned(column, ATTRIBUTE_LIMIT)
    return clean.set(clean == "", None)


def _lists(column: pl.Series) -> pl.Series:
    table = column.alias("word").to_frame().with_row_index("row")
    flat = table.explode("word").drop_nulls("word")
    words = flat["word"].unique()
    clean = _cleaned(words, ATTRIBUTE_LIMIT)
    clean = clean.set(clean == "", None)
    flat = flat.with_columns(
        pl.col("word").replace_strict(words, clean, default=None, return_dtype=pl.String)
    )
    lists = flat.drop_nulls("word").group_by("row", maintain_order=True).agg("word")
    # An empty list says as little as no list: both are null here.
    return (
        table.select("row")
        .join(lists, on="row", how="left", maintain_order="left")["word"]
        .alias(column.name)
    )


def _recognise(column: pl.Series) -> pl.Series:
    text = column.str.strip_chars()
    text = text.set(text == "", None)
    known = text.drop_nulls()
    if known.is_empty():
        return _texts(column)
    numbers = known.filter(~known.str.contains(_NOT_A_NUMBER))
    if not numbers.is_empty():
        if len(numbers) == len(known) and bool(numbers.str.contains(_INTEGER).all()):
            return text.cast(pl.Int64)
        if bool((numbers.str.contains(_NUMBER) & numbers.str.contains(r"\d")).all()):
            floats = text.cast(pl.Float64, strict=False)
            return floats.set(~floats.is_finite(), None)
    if bool(known.str.to_lowercase().is_in(list(_BOOLEANS)).all()):
        return text.str.to_lowercase().replace_strict(_BOOLEANS, return_dtype=pl.Boolean)
    return _texts(column)


def _nearly_numbers(column: pl.Series) -> str:
    """Say what keeps a column of a text file from being numbers; empty unless nine in ten values are some."""
    text = column.str.strip_chars()
    known = text.filter(text != "")
    number = (known.str.contains(_NUMBER) & known.str.contains(r"\d")) | known.str.contains(_NOT_A_NUMBER)
    others = known.filter(~number)
    # Leading zeros are of codes.
    amounts = bool(known.str.contains(_AMOUNT).all())
    if (
        not len(others)
        or (10 * len(others) > len(known) and not amounts)
        or bool(others.str.contains(r"^\d+$").any())
    ):
        return ""
    shown = ", ".join(map(repr, others.unique(maintain_order=True)[:3].to_list()))
    if amounts:
        return f"attribute {column.name!r} is text, e.g. {shown}; write 5000.5 to compare by number"
    return (
        f"attribute {column.name!r} is text, since {len(others):,} of {len(known):,} values are no numbers: "
        f"{shown}; leave these empty to compare by number"
    )


def split_lists(frame: pl.DataFrame, lists: Mapping[str, str]) -> pl.DataFrame:
    """The table with texts as lists, by column and what stands between their parts.

    Raises
    ------
    DataError
        If there is no such column, or it holds no text.
    """
    for name, separator in lists.items():
        if isinstance(frame.schema.get(name), pl.List | pl.Null):
            continue  # some already, or nothing
        if frame.schema.get(name) != pl.String or not separator:
            raise DataError(f"items: there is no column of texts {name!r} to make lists of by {separator!r}")
        parts = frame[name].str.split(separator)
        frame = frame.with_columns(parts.list.eval(pl.element().str.strip_chars()).alias(name))
    return frame


def _like_lists(column: pl.Series) -> str:
    """Say how texts become lists where a fifth of them seem to be some; empty otherwise."""
    known = column.drop_nulls()
    parted = known.str.contains(r"\w\|\w").sum()
    if not parted or 5 * parted < len(known):
        return ""
    return (
        f"attribute {column.name!r} is text, and {parted:,} values have '|' in them: data.lists = "
        f"{{{column.name!r} = '|'}} makes them lists"
    )


def clean_name(name: str) -> str:
    """Return the name of an attribute as a catalogue has it: cleaned as texts are, since prompts say it."""
    return neutralise(name, NAME_LIMIT)


def _named(frame: pl.DataFrame, what: str) -> pl.DataFrame:
    """The table with clean names of attributes.

    Raises
    ------
    DataError
        If they are more than `MOST`, or nothing is left of one, or two have the same.
    """
    names = {name: clean_name(name) for name in frame.columns if name not in (*CONTRACT, ACTIVE)}
    check_count(len(names), what)
    taken: dict[str, str] = {}
    for name, clean in names.items():
        if not clean or clean in (*CONTRACT, ACTIVE):
            raise DataError(f"{what}: attribute {name!r:.120}: cleaned, its name is {clean!r}; rename it")
        if clean in taken:
            raise DataError(
                f"{what}: attributes {taken[clean]!r:.120} and {name!r:.120} are both {clean!r}, cleaned; "
                "rename one"
            )
        taken[clean] = name
    return frame.rename(names)


def check_count(attributes: int, what: str) -> None:
    """Raise DataError for more attributes than `MOST`."""
    if attributes > MOST:
        raise DataError(
            f"{what}: {attributes:,} attributes, and a catalogue has {MOST:,} at most; leave out those that "
            "say nothing (data.items_ignore, in Python ignore)"
        )


def clean_items(
    frame: pl.DataFrame,
    untyped: bool,
    policy: Policy | None,
    *,
    unique: bool = True,
    what: str = "items",
    kinds: Mapping[str, str] | None = None,
) -> tuple[pl.DataFrame, LoadReport]:
    """Return the cleaned columns item_id, title, text and attributes of the rows that are valid.

    `kinds` says of which kinds attributes are known to be.
    """
    missing = [name for name in ("item_id", "title") if name not in frame.columns]
    if missing:
        raise DataError(
            f"{what}: no column {' and no column '.join(map(repr, missing))}; the columns are "
            f"{', '.join(frame.columns)}; {renaming(frame.columns, missing, 'items')}"
        )
    frame = _named(frame, what)
    problems = Problems(what, frame.height)
    ids = id_strings(frame["item_id"], what)
    titles = _words(frame, "title", TITLE_LIMIT, what)
    texts = _words(frame, "text", TEXT_LIMIT, what)
    attributes, notes = [], []
    for name in frame.columns:
        if name in CONTRACT:
            continue
        try:
            if name == ACTIVE:
                raise DataError(f"attribute {name!r}: this name is taken; use another")
            unknown = untyped and (kinds or {}).get(name) != "string"
            attributes.append(clean_attribute(frame[name], unknown))
            if unknown and attributes[-1].dtype == pl.String and frame[name].dtype == pl.String:
                notes += [_nearly_numbers(frame[name]), _like_lists(frame[name])]
        except DataError as error:
            out = (
                f" (data.items_ignore = [{name!r}], in Python ignore, leaves it out)"
                if what == "items"
                else ""
            )
            problems.fatal.append(f"{error}{out}")
    problems.add("null or blank item_id", ids.is_null().to_numpy())
    problems.add("null or blank title", (titles == "").to_numpy())
    if unique:
        _add_duplicates(problems, ids)
    report = problems.finish(policy, filter(None, notes))
    columns = [ids.alias("item_id"), titles.alias("title"), texts.alias("text"), *attributes]
    return pl.DataFrame(columns).filter(pl.Series(problems.keep)), report


def _add_duplicates(problems: Problems, ids: pl.Series) -> None:
    rows = np.flatnonzero(problems.keep)
    repeated = ~ids.gather(rows).is_first_distinct().to_numpy()
    bad = np.zeros(len(ids), dtype=np.bool_)
    bad[rows[repeated]] = True
    shown = ", ".join(map(repr, ids.gather(rows[repeated][:5]).to_list()))
    problems.add("duplicate item_id", bad, examples=f", e.g. {shown}")


def align(old: pl.DataFrame, new: pl.DataFrame, kept: Mask) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return both tables with attributes of the same kinds; a column of nulls fits any kind.

    Only rows of the old table that are `kept`, shape (rows,), say of which kind an attribute is; where they
    say nothing, what the others have of another kind is dropped.

    Raises
    ------
    DataError
        If an attribute is of two kinds.
    """
    remaining = old.filter(pl.Series(kept))
    for name in set(old.columns) & set(new.columns):
        had, got = kind_of(old.schema[name]), kind_of(new.schema[name])
        if had == got:
            continue
        if new[name].null_count() == new.height:
            new = new.with_columns(pl.lit(None, old.schema[name]).alias(name))
        elif remaining[name].null_count() == remaining.height:
            old = old.with_columns(pl.lit(None, new.schema[name]).alias(name))
        else:
            raise DataError(f"new items: attribute {name!r} is a {had} in the catalogue, got a {got}")
    return old, new


def _words(frame: pl.DataFrame, name: str, limit: int, what: str) -> pl.Series:
    """Return a column of texts, neutralised, "" for null."""
    if name not in frame.columns:
        return pl.Series(name, [""], dtype=pl.String).new_from_index(0, frame.height)
    column = frame[name]
    if name == "text" and isinstance(column.dtype, pl.List) and column.dtype.inner in _WORDS:
        # Paragraphs.
        column = column.cast(pl.List(pl.String)).list.drop_nulls().list.join(" ")
    if column.dtype.is_float():
        column = column.fill_nan(None)
    if not (column.dtype.is_numeric() or column.dtype in _WORDS):
        raise DataError(f"{what}: column {name!r} must hold text, got {column.dtype}")
    return _cleaned(column.cast(pl.String), limit).fill_null("")


def _cleaned(texts: pl.Series, limit: int) -> pl.Series:
    return neutralise_series(without_markup_series(texts), limit)
