"""What is wrong with the rows of a table: collected, counted, and raised or dropped at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.errors import DataError
from llmrec.protocols import Mask

Policy = Literal["raise", "drop"]
"""What to do with rows that break the data contract: raise one error for all, or drop and count them."""

SHOWN = 5
"""How many row numbers and ids a message shows."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did.

    Parameters
    ----------
    rows_in, rows_kept
        Rows of the source and rows that were taken over.
    dropped
        Reason -> number of rows.
    rows
        Reason -> the first row numbers, counted from 1 for the first data row.
    notes
        Anything else worth knowing, in words.
    """

    rows_in: int
    rows_kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"kept {self.rows_kept:,} of {self.rows_in:,} rows"]
        for reason, count in self.dropped.items():
            lines.append(f"dropped {describe_rows(reason, count, self.rows.get(reason, ()))}")
        return "; ".join([*lines, *self.notes])


class Problems:
    """Collects what is wrong with the rows of one table; a row counts for its first reason only."""

    def __init__(self, what: str, rows: int) -> None:
        self.what = what
        self.keep: Mask = np.ones(rows, dtype=np.bool_)
        self.dropped: dict[str, int] = {}
        self.rows: dict[str, tuple[int, ...]] = {}
        self.fatal: list[str] = []
        self._errors: list[str] = []

    def add(self, reason: str, bad: Mask, *, wanted: bool = False, examples: str = "") -> None:
        """Take the rows where `bad`, shape (rows,), out; `wanted` if that is no mistake of the data."""
        found = np.flatnonzero(bad & self.keep)
        if not len(found):
            return
        self.keep[found] = False
        self.dropped[reason] = len(found)
        self.rows[reason] = first_rows(found)
        if not wanted:
            self._errors.append(describe_rows(reason, len(found), self.rows[reason]) + examples)

    def finish(self, policy: Policy | None, notes: Iterable[str] = (), *, empty: bool = False) -> LoadReport:
        """Return the report, or raise everything at once as one DataError; no row may be left if `empty`.

        None raises as well, where nobody could choose to drop rows.
        """
        if policy is not None:
            check_policy(policy)
        errors = self.fatal + (self._errors if policy != "drop" else [])
        if errors:
            advice = "; correct them, or drop these rows with the policy 'drop' (--policy drop, data.policy)"
            advice = "" if self.fatal or policy is None else advice
            raise DataError(f"{self.what}: " + "; ".join(errors) + advice)
        kept = int(self.keep.sum())
        report = LoadReport(len(self.keep), kept, self.dropped, self.rows, tuple(notes))
        if not kept and not empty:
            raise DataError(f"{self.what}: no rows left: {report}")
        return report


def renaming(columns: Sequence[str], missing: Sequence[str], table: str) -> str:
    """Say how columns are given the names that are missing."""
    if len(columns) == 1 and (found := [s for s in (";", "\t", "|", ",") if s in columns[0]]):
        return f"they seem to be separated by {found[0]!r}: save the file with commas, or tabs as .tsv"
    bare = {"".join(filter(str.isalnum, name)).lower(): name for name in reversed(columns)}
    like = next((bare[n.replace("_", "")] for n in missing if n.replace("_", "") in bare), None)
    which = next(n for n in missing if like is None or bare.get(n.replace("_", "")) == like)
    theirs = like or "their name"
    return (
        f"rename one: data.{table}_mapping = {{{theirs!r} = {which!r}}} in a file for --config, in Python "
        f"config={{'data': {{'{table}_mapping': {{{theirs!r}: {which!r}}}}}}}"
    )


def check_policy(policy: str) -> None:
    """Raise DataError unless `policy` is one of the two."""
    if policy not in ("raise", "drop"):
        raise DataError(f"policy must be 'raise' or 'drop', got {policy!r}")


def first_rows(found: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the first few row numbers, from 1, of positions, shape (n,)."""
    return tuple(int(row) + 1 for row in found[:SHOWN])


def describe_rows(reason: str, count: int, rows: Sequence[int]) -> str:
    """Return e.g. ``3 rows: blank title (rows 2, 7, 9)``."""
    if not rows:
        return f"{count:,} rows: {reason}"
    numbers = ", ".join(str(row) for row in rows) + (", ..." if count > len(rows) else "")
    return f"{count:,} row{'s' * (count != 1)}: {reason} (row{'s' * (count != 1)} {numbers})"


def id_strings(column: pl.Series, what: str) -> pl.Series:
    """Return ids as strings: text as it is, 42 and 42.0 as ``"42"``, null, NaN and blank as null.

    Raises
    ------
    DataError
        If the column holds anything but text and whole numbers.
    """
    kind = column.dtype
    if kind.is_float():
        column = column.fill_nan(None)
        whole = column.drop_nulls()
        if not bool((whole.is_finite() & (whole == whole.round()) & (whole.abs() < 2**53)).all()):
            raise DataError(f"{what}: column {column.name!r} must hold text or whole numbers, got fractions")
        column = column.cast(pl.Int64)
    elif not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise DataError(f"{what}: column {column.name!r} must hold text or whole numbers, got {kind}")
    text = column.cast(pl.String)
    if bool(text.str.contains("\0", literal=True).any()):
        raise DataError(
            f"{what}: column {column.name!r} has ids with the character NUL, which databases refuse"
        )
    return text.set(text.str.strip_chars() == "", None)


def id_order(ids: Sequence[str]) -> list[int]:
    """Return the positions of ids in their order; where all are digits they compare as integers."""
    if all(item_id.isascii() and item_id.isdigit() for item_id in ids):
        # Length without zeros, then text: the order of integers for digits of any length.
        bare = [item_id.lstrip("0") for item_id in ids]
        return sorted(range(len(ids)), key=lambda row: (len(bare[row]), bare[row], ids[row]))
    return sorted(range(len(ids)), key=ids.__getitem__)
