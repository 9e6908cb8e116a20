"""The results file of the ablations, from the trials of this machine and those that are published.

Ranks of every target are written beside the file, so that trials of another day or machine, on the same
users, are compared with what is published.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.errors import ConfigError
from llmrec.metrics import Comparison, Ranks, compare, holm

Found = dict[str, Any]


def write(path: Path, text: str) -> None:
    """Write a file to a temporary name first."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def description(trial: Mapping[str, Any]) -> Found:
    """What of a trial decides how it comes out."""
    return {k: v for k, v in trial.items() if k != "says"}


def gather(folder: Path, trials: Mapping[str, Found], out: Path, name: str) -> None:
    """Write measures of every trial, and its difference in NDCG@10 to the trial it is held against.

    Parameters
    ----------
    folder
        Where the trials of this machine are.
    trials
        As they are described: a published trial that was described otherwise is left out.
    out, name
        Folder of the results, and name of this one. What is there is taken up where `folder` does not have
        it, with its comparisons where the ranks of one side are not kept.
    """
    path, stored = out / f"{name}-ablations.json", out / f"{name}-ablations.ranks.npz"
    published: Found = {"trials": {}, "comparisons": []}
    if path.is_file():
        published = json.loads(path.read_text(encoding="utf-8"))
    found: Found = {}
    ranks: dict[str, dict[str, Ranks]] = {}
    for trial, described in trials.items():
        here = folder / f"{trial}.json"
        if here.is_file():
            found[trial] = json.loads(here.read_text(encoding="utf-8"))
            ranks[trial] = _columns(folder / f"{trial}.npz", "")
        elif published["trials"].get(trial, {}).get("trial") == description(described):
            found[trial] = published["trials"][trial]
            ranks[trial] = _columns(stored, f"{trial}/")
    _same_users(found)
    compared = []
    for trial in found:
        other = trials[trial].get("against", "")
        for kind in sorted(set(ranks[trial]) & set(ranks.get(other, {}))):
            pair = {trial: ranks[trial][kind], other: ranks[other][kind]}
            compared.append((kind, compare(pair, trial, other, "ndcg@10")))
    there = {(kind, c.a, c.b) for kind, c in compared}
    for row in published["comparisons"]:
        sides = row["a"], row["b"]
        if (row["of"], *sides) not in there and set(sides) <= set(found) and not all(map(ranks.get, sides)):
            compared.append((row["of"], Comparison.of(row)))
    corrected = holm([c for _, c in compared])
    rows = [{"of": k, **c.as_dict()} for (k, _), c in zip(compared, corrected, strict=True)]
    columns = {
        f"{trial}/{kind}": r.astype(np.int32) for trial, own in ranks.items() for kind, r in own.items()
    }
    with tempfile.NamedTemporaryFile(dir=out, suffix=".npz", delete=False) as draft:
        np.savez_compressed(draft, **columns)
    Path(draft.name).replace(stored)
    write(path, json.dumps({"trials": found, "comparisons": rows}, indent=1))


def _columns(path: Path, prefix: str) -> dict[str, Ranks]:
    """Ranks by what they are of; none where they were not kept."""
    if not path.is_file():
        return {}
    with np.load(path) as stored:
        return {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}


def _same_users(found: Mapping[str, Found]) -> None:
    """Nothing is compared over different users.

    Raises
    ------
    ConfigError
        If trials are of different users or logs.
    """
    whose = {(own["users_sha256"], own["log_sha256"]) for own in found.values()}
    if len(whose) > 1:
        raise ConfigError("the trials are of different users or logs: remove the older ones, or give --name")
