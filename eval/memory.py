"""Ask the base model, before any tuning, whether it knows the rows of a data file by heart.

    python eval/memory.py --file ml-latest-small/ratings.csv          # the file as it is given out
    python eval/memory.py --data movielens                            # rows as our table has them

A file is read as it is, line by line, so that the model meets it as it would have in its training; its
first line is the header. Writes eval/results/NAME-memory.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import polars as pl

from llmrec.environment import environment
from llmrec.errors import DataError, LLMRecError
from llmrec.evaluation.memory import remembered
from llmrec.fetch import resolve
from llmrec.score.config import ItemTokensConfig

HERE = Path(__file__).resolve().parent


def read_file(path: Path) -> tuple[str, str, list[list[str]]]:
    """Name, header and fields of the lines of a file."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as unreadable:
        raise DataError(f"cannot read {path}: {unreadable}") from unreadable
    return path.parent.name or path.stem, header, [line.split(",") for line in lines if line]


def read_table(data: str) -> tuple[str, str, list[list[str]]]:
    """Name, and the events of a table as lines user, item, rating, time stamp, in the table's order."""
    folder = Path(data) if Path(data).is_dir() else resolve(data)
    table = pl.read_parquet(folder / "events.parquet")
    names = {"user_id": "userId", "item_id": "movieId", "rating": "rating", "timestamp": "timestamp"}
    names = {ours: theirs for ours, theirs in names.items() if ours in table.columns}
    rows = table.select(pl.col(list(names)).cast(pl.String)).rows()
    return folder.name, ",".join(names.values()), [list(row) for row in rows]


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--file", type=Path, help="csv file of ratings; user first, item second")
    parser.add_argument("--data", help="folder, or a name that llmrec fetch knows")
    parser.add_argument("--base", default=ItemTokensConfig().base, help="name, hub id or folder of the LM")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    if (args.file is None) == (args.data is None):
        raise DataError("give --file or --data")
    name, header, rows = read_file(args.file) if args.file else read_table(args.data)
    found = remembered(header, rows, resolve(args.base), users=args.users, seed=args.seed)
    result = {
        "base": args.base,
        "rows_sha256": hashlib.sha256(json.dumps([header, rows]).encode()).hexdigest(),
        "seed": args.seed,
        **found.as_dict(),
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    draft = args.out / f".{name}-memory.json"
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(args.out / f"{name}-memory.json")
    print(found)


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
