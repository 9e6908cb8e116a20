"""Time stamps of every spelling to whole seconds since 1970."""

from __future__ import annotations

import numpy as np
import polars as pl

from llmrec.errors import DataError
from llmrec.protocols import Mask
from llmrec.rows import describe_rows, first_rows

_NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
_ISO = (
    r"^(?<day>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?<time>\d{2}:\d{2}(?::\d{2})?)(?:[.,]\d+)?)?"
    r" ?(?<zone>Z|UTC|[+-](?:0\d|1[0-4])(?::?[0-5]\d)?)?$"
)
# 1e11 seconds are the year 5138, 1e11 milliseconds the year 1973.
_UNITS = (
    (1e17, 1_000_000_000, "nanoseconds"),
    (1e14, 1_000_000, "microseconds"),
    (1e11, 1_000, "milliseconds"),
)


def to_seconds(column: pl.Series, what: str, written: str | None = None) -> tuple[pl.Series, str]:
    """Return whole seconds, null where a value cannot be read, and a note (empty if there is none).

    Parameters
    ----------
    column
        Numbers, datetimes, dates, ISO text, or numbers as text. A column of which every value is
        too large for seconds is read as milli-, micro- or nanoseconds; the note says so. Parts of a second
        are cut off.
    what
        Name of the table in messages.
    written
        How text is written, as strptime has it, if that is another way; UTC, unless it has a zone.

    Raises
    ------
    DataError
        If the column mixes formats or units, or is of another type.
    """
    kind = column.dtype
    if isinstance(kind, pl.Datetime):
        return column.dt.epoch("s"), ""
    if kind == pl.Date:
        return column.cast(pl.Datetime("us")).dt.epoch("s"), ""
    if kind == pl.String:
        text = column.str.strip_chars()
        text = text.set(text == "", None)
        if written is not None:
            return _as_written(text, written, what), ""
        is_number = text.str.contains(_NUMBER).fill_null(False)
        if not bool(is_number.any()):
            return _from_iso(text, what), ""
        parts = _iso_parts(text)
        _same_format(what, {"numbers": is_number, "ISO dates": parts["day"].is_not_null()})
        whole = text.cast(pl.Int64, strict=False)
        exact = bool((whole.is_not_null() | ~is_number).all())
        return _from_numbers(whole if exact else text.cast(pl.Float64, strict=False), what)
    if kind.is_integer() or kind.is_float():
        return _from_numbers(column, what)
    if kind == pl.Null:
        return column.cast(pl.Int64), ""
    raise DataError(f"{what}: column 'timestamp' holds {kind}; allowed are seconds, datetimes and ISO text")


def _as_written(text: pl.Series, written: str, what: str) -> pl.Series:
    if "%Z" in written:
        raise DataError(
            f"{what}: data.timestamp_format has %Z; names of zones are not read, write them as %z"
        )
    try:
        return text.str.to_datetime(written, strict=False, time_unit="us").dt.epoch("s")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{what}: data.timestamp_format = {written!r} reads no time: {error}") from error


def _from_numbers(column: pl.Series, what: str) -> tuple[pl.Series, str]:
    if column.dtype.is_float():
        column = column.set(~(column.is_finite() & (column.abs() < 2**62)), None).floor()
    seconds = column.cast(pl.Int64, strict=False)
    if _are_dates(seconds):
        raise DataError(
            f"{what}: every value of column 'timestamp' is a date such as {seconds.drop_nulls()[0]}, and as "
            "seconds since 1970 all would be in August 1970: write dates as 2023-11-24"
        )
    for limit, divisor, unit in _UNITS:
        large = (seconds.abs() > limit).fill_null(False)
        if not bool(large.any()):
            continue
        _same_format(what, {unit: large, "smaller units": ~large & seconds.is_not_null()})
        return seconds // divisor, f"timestamp was read as {unit}"
    return seconds, ""


def _are_dates(numbers: pl.Series) -> bool:
    """Whether all are dates of this age, written without dashes."""
    there = numbers.drop_nulls()
    if not len(there) or not bool(there.is_between(19_700_101, 21_001_231).all()):
        return False
    return bool(there.cast(pl.String).str.to_date("%Y%m%d", strict=False).is_not_null().all())


def _iso_parts(text: pl.Series) -> pl.DataFrame:
    parts: pl.DataFrame = text.str.extract_groups(_ISO).struct.unnest()
    return parts


def _from_iso(text: pl.Series, what: str) -> pl.Series:
    parts = _iso_parts(text)
    dated, timed, zoned = (parts[name].is_not_null() for name in ("day", "time", "zone"))
    _same_format(
        what,
        {
            "dates without time": dated & ~timed,
            "times without zone": timed & ~zoned,
            "times with zone": timed & zoned,
        },
    )
    clock = pl.col("time").fill_null("00:00")
    clock = pl.when(clock.str.len_bytes() == 5).then(clock + ":00").otherwise(clock)
    moment = (pl.col("day") + "T" + clock).str.to_datetime("%Y-%m-%dT%H:%M:%S", time_unit="us", strict=False)
    zone = pl.col("zone").str.replace_all(r"[^+\-0-9]", "")
    hours, rest = zone.str.slice(1, 2), zone.str.slice(3, 2)
    minutes = hours.cast(pl.Int64, strict=False) * 60 + rest.cast(pl.Int64, strict=False).fill_null(0)
    offset = pl.when(zone.str.starts_with("-")).then(-minutes).otherwise(minutes).fill_null(0) * 60
    return parts.select((moment.dt.epoch("s") - offset).alias("timestamp"))["timestamp"]


def _same_format(what: str, formats: dict[str, pl.Series]) -> None:
    """Raise if rows of more than one format are there: which of them is meant cannot be known."""
    masks: dict[str, Mask] = {name: rows.to_numpy() for name, rows in formats.items()}
    found = {name: np.flatnonzero(mask) for name, mask in masks.items() if mask.any()}
    if len(found) > 1:
        listed = "; ".join(describe_rows(name, len(rows), first_rows(rows)) for name, rows in found.items())
        raise DataError(f"{what}: column 'timestamp' mixes formats: {listed}; convert them to one")
