"""Rules in codes: the `where` grammar as a mask over the catalogue, what is allowed, pins and caps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from llmrec.attributes import CONTRACT, TEXT_LIMIT, TITLE_LIMIT, clean_text, kind_of
from llmrec.catalog import Catalog
from llmrec.errors import RequestError
from llmrec.protocols import Codes, Mask
from llmrec.text import neutralise, without_markup
from llmrec.types import AttributeValue, Request

OPERATORS = ("in", "not", "all", "gte", "gt", "lte", "lt", "exists", "match")

_MAX_DEPTH = 20
_MAX_CONDITIONS = 100
_MAX_MATCHES = 5  # each reads a text of every item
_DATE = re.compile(r"\d{4}(?:-\d{2}(?:-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?)?)?)?")
_COMPARE: dict[str, Callable[[pl.Series, Any], pl.Series]] = {
    "gte": lambda column, bound: column >= bound,
    "gt": lambda column, bound: column > bound,
    "lte": lambda column, bound: column <= bound,
    "lt": lambda column, bound: column < bound,
}


def allowed_items(request: Request, catalog: Catalog) -> Mask:
    """Return which items are active, meet `where` and are not excluded, shape (n,). Seen items are in.

    Raises
    ------
    RequestError
        If `where` names what is not there.
    """
    mask: Mask = catalog.active.copy()
    met = compile_where(request.where, catalog)
    if met is not None:
        mask &= met
    if len(request.exclude):
        # What is not there is excluded already.
        codes = catalog.find(list(request.exclude))
        mask[codes[codes >= 0]] = False
    return mask


def pinned_items(request: Request, catalog: Catalog, allowed: Mask) -> Codes:
    """Return the codes of the pins, in their order, shape (pins,).

    Parameters
    ----------
    allowed
        `allowed_items` of this request.

    Raises
    ------
    RequestError
        If a pin is unknown, given twice, or not allowed; the message says by which rule.
    """
    pins = catalog.codes(list(request.pins))
    if len(np.unique(pins)) < len(pins):
        raise RequestError("an item is pinned twice; pins must differ")
    wrong = []
    for item_id, code in zip(request.pins, pins, strict=True):
        if not catalog.active[code]:
            wrong.append(f"{item_id!r} was removed from the catalogue")
        elif item_id in request.exclude:
            wrong.append(f"{item_id!r} is in exclude")
        elif not allowed[code]:
            wrong.append(f"{item_id!r} does not meet where")
    if wrong:
        raise RequestError(f"pins break other rules: {'; '.join(wrong)}; leave these pins or those rules out")
    return pins


def check_caps(caps: Mapping[str, int] | None, catalog: Catalog) -> None:
    """Raise RequestError if caps name an unknown attribute."""
    for name in caps or ():
        _check_known(name, catalog, "caps")


def values_of(name: str, catalog: Catalog, items: Codes) -> list[tuple[AttributeValue, ...]]:
    """Return the values of an attribute of some items, one tuple an item; empty where it has none."""
    column = catalog.column(name)[items]
    missing = (None, "")
    return [
        tuple(value) if isinstance(value, list) else () if value in missing else (value,)
        for value in column.to_list()
    ]


def _check_known(name: Any, catalog: Catalog, rule: str) -> None:
    known = [*catalog.attributes, *CONTRACT]
    if not isinstance(name, str) or not catalog.has(name):
        also = ", and any" if rule == "where" else ""
        raise RequestError(f"{rule}: unknown attribute {name!r}; known are {', '.join(known)}{also}")


def compile_where(where: Mapping[str, Any] | None, catalog: Catalog) -> Mask | None:
    """Return which items meet the conditions, shape (n,); None if there are no conditions.

    Attributes are those of the catalogue and item_id, title and text. Several are and-ed:

    - ``{"genres": "Comedy"}`` equals, or contains for a list; ``{"year": [1994, 1995]}`` any of;
    - ``{"in": [...]}`` any of, ``{"all": [...]}`` each of, ``{"not": value, list or operators}``;
    - ``{"gte": 1, "lt": 20}`` and ``gt``, ``lte`` for numbers, and for dates as ``{"gte": "2020-05"}``, which
      are compared as far as both go; ``{"exists": true}``;
    - ``{"match": "word"}`` whole words in a text, case does not count; at most five in all;
    - ``{"any": [{...}, {...}]}``, in place of an attribute, is or.

    An item that lacks the attribute meets only ``not`` and ``{"exists": false}``. Removed items are not
    taken out here: see `Catalog.active`.

    Raises
    ------
    RequestError
        For an unknown attribute or operator, or a value of the wrong type.
    """
    if where is None or (isinstance(where, Mapping) and not where):
        return None
    count = _count(where, 0)
    if count > _MAX_CONDITIONS:
        raise RequestError(f"where has {count:,} conditions; at most {_MAX_CONDITIONS} are taken")
    matches = _count_matches(where, 0)
    if matches > _MAX_MATCHES:
        raise RequestError(f"where has {matches:,} times match; at most {_MAX_MATCHES} are taken")
    return _conditions(where, catalog, 0)


def _count(part: Any, depth: int) -> int:
    """How many conditions there are to test, each value of ``all`` as one; what is nested too deep is cut."""
    if depth > _MAX_DEPTH:
        return 1
    if isinstance(part, Mapping):
        return sum(
            len(value) if name == "all" and _is_list(value) else _count(value, depth + 1)
            for name, value in part.items()
        )
    if _is_alternatives(part):
        return sum(_count(each, depth + 1) for each in part)
    return 1


def _count_matches(part: Any, depth: int) -> int:
    """How often texts are searched; what is nested too deep is cut."""
    if depth > _MAX_DEPTH:
        return 0
    if isinstance(part, Mapping):
        return sum((name == "match") + _count_matches(value, depth + 1) for name, value in part.items())
    return sum(_count_matches(each, depth + 1) for each in part) if _is_alternatives(part) else 0


def _conditions(where: Any, catalog: Catalog, depth: int) -> Mask:
    if not isinstance(where, Mapping):
        raise RequestError(f"where must be a mapping of attribute to condition, got {where!r:.100}")
    if not where:
        raise RequestError("where: an empty mapping within any; leave it out, or name an attribute")
    _check_depth(depth)
    mask = np.ones(len(catalog), dtype=np.bool_)
    for name, condition in where.items():
        # An attribute may be called "any", but then its condition is no list of mappings.
        if name == "any" and ("any" not in catalog.attributes or _is_alternatives(condition)):
            mask &= _any_of(condition, catalog, depth)
        else:
            mask &= _condition(_Attribute(name, catalog), condition, depth)
    return mask


def _any_of(alternatives: Any, catalog: Catalog, depth: int) -> Mask:
    if not _is_alternatives(alternatives):
        raise RequestError(f"where: any takes a list of mappings, got {alternatives!r:.100}")
    masks = [_conditions(alternative, catalog, depth + 1) for alternative in alternatives]
    mask: Mask = np.logical_or.reduce(masks)
    return mask


def _is_alternatives(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and all(isinstance(part, Mapping) for part in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes)


def _check_depth(depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise RequestError(f"where is nested more than {_MAX_DEPTH} deep")


def _condition(attribute: _Attribute, condition: Any, depth: int) -> Mask:
    _check_depth(depth)
    if not isinstance(condition, Mapping):
        values = condition if _is_list(condition) else [condition]
        return attribute.any_of(values)
    if not condition:
        raise RequestError(f"where: no operator for {attribute.name!r}; known are {', '.join(OPERATORS)}")
    mask = np.ones(len(attribute.present), dtype=np.bool_)
    for operator, value in condition.items():
        mask &= _operate(attribute, operator, value, depth)
    return mask


def _operate(attribute: _Attribute, operator: Any, value: Any, depth: int) -> Mask:
    if operator == "not":
        return ~_condition(attribute, value, depth + 1)
    if operator in ("in", "all"):
        if not _is_list(value):
            raise RequestError(f"where: {operator} takes a list, got {value!r:.100} for {attribute.name!r}")
        return attribute.any_of(value) if operator == "in" else attribute.all_of(value)
    if operator == "exists":
        if not isinstance(value, bool):
            raise RequestError(f"where: exists takes true or false, got {value!r:.100}")
        return attribute.present if value else ~attribute.present
    if operator == "match":
        return attribute.match(value)
    if operator in _COMPARE:
        return attribute.compare(operator, value)
    raise RequestError(
        f"where: unknown operator {operator!r} for {attribute.name!r}; known are {', '.join(OPERATORS)}"
    )


class _Attribute:
    """One column with the tests that its kind allows. A missing value passes none of them."""

    def __init__(self, name: Any, catalog: Catalog) -> None:
        _check_known(name, catalog, "where")
        self.name: str = name
        column = catalog.column(name)
        self.kind = kind_of(column.dtype)
        self.column = column.set(column == "", None) if name in CONTRACT else column
        self.present: Mask = self.column.is_not_null().to_numpy()

    def any_of(self, values: Any) -> Mask:
        wanted = [self._value(value) for value in self._not_empty(values)]
        if self.kind == "number":
            whole = self.column.dtype.is_integer()
            # What is no whole number, or beyond the column, is equal to none of it.
            known = [v for v in wanted if not whole or (v == v // 1 and -(2**63) <= v < 2**63)]
            column = self.column.cast(pl.Int64 if whole else pl.Float64, strict=False)
            found = np.isin(column.fill_null(0).to_numpy(), np.array(known, np.int64 if whole else float))
            mask: Mask = found & column.is_not_null().to_numpy()
            return mask
        if self.kind != "list of strings":
            return _mask(self.column.is_in(wanted))
        lists = self.column.drop_nulls()
        rows = np.repeat(np.flatnonzero(self.present), lists.list.len().to_numpy())
        mask = np.zeros(len(self.present), dtype=np.bool_)
        mask[rows[lists.explode().is_in(wanted).to_numpy()]] = True
        return mask

    def all_of(self, values: Any) -> Mask:
        each: Mask = np.logical_and.reduce([self.any_of([value]) for value in self._not_empty(values)])
        return each

    def compare(self, operator: str, bound: Any) -> Mask:
        if self.kind == "string" and _DATE.fullmatch(str(bound)):
            dates = self.column.str.contains(f"^{_DATE.pattern}$").fill_null(False)
            if dates.any():
                return self._compare_dates(operator, str(bound), self.column.set(~dates, None))
        if self.kind != "number":
            raise RequestError(
                f"where: {operator} is for numbers, and dates as 2020-05-31; "
                f"{self.name!r} is a {self.kind}, got {bound!r:.100}"
            )
        return _mask(_COMPARE[operator](self.column, self._value(bound)))

    def _compare_dates(self, operator: str, bound: str, dates: pl.Series) -> Mask:
        """As far as both go: at most 2020 is all of that year, and 2020-05 is from 2020-05-01 on."""
        values, bound = dates.str.replace("T", " ", literal=True), bound.replace("T", " ")
        mask = np.zeros(len(dates), dtype=np.bool_)
        for length in values.str.len_chars().drop_nulls().unique():
            common = min(length, len(bound))
            passed = _COMPARE[operator](values.str.head(common), bound[:common])
            mask |= _mask(passed & (values.str.len_chars() == length))
        return mask

    def match(self, words: Any) -> Mask:
        if self.kind not in ("string", "list of strings"):
            raise RequestError(f"where: match is for texts, and {self.name!r} is a {self.kind}")
        if not isinstance(words, str) or not clean_text(words):
            raise RequestError(f"where: match takes a word or words, got {words!r:.100}")
        # Not \b: it would find no end of "C++".
        pattern = rf"(?i)(?:^|\W){pl.escape_regex(clean_text(words))}(?:\W|$)"
        text = self.column.list.join("\n") if self.kind == "list of strings" else self.column
        return _mask(text.str.contains(pattern))

    def _not_empty(self, values: Any) -> Any:
        if not len(values):
            raise RequestError(f"where: an empty list for {self.name!r}; give at least one value")
        return values

    def _value(self, value: Any) -> Any:
        """Return a value as the column holds it, or raise RequestError if it is of another type."""
        value = value.item() if isinstance(value, np.generic) else value
        if self.kind == "number" and isinstance(value, int | float) and not isinstance(value, bool):
            return self._number(value)
        if self.kind == "boolean" and isinstance(value, bool):
            return value
        if self.kind in ("string", "list of strings") and isinstance(value, str):
            limits = {"item_id": None, "title": TITLE_LIMIT, "text": TEXT_LIMIT}
            limit = limits.get(self.name, -1)
            if limit is None:
                return value.encode("utf-8", "replace").decode()
            return clean_text(value) if limit < 0 else neutralise(without_markup(value), limit)
        raise RequestError(
            f"where: {self.name!r} is a {self.kind}, got {value!r:.100} ({type(value).__name__})"
        )

    def _number(self, value: int | float) -> int | float:
        if isinstance(value, float) and math.isnan(value):
            raise RequestError(f"where: nan is no value to compare {self.name!r} with")
        if self.column.dtype.is_float():
            return value if isinstance(value, float) else _as_float(value)
        # A whole number beyond int64 is beyond every value of an integer column as well.
        return max(-(2.0**63), min(2.0**63, value)) if abs(value) >= 2**63 and value == value else value


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _mask(passed: pl.Series) -> Mask:
    return passed.fill_null(False).to_numpy()
