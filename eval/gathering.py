"""The results file of the ablations, from the trials of this machine and those that are published.

Ranks of every target are written beside the file, so that trials of another day or machine, on the same
users, are compared with what is published.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.errors import ConfigError
from llmrec.metrics import Comparison, Ranks, compare, holm

Found = dict[str, Any]


def write(path: Path, content: str | bytes) -> None:
    """Write a file to a temporary name first."""
    draft = path.with_name(f".{path.name}")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    draft.replace(path)


def description(trial: Mapping[str, Any]) -> Found:
    """What of a trial decides how it comes out."""
    return {k: v for k, v in trial.items() if k not in ("says", "against")}


def gather(
    folder: Path, trials: Mapping[str, Found], out: Path, name: str, *, dropped: Collection[str] = ()
) -> None:
    """Write measures of every trial, and its difference in NDCG@10 to the trial it is held against.

    Parameters
    ----------
    folder
        Where the trials of this machine are.
    trials
        As they are described.
    out, name
        Folder of the results, and name of this one. What is there is taken up where `folder` does not have
        it, with its comparisons where ranks are not kept.
    dropped
        Published trials that are left out.

    Raises
    ------
    ConfigError
        If a trial is described otherwise than it was run, or trials are of different users or logs.
    """
    path, stored = out / f"{name}-ablations.json", out / f"{name}-ablations.ranks.npz"
    published: Found = {"trials": {}, "comparisons": []}
    if path.is_file():
        published = json.loads(path.read_text(encoding="utf-8"))
    theirs = {trial: own for trial, own in published["trials"].items() if trial not in dropped}
    found: Found = {}
    ranks: dict[str, dict[str, Ranks]] = {}
    for trial in [t for t in trials if (folder / f"{t}.json").is_file() or t in theirs]:
        here = folder / f"{trial}.json"
        if here.is_file():
            found[trial] = json.loads(here.read_text(encoding="utf-8"))
            ranks[trial] = _columns(folder / f"{trial}.npz", "")
        else:
            found[trial] = theirs[trial]
            ranks[trial] = _columns(stored, f"{trial}/")
    _checked(found, trials, set(theirs) - set(found))
    compared = []
    for trial in found:
        other = trials[trial].get("against", "")
        for kind in sorted(set(ranks[trial]) & set(ranks.get(other, {}))):
            if _same_lists(found[trial], found[other], kind):
                pair = {trial: ranks[trial][kind], other: ranks[other][kind]}
                compared.append((kind, compare(pair, trial, other, "ndcg@10")))
    there = {(kind, c.a, c.b) for kind, c in compared}
    for row in published["comparisons"]:
        sides = row["a"], row["b"]
        same = all(found.get(side) == published["trials"][side] for side in sides)
        if same and row["b"] == trials[row["a"]].get("against") and (row["of"], *sides) not in there:
            compared.append((row["of"], Comparison.of(row)))
    corrected = holm([c for _, c in compared])
    rows = [{"of": k, **c.as_dict()} for (k, _), c in zip(compared, corrected, strict=True)]
    columns = {
        f"{trial}/{kind}": r.astype(np.int32) for trial, own in ranks.items() for kind, r in own.items()
    }
    packed = io.BytesIO()
    np.savez_compressed(packed, **columns)
    write(stored, packed.getvalue())
    write(path, json.dumps({"trials": found, "comparisons": rows}, indent=1))


def _columns(path: Path, prefix: str) -> dict[str, Ranks]:
    """Ranks by what they are of; none where they were not kept."""
    if not path.is_file():
        return {}
    with np.load(path) as stored:
        return {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}


def _same_lists(one: Found, other: Found, kind: str) -> bool:
    """Whether two trials ordered the same: the catalogue, or the first of one merge for the same users."""
    if not kind.startswith("first"):
        return True
    few = one["users"]["few"] == other["users"]["few"]
    return few and bool(one["merge_sha256"] == other["merge_sha256"])


def _checked(found: Mapping[str, Found], trials: Mapping[str, Found], lost: Collection[str]) -> None:
    """Make sure that what is gathered is what it is called, and of the same users."""
    if lost:
        raise ConfigError(f"no longer described, --drop them or describe them: {', '.join(sorted(lost))}")
    # Results of an earlier day hold what a trial is held against too.
    other = [t for t, own in found.items() if description(own["trial"]) != description(trials[t])]
    if other:
        raise ConfigError(
            f"described otherwise than they were run: {', '.join(other)}; give the --events and "
            "--words of then, run them again, or --drop the published ones"
        )
    if len({(own["users_sha256"], own["log_sha256"]) for own in found.values()}) > 1:
        raise ConfigError("the trials are of different users or logs: remove the older ones, or give --name")
