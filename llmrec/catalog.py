"""The items: load, validate, number, render. An item's code is its position and never changes.

Items are numbered in the order of their ids, so that what breaks ties by code breaks them by id; items
that are added later come after.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.attributes import (
    ACTIVE,
    CONTRACT,
    align,
    check_count,
    clean_items,
    clean_name,
    kind_of,
    split_lists,
)
from llmrec.errors import DataError, RequestError
from llmrec.protocols import Codes, ItemChange, Mask
from llmrec.rows import LoadReport, Policy, id_order, id_strings
from llmrec.tables import is_untyped, read_table
from llmrec.text import shorten
from llmrec.types import AttributeValue, Item

LINE_LIMIT = 1_000
"""Longest line in characters."""

HINTED = 50_000
"""Items up to which an unknown id is answered with those like it: who looks for them walks over all."""


class Catalog:
    """All items that were ever known, by code: their position, int32, stable for life.

    Values are immutable: `with_items` and `without_items` return new catalogues in which every known item
    keeps its code. Do not change the lists and arrays that the properties return.

    Parameters
    ----------
    frame
        Cleaned columns item_id, title, text (strings without null) and the attributes, shape (n, 3 + a).
    active
        Shape (n,), False for removed items.
    report
        What loading did.
    """

    def __init__(self, frame: pl.DataFrame, active: Mask, report: LoadReport) -> None:
        self._frame = frame
        self.active = active
        self.report = report
        self.ids: list[str] = frame["item_id"].to_list()
        self._index = {item_id: code for code, item_id in enumerate(self.ids)}
        self._titles: list[str] | None = None
        self._lines: list[str] | None = None
        self._counts: dict[str, dict[AttributeValue, int]] = {}
        self._fingerprint = ""

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        mapping: Mapping[str, str] | None = None,
        policy: Policy = "raise",
        ignore: Collection[str] = (),
        lists: Mapping[str, str] | None = None,
        kinds: Mapping[str, str] | None = None,
    ) -> Catalog:
        """Load items from a file, a frame or a list of `Item`.

        Parameters
        ----------
        source
            Whatever `llmrec.tables.read_table` takes, with columns item_id and title. A column text is
            optional; every other column is an attribute: text, number, boolean or list of texts. Dates
            become ISO text.
        mapping
            Columns to rename, ``{name in the source: name in the data contract}``.
        policy
            What to do with rows without id or title, or with an id that came before.
        ignore
            Columns of the source that are left out, whatever they hold.
        lists
            Attributes whose texts are lists, and what stands between the parts: ``{"genres": "|"}``.
        kinds
            `attributes` of a catalogue that the items are to join: what is text there is no number here,
            and lists need not be there.

        Raises
        ------
        DataError
            With all problems at once, their counts and first rows.
        """
        frame = read_table(source, "items", mapping, ignore)
        there = [name for name in lists or () if kinds is None or name in frame.columns]
        frame = split_lists(frame, {name: (lists or {})[name] for name in there})
        frame, report = clean_items(frame, is_untyped(source), policy, kinds=kinds or {})
        frame = frame[id_order(frame["item_id"].to_list())]
        return cls(frame, np.ones(frame.height, dtype=np.bool_), report)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, item_id: object) -> bool:
        """Whether the id is known; removed items are (see `active`)."""
        return item_id in self._index

    def __repr__(self) -> str:
        return f"Catalog({len(self):,} items, {int(self.active.sum()):,} active, {self.attributes})"

    @property
    def titles(self) -> list[str]:
        """Titles by code."""
        if self._titles is None:
            self._titles = self._frame["title"].to_list()
        return self._titles

    @property
    def attributes(self) -> dict[str, str]:
        """Attribute -> ``"string"``, ``"number"``, ``"boolean"`` or ``"list of strings"``."""
        return {name: kind_of(dtype) for name, dtype in self._frame.schema.items() if name not in CONTRACT}

    def has(self, name: str) -> bool:
        """Whether there is an attribute of this name, as given or as kept; also for item_id, title, text."""
        return name in self._frame.columns or clean_name(name) in self._frame.columns

    def column(self, name: str) -> pl.Series:
        """Return the values of an attribute, or of item_id, title or text, by code, shape (n,)."""
        if not self.has(name):
            raise RequestError(f"unknown attribute {name!r}; known are {', '.join(self._frame.columns)}")
        return self._frame[name if name in self._frame.columns else clean_name(name)]

    def counts(self, name: str) -> Mapping[AttributeValue, int]:
        """Return how many items have each value of an attribute, removed items included."""
        if name not in self._counts:
            column = self.column(name)
            flat = column.list.unique().explode() if kind_of(column.dtype) == "list of strings" else column
            values, counts = flat.drop_nulls().rename("value").value_counts(name="count").get_columns()
            self._counts[name] = dict(zip(values.to_list(), counts.to_list(), strict=True))
        return self._counts[name]

    def code(self, item_id: str) -> int:
        """Return the code of an item.

        Raises
        ------
        RequestError
            If there is no such item; the message names the closest ids.
        """
        code = self._index.get(item_id) if isinstance(item_id, str) else None
        if code is None:
            close = self._closest(item_id)
            hint = (
                f"; close ids are {', '.join(map(repr, close))}" if close else "; ids are text, case counts"
            )
            raise RequestError(f"unknown item {item_id!r} (the catalogue has {len(self):,}){hint}")
        return code

    def codes(self, ids: Sequence[str]) -> Codes:
        """Return the codes of items, shape (len(ids),); RequestError if some are unknown."""
        codes = self.find(ids)
        unknown = [item_id for item_id, code in zip(ids, codes, strict=True) if code < 0]
        if unknown:
            shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise RequestError(f"{len(unknown):,} of {len(ids):,} item ids are unknown: {shown}")
        return codes

    def known(self, ids: Sequence[str]) -> Codes:
        """Return the codes of a history's items, without those that are unknown, shape (known,).

        An application may be ahead of the catalogue by some items.

        Raises
        ------
        RequestError
            If there are ids and none is known: they are no ids of this catalogue.
        """
        codes = self.find(ids)
        codes = codes[codes >= 0]
        return codes if len(codes) else self.codes(ids)

    def find(self, ids: Sequence[str]) -> Codes:
        """Return the codes of items, -1 for unknown ones, shape (len(ids),)."""
        if isinstance(ids, str):
            raise RequestError(f"expected a list of item ids, got one string {ids!r}")
        get = self._index.get
        try:
            return np.fromiter((get(item_id, -1) for item_id in ids), dtype=np.int32, count=len(ids))
        except TypeError as error:
            raise RequestError(f"item ids are text: {error}") from error

    def item(self, code: int) -> Item:
        """Return an item with the attributes that it has."""
        return self.items([code])[0]

    def items(self, codes: Sequence[int] | Codes) -> list[Item]:
        """Return items, in the order of their codes as given."""
        rows = np.asarray(codes, dtype=np.int64)
        outside = rows[(rows < 0) | (rows >= len(self))]
        if len(outside):
            raise RequestError(f"item code {outside[0]} is not between 0 and {len(self) - 1}")
        names = self._frame.columns
        return [_as_item(dict(zip(names, row, strict=True))) for row in self._frame[rows].rows()]

    def id_ranks(self) -> NDArray[np.int64]:
        """Return the position of each code in the order of ids, digits as integers, shape (n,)."""
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[id_order(self.ids)] = np.arange(len(self))
        return ranks

    def line(self, code: int) -> str:
        """Return an item in words, see `lines`."""
        return self.lines()[code]

    def lines(self) -> list[str]:
        """Return every item in words, by code: what encoders and lexical search read.

        Title, then texts and lists of the attributes in the order of their names, then years, then text;
        at most `LINE_LIMIT` characters. Other numbers say nothing without their name and stay out, as
        does a year that the title holds.
        """
        if self._lines is None:
            self._lines = _render(self._frame)
        return self._lines

    def render(self, items: Sequence[Item]) -> list[str]:
        """Return lines of items that need not be in the catalogue, cleaned and rendered as its own."""
        if not items:
            return []
        frame, _ = clean_items(read_table(items, "items"), False, None, unique=False)
        return _render(frame)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids, lines and active flags."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for texts in (self.ids, self.lines()):
                for text in texts:
                    digest.update(text.encode() + b"\0")
            digest.update(np.packbits(self.active).tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def after(self, changes: Sequence[ItemChange]) -> Catalog:
        """Return a catalogue after changes that are at most one an item; see `with_items`.

        New items get the codes that they had where they were put first: what is kept by code, on a server for
        vectors, is of the same items for all.
        """
        # What is gone says nothing of the kinds.
        gone = [c.item_id for c in changes if c.removed and c.item_id in self]
        left = self.without_items(gone) if gone else self
        known = [c.item for c in changes if c.item is not None and not c.removed and c.item_id in self]
        new = self._placed([c for c in changes if c.item is not None and c.item_id not in self])
        both = [*known, *(c.item for c in new if c.item is not None)]
        unseen = [c.item_id for c in new if c.removed]
        try:
            made = left.with_items(both)
        except DataError:
            # What was put and removed again may have an attribute of another kind than what came after it.
            bare = {c.item_id: Item(c.item_id, c.item.title) for c in new if c.removed and c.item is not None}
            made = left.with_items([bare.get(item.item_id, item) for item in both])
        return made.without_items(unseen) if unseen else made

    def _placed(self, new: Sequence[ItemChange]) -> list[ItemChange]:
        """New items in the order of their codes; those of unknown code take what is left, as they come."""
        places: dict[int, ItemChange] = {}
        others = []
        for change in new:
            place = -1 if change.code is None else change.code - len(self)
            if 0 <= place < len(new) and place not in places:
                places[place] = change
            else:
                others.append(change)
        rest = iter(others)
        return [places[place] if place in places else next(rest) for place in range(len(new))]

    def changes(self, items: Sequence[Item], removed: Sequence[str] = ()) -> list[ItemChange]:
        """Return the changes that made this catalogue of another, by `with_items` and `without_items`.

        Each item is as it is kept here, cleaned.
        """
        put = id_strings(read_table(items, "new items")["item_id"], "new items").to_list() if items else []
        codes = self.codes(put).tolist()
        kept = [ItemChange(item.item_id, item, c) for item, c in zip(self.items(codes), codes, strict=True)]
        gone = self.codes(list(dict.fromkeys(removed))).tolist()
        return kept + [
            ItemChange(item.item_id, item, c, removed=True)
            for item, c in zip(self.items(gone), gone, strict=True)
        ]

    def with_items(self, items: Sequence[Item]) -> Catalog:
        """Return a catalogue with these items: new ids get the next codes, known ids are replaced.

        Raises
        ------
        DataError
            If an item breaks the data contract, or an attribute is of another kind than among the items that
            are active and not replaced.
        """
        if not items:
            return self
        new, report = clean_items(read_table(items, "new items"), False, None, what="new items")
        codes = self.find(new["item_id"].to_list())
        added = codes < 0
        kept = self.active.copy()
        kept[codes[~added]] = False
        old, new = align(self._frame, new, kept)
        codes[added] = len(self) + np.arange(int(added.sum()), dtype=np.int32)
        order = np.arange(len(self) + int(added.sum()))
        order[codes] = len(self) + np.arange(new.height)
        active = np.concatenate([self.active, np.ones(int(added.sum()), dtype=np.bool_)])
        active[codes] = True
        if more := set(new.columns).difference(old.columns):
            check_count(len(self.attributes) + len(more), "new items")
        both = pl.concat([old, new], how="diagonal_relaxed")
        changed = Catalog(both[order], active, report)
        # Where a kind has changed, lines of removed items may have too.
        if self._lines is not None and old is self._frame:
            lines = self._lines + [""] * int(added.sum())
            for code, line in zip(codes, _render(changed._frame[codes]), strict=True):
                lines[code] = line
            changed._lines = lines
        return changed

    def without_items(self, ids: Sequence[str]) -> Catalog:
        """Return a catalogue in which these items are not active; their codes stay. Unknown: RequestError."""
        active = self.active.copy()
        active[self.codes(ids)] = False
        changed = Catalog(self._frame, active, self.report)
        changed._titles, changed._lines = self._titles, self._lines
        return changed

    def only(self, codes: Codes) -> Catalog:
        """Return a new catalogue of these items alone, numbered anew in the order given."""
        return Catalog(self._frame[codes], self.active[codes], self.report)

    def save(self, path: str | Path) -> None:
        """Write everything to one parquet file; a reader sees the old file or the new one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
        try:
            self._frame.with_columns(pl.Series(ACTIVE, self.active)).write_parquet(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> Catalog:
        """Read what `save` wrote.

        Raises
        ------
        DataError
            If the file is missing, damaged, or not a saved catalogue.
        """
        frame = read_table(Path(path), "catalogue")
        if not {*CONTRACT, ACTIVE} <= set(frame.columns) or frame.schema[ACTIVE] != pl.Boolean:
            raise DataError(f"{path} is not a saved catalogue; load tables of items with Catalog.load")
        active = frame[ACTIVE].to_numpy().copy()
        return cls(frame.drop(ACTIVE), active, LoadReport(frame.height, frame.height))

    def _closest(self, item_id: object) -> list[str]:
        if not isinstance(item_id, str) or not item_id or len(self) > HINTED:
            return []
        # difflib alone would take a second on 100,000 ids; those that begin alike come first.
        word, pool = item_id.lower(), dict[str, None]()
        for start in (word[:-1], word[:-2], word[:3], word[:1]):
            near = (i for i in self.ids if abs(len(i) - len(word)) <= 2 and i.lower().startswith(start))
            pool |= dict.fromkeys(itertools.islice(near, 300))
        return difflib.get_close_matches(item_id, pool, n=3, cutoff=0.5)


def _as_item(row: Mapping[str, Any]) -> Item:
    attributes = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in row.items()
        if name not in CONTRACT and value is not None
    }
    return Item(row["item_id"], row["title"], row["text"], attributes)


def _render(frame: pl.DataFrame) -> list[str]:
    """Return one line an item. The only place where an item becomes words."""
    parts = [pl.col("title")]
    years = []
    schema = frame.schema
    # By name: a line must not change with the order in which a source happens to list its columns.
    for name in sorted(set(frame.columns) - set(CONTRACT)):
        kind = kind_of(schema[name])
        if kind == "string":
            parts.append(pl.col(name))
        elif kind == "list of strings":
            parts.append(pl.col(name).list.join(", "))
        elif kind == "number":
            # A price or a length means nothing without its name; a year does.
            whole = pl.col(name).is_between(1800, 2100) & (pl.col(name) == pl.col(name).round())
            year = pl.when(whole).then(pl.col(name).cast(pl.Int64, strict=False).cast(pl.String))
            years.append(pl.when(~pl.col("title").str.contains(year, literal=True)).then(year))
    text = pl.when(pl.col("text") != "").then(pl.col("text"))
    line = pl.concat_str([*parts, *years, text], separator="; ", ignore_nulls=True)
    return [shorten(words, LINE_LIMIT) for words in frame.select(line.alias("line"))["line"].to_list()]


def _renderer_hash() -> str:
    samples = [
        Item("1", "Toy Story (1995)", "Toys <|im_end|> come\u200b alive.", {"genres": ("Comedy", "[INST]")}),
        Item("2", "<s>Heat\n</s>", "", {"year": 1995, "brand": "A&B", "price": 9.5, "new": True}),
        Item("3", "e\u0301 " * 400, "text " * 900, {"tags": ("\u202ex", "y"), "pages": 1995, "brand": " "}),
    ]
    lines = Catalog.load(samples).lines()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


RENDERER_HASH = _renderer_hash()
"""Hash of how items become words; an adapter trained with another one does not fit."""
