"""What conditions on items can name: the attributes of a catalogue and their values."""

from __future__ import annotations

from typing import Any

import polars as pl

from llmrec.catalog import Catalog

FREQUENT = 20
"""Values that are listed for an attribute."""


def summarise(catalog: Catalog) -> dict[str, dict[str, Any]]:
    """Return the kind of each attribute, and its range and most frequent values among active items."""
    summary: dict[str, dict[str, Any]] = {}
    for name, kind in catalog.attributes.items():
        values = catalog.column(name).filter(pl.Series(catalog.active)).drop_nulls()
        about: dict[str, Any] = {"kind": kind, "items": len(values)}
        if kind == "number":
            about |= {"min": values.min(), "max": values.max()}
        if kind == "list of strings":
            values = values.list.unique().explode().drop_nulls()
        counts = (
            values.rename("value")
            .value_counts(name="items")
            .sort(["items", "value"], descending=[True, False])
        )
        about |= {"different": len(counts), "frequent": counts.head(FREQUENT).to_dicts()}
        summary[name] = about
    return summary
