"""Pools: the items that are ranked for each user where it is not the whole catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from llmrec.catalog import Catalog
from llmrec.errors import DataError
from llmrec.evaluation.split import Part
from llmrec.protocols import Codes, Mask
from llmrec.rows import id_strings
from llmrec.tables import read_table


def drawn_pools(part: Part, n: int, active: Mask, exclude_seen: bool, seed: int) -> list[Codes]:
    """The target and n other items, drawn uniformly without repetition, for each user; shuffled.

    If `exclude_seen`, seen items are not drawn, and a target that repeats an earlier item stays out, which
    makes it a miss as in full ranking. A smaller catalogue gives smaller pools.
    """
    pools = []
    for user, history, target in zip(part.users, part.histories, part.targets, strict=True):
        rng = np.random.default_rng([seed, int(user)])
        allowed = active.copy()
        if exclude_seen:
            allowed[history] = False
        allowed[target] = False
        others = np.flatnonzero(allowed)
        drawn = rng.choice(others, size=min(n, len(others)), replace=False)
        if not (exclude_seen and target in history):
            drawn = np.append(drawn, target)
        pools.append(rng.permutation(drawn).astype(np.int32))
    return pools


def fixed_pools(
    path: Path,
    part: Part,
    user_ids: Sequence[str],
    catalog: Catalog,
    *,
    source: str | None = None,
    count: int | None = None,
    seed: int = 0,
) -> tuple[Part, list[Codes]]:
    """Read candidate lists, one row a user; users without one are left out. Pools are shuffled.

    Parameters
    ----------
    path
        Table with the columns user_id and candidates (list of item ids), and source if `source` is given.
    source
        Only rows with this source.
    count
        Take the first `count` of each list; where the target is not among them it replaces the last
        (as LLMRank does, arXiv 2305.08845). None leaves the lists as they are: a target that a list does
        not hold is then a miss.

    Raises
    ------
    DataError
        If columns are missing, an item is unknown, a user has two lists, or none has one.
    """
    lists = _read_lists(path, source)
    rows = [row for row, user in enumerate(part.users) if user_ids[user] in lists]
    if not rows:
        raise DataError(f"{path}: none of its {len(lists):,} users is among the {len(part):,} reported ones")
    part = part.take(np.array(rows, dtype=np.int64))
    pools = []
    for user, target in zip(part.users, part.targets, strict=True):
        codes = catalog.find(lists[user_ids[user]])
        if (codes < 0).any():
            raise DataError(
                f"{path}: {int((codes < 0).sum())} candidates of user {user_ids[user]!r} are unknown"
            )
        codes = np.array(list(dict.fromkeys(codes.tolist())), dtype=np.int32)
        if count is not None:
            codes = codes[:count]
            if target not in codes:
                codes = np.append(codes[: count - 1], target)
            if len(codes) < count:
                raise DataError(f"{path}: user {user_ids[user]!r} has fewer than {count - 1} candidates")
        pools.append(np.random.default_rng([seed, int(user)]).permutation(codes).astype(np.int32))
    return part, pools


def _read_lists(path: Path, source: str | None) -> dict[str, list[str]]:
    table = read_table(path, "candidates")
    needed = ["user_id", "candidates"] + ["source"] * (source is not None)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; the columns are {', '.join(table.columns)}")
    if not isinstance(table.schema["candidates"], pl.List):
        raise DataError(f"{path}: candidates must be lists of item ids, got {table.schema['candidates']}")
    if source is not None:
        known = sorted(table["source"].cast(pl.String).drop_nulls().unique().to_list())
        table = table.filter(pl.col("source").cast(pl.String) == source)
        if not table.height:
            raise DataError(f"{path}: no rows of source {source!r}; known are {', '.join(known)}")
    ids = id_strings(table["user_id"], str(path))
    if ids.n_unique() < len(ids):
        raise DataError(f"{path}: some users have more than one list; choose one with candidate_source")
    lists = table["candidates"].cast(pl.List(pl.String)).fill_null([])
    return dict(zip(ids.to_list(), lists.to_list(), strict=True))


def complete(found: Codes, pool: Codes) -> Codes:
    """The pool in the order found; what was not found comes last, in the pool's (drawn) order."""
    return np.concatenate([found, pool[~np.isin(pool, found)]])
