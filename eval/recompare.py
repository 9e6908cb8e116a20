"""Compute the comparisons of published results again, from the ranks beside them.

    python eval/recompare.py                     # all evaluations in eval/results
    python eval/recompare.py amazon-games-test-30min

For when what is compared changes: nothing is fitted, and no event is read. Ranks that are too large to be
published lie in runs/; results without any are left as they are, and named.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from gathering import write
from rich.console import Console

from llmrec.evaluation.run import compared
from llmrec.recipe import Recipe

HERE = Path(__file__).resolve().parent
console = Console(stderr=True)


def again(path: Path) -> bool:
    """Write the comparisons of an evaluation anew; False where its ranks are not there."""
    places = [path.with_suffix(".ranks.npz"), HERE.parent / "runs" / f"{path.stem}.ranks.npz"]
    stored = next((place for place in places if place.is_file()), None)
    if stored is None:
        return False
    with np.load(stored) as columns:
        ranks = {name: columns[name] for name in columns.files}
    found = json.loads(path.read_text(encoding="utf-8"))
    best = Recipe.from_dict(found["recipe"]).best_alone
    found["comparisons"] = [c.as_dict() for c in compared(ranks, best)]
    write(path, json.dumps(found, indent=1))
    return True


def is_evaluation(path: Path) -> bool:
    """Whether a results file is one of `run.py`."""
    return {"recipe", "systems", "comparisons"} <= set(json.loads(path.read_text(encoding="utf-8")))


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="of results; all evaluations if none is given")
    args = parser.parse_args(argv)
    results = HERE / "results"
    paths = [results / f"{name}.json" for name in args.names] or sorted(
        p for p in results.glob("*.json") if is_evaluation(p)
    )
    missing = [path.name for path in paths if not path.is_file() or not is_evaluation(path)]
    if missing:
        sys.exit(f"error: no evaluation of this name: {', '.join(missing)}")
    left = [path.stem for path in paths if not again(path)]
    if left:
        console.print(f"left as they are, their ranks are not here: {', '.join(left)}")


if __name__ == "__main__":
    main()
