"""Search as you type: the items whose titles begin as the typed words do."""

from __future__ import annotations

import polars as pl

from llmrec.catalog import Catalog
from llmrec.protocols import Codes, Floats

TYPED_LIMIT = 200
"""Longest text that is read, in characters."""


class TitleIndex:
    """Titles of a catalogue as they are compared: without case, accents and punctuation.

    Parameters
    ----------
    catalog
        Removed items are never found.
    popularity
        What comes first among equals, shape (items,).
    """

    def __init__(self, catalog: Catalog, popularity: Floats) -> None:
        self.catalog = catalog
        self._frame = pl.DataFrame(
            {
                "code": pl.int_range(len(catalog), dtype=pl.Int32, eager=True),
                # The space before the first word marks its beginning.
                "title": " " + _plain(catalog.column("title")),
                "popularity": popularity,
            }
        ).filter(pl.Series(catalog.active))

    def find(self, text: str, k: int) -> Codes:
        """Return codes of up to k items, shape (n,); without any words the most popular ones.

        Every typed word is the beginning of a word of the title. First comes the item whose id was typed,
        then titles that begin with the whole text, then the others, then titles that hold it inside a word
        (scripts without spaces have no other beginnings); the popular ones first.
        """
        # Half of a surrogate pair is no text that could be compared.
        typed = _plain(pl.Series([text[:TYPED_LIMIT].encode("utf-8", "replace").decode()])).item()
        words = typed.split()
        title = pl.col("title")
        begins = title.str.starts_with(f" {typed}")
        each = pl.all_horizontal([title.str.contains(f" {word}", literal=True) for word in words] or [True])
        held = title.str.contains(typed, literal=True)
        named = pl.lit(False)
        if text in self.catalog:
            named = pl.col("code") == self.catalog.code(text)
        tier = pl.when(named).then(0).when(begins).then(1).when(each).then(2).when(held).then(3)
        found = (
            self._frame.lazy()
            .with_columns(tier.alias("tier"))
            .drop_nulls("tier")
            .sort("tier", "popularity", "code", descending=[False, True, False])
            .head(k)
            .collect()
        )
        codes: Codes = found["code"].to_numpy()
        return codes


def _plain(texts: pl.Series) -> pl.Series:
    """Texts in small letters without accents, words parted by single spaces."""
    return (
        texts.str.normalize("NFKD")
        .str.replace_all(r"\p{M}", "")
        .str.to_lowercase()
        .str.replace_all(r"[^\p{L}\p{N}]+", " ")
        .str.strip_chars(" ")
    )
