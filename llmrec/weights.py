"""How much an event counts: rating threshold, weight column, weights by event type."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.errors import DataError, RequestError
from llmrec.protocols import Floats
from llmrec.rows import Problems

HEAVIEST = 1000
"""Largest weight of an event. Sums of squares of much larger ones are too coarse in float32."""


def event_weight(
    frame: pl.DataFrame,
    problems: Problems,
    rating_threshold: float | None,
    event_weights: Mapping[str, float] | None,
) -> Floats:
    """Return the weight of each row, shape (rows,), and take rows out that are no positive events."""
    weight = np.ones(frame.height, dtype=np.float64)
    if rating_threshold is not None:
        rating = _numbers(frame, "rating", "rating_threshold")
        problems.add("rating is not a number", np.isnan(rating))
        problems.add(f"rating below {rating_threshold:g}", rating < rating_threshold, wanted=True)
    if "weight" in frame.columns:
        weight *= _numbers(frame, "weight", "")
    if event_weights is not None:
        factor = _type_weights(frame, event_weights, problems)
        problems.add("event type of weight 0", factor <= 0, wanted=True)
        weight *= factor
    with np.errstate(over="ignore"):
        single = weight.astype(np.float32)
    problems.add("weight is not finite and above 0", ~(np.isfinite(single) & (single > 0)))
    problems.add(
        f"weight above {HEAVIEST:,}: it is how many events one counts as, so divide amounts and times",
        np.isfinite(single) & (single > HEAVIEST),
    )
    return single


def type_weight(event: str | None, weights: Mapping[str, float] | None) -> float:
    """What the weight of a live event is multiplied by: 1 where no type is given, or no weights.

    Raises
    ------
    RequestError
        If the type has no weight.
    """
    if event is None or weights is None:
        return 1.0
    if not isinstance(event, str) or event not in weights:
        listed = ", ".join(map(repr, weights))
        raise RequestError(f"event {event!r:.100} has no weight; data.event_weights lists {listed}")
    return float(weights[event])


def _type_weights(
    frame: pl.DataFrame, weights: Mapping[str, float], problems: Problems
) -> NDArray[np.float64]:
    if "event" not in frame.columns:
        raise DataError(f"events: event_weights needs a column 'event'; have {', '.join(frame.columns)}")
    if not all(isinstance(weight, int | float) and np.isfinite(weight) for weight in weights.values()):
        raise DataError(f"events: event_weights must be finite numbers, got {dict(weights)}")
    types = frame["event"].cast(pl.String)
    problems.add("no event type", types.is_null().to_numpy())
    unlisted = types.filter(~types.is_in(list(weights)) & types.is_not_null())
    if len(unlisted):
        names = ", ".join(map(repr, unlisted.unique(maintain_order=True)[:5].to_list()))
        raise DataError(
            f"events: {len(unlisted):,} rows have an event type without a weight: {names}; "
            f"event_weights lists {', '.join(map(repr, weights))}; add it, with 0 to leave the rows out"
        )
    factors = {name: float(weight) for name, weight in weights.items()}
    return types.replace_strict(factors, default=0.0, return_dtype=pl.Float64).to_numpy()


def _numbers(frame: pl.DataFrame, name: str, reason: str) -> NDArray[np.float64]:
    """Return a column as float64, NaN for what is no number."""
    if name not in frame.columns:
        raise DataError(
            f"events: {reason} needs a column {name!r}; the columns are {', '.join(frame.columns)}"
        )
    column = frame[name]
    if not (column.dtype.is_numeric() or column.dtype in (pl.String, pl.Null)):
        raise DataError(f"events: column {name!r} must hold numbers, got {column.dtype}")
    return column.cast(pl.Float64, strict=False).fill_null(float("nan")).to_numpy()
