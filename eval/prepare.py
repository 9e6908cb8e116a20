"""Turn the official files of a data set into items.parquet and events.parquet, and check what came out.

    python eval/prepare.py ml-latest-small ml-latest-small.zip               # or its unpacked folder
    python eval/prepare.py amazon-beauty reviews_Beauty_5.json.gz meta_Beauty.json.gz
    python eval/prepare.py amazon-games FOLDER                               # parquet files in our format

The files are not shipped: MovieLens is at grouplens.org/datasets, the Amazon reviews of 2014 at
jmcauley.ucsd.edu/data/amazon; their terms allow research use. amazon-games is a cut that others made and
is read in our format alone. Tables go to data/NAME unless --out says otherwise. Numbers of users, items
and events are compared with those of the published results, and, but for the official Amazon files, whose
users have other ids, the hashes of catalogue and log; a difference is an error.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from llmrec import LLMRecError
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.errors import DataError
from llmrec.events import EventLog

HERE = Path(__file__).resolve().parent

# Users, items and events of the whole log.
COUNTS = {
    "ml-latest-small": (610, 9_742, 100_836),
    "amazon-beauty": (22_363, 12_101, 198_502),
    "amazon-games": (50_546, 16_859, 440_264),
}

# Catalogue and log as the configuration reads them. Amazon files in our format have their users numbered
# anew, so the official ones have other hashes.
HASHES = {
    "ml-latest-small": (
        "4d9ef87ae888a155909efc63a7c4b55fe406c623dc429e800506cf2b9a1aaa4e",
        "542177e11de8480860a6eae9c89d99eaf945afae0005d65965dd624b3f81a725",
    ),
    "amazon-beauty": (
        "93dd52ce40975cc144813e2d0fd2a88a975348a6ce3f5fb4cc1f8fc2195a0861",
        "20b3e9a7dde82e4285176481017605ceb066505e60eafb71821e42479332fe9b",
    ),
    "amazon-games": (
        "5128752c13efbb19deae54d6cba13818f3130c0b8644188ddf03095b841e8061",
        "6a0c71676cff6baca4db02a34f9ad8598f07b8772eb7ddf8205e0f316e945571",
    ),
}


def movielens(source: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read movies.csv and ratings.csv from a folder or a zip file."""

    def read(name: str) -> pl.DataFrame:
        if source.is_dir():
            return pl.read_csv(source / name)
        with zipfile.ZipFile(source) as packed:
            inside = next((n for n in packed.namelist() if n.rsplit("/", 1)[-1] == name), None)
            if inside is None:
                raise DataError(f"{source} holds no {name}")
            return pl.read_csv(io.BytesIO(packed.read(inside)))

    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$", 1).cast(pl.Int64)
    genres = pl.col("genres").str.replace_all("|", ", ", literal=True)
    items = read("movies.csv").select(pl.col("movieId").alias("item_id"), "title", genres, year.alias("year"))
    columns = {"userId": "user_id", "movieId": "item_id"}
    events = read("ratings.csv").rename(columns).select("user_id", "item_id", "timestamp", "rating")
    return items, events


def amazon(reviews: Path, meta: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read the reviews (JSON lines) and the metadata (Python literals, a line each) of 2014."""
    events = pl.DataFrame(
        [
            {
                "user_id": row["reviewerID"],
                "item_id": row["asin"],
                "timestamp": row["unixReviewTime"],
                "rating": row["overall"],
            }
            for row in map(json.loads, _lines(reviews))
        ]
    )
    # Where there is no clock the order of rows is the order of events.
    events = events.sort("user_id", "timestamp", maintain_order=True)
    reviewed = set(events["item_id"].unique().to_list())
    items = []
    for line in _lines(meta):
        row = ast.literal_eval(line)
        if row["asin"] not in reviewed:
            continue
        path = row.get("categories") or [[]]
        items.append(
            {
                "item_id": row["asin"],
                "title": row.get("title"),
                "categories": ", ".join(path[0]) or None,
                "brand": row.get("brand") or None,
                "price": row.get("price"),
            }
        )
    return pl.DataFrame(items, infer_schema_length=None), events


def _lines(path: Path) -> Iterator[str]:
    packed = path.read_bytes()
    text = gzip.decompress(packed) if path.suffix == ".gz" else packed
    yield from (line for line in text.decode("utf-8").split("\n") if line.strip())


def ours(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read items.parquet and events.parquet."""
    return pl.read_parquet(folder / "items.parquet"), pl.read_parquet(folder / "events.parquet")


def check(name: str, items: pl.DataFrame, events: pl.DataFrame, *, hashes: bool) -> dict[str, object]:
    """Count and hash what the configuration of the data set makes of the tables; raise if unexpected."""
    data = Config.of(HERE / "configs" / f"{name}.toml").data
    catalog = Catalog.load(items, policy=data.policy)
    log = EventLog.load(events, catalog, policy=data.policy, clock=data.clock, ties=data.ties)
    found: dict[str, object] = {
        "users": events["user_id"].n_unique(),
        "items": items["item_id"].n_unique(),
        "events": events.height,
        "catalog_sha256": catalog.fingerprint,
        "log_sha256": log.fingerprint,
    }
    expected = COUNTS[name] + (HASHES[name] if hashes else ())
    wrong = [f"{k} {v}, expected {e}" for (k, v), e in zip(found.items(), expected, strict=False) if v != e]
    if wrong:
        raise DataError(f"{name} is not what the published results are on: {'; '.join(wrong)}")
    return found


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=sorted(COUNTS))
    parser.add_argument("source", nargs="+", type=Path, help="official files, or a folder in our format")
    parser.add_argument("--out", type=Path, help="folder; data/NAME if not given")
    args = parser.parse_args(argv)
    try:
        convert(args.name, args.source, args.out or HERE.parent / "data" / args.name)
    except (OSError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile, pl.exceptions.PolarsError) as bad:
        raise DataError(f"cannot read {', '.join(map(str, args.source))}: {bad}") from bad


def convert(name: str, source: Sequence[Path], out: Path) -> None:
    """Read, check, write."""
    first = source[0]
    missing = [str(path) for path in source if not path.exists()]
    if missing:
        raise DataError(f"no such file: {', '.join(missing)}")
    if first.is_dir() and (first / "items.parquet").is_file():
        official, (items, events) = "", ours(first)
    elif name == "ml-latest-small":
        official, (items, events) = "movielens", movielens(first)
    elif name == "amazon-beauty" and len(source) == 2:
        official, (items, events) = "amazon", amazon(*source)
    else:
        raise DataError(f"{name} is made from other files; see the head of this program")
    found = check(name, items, events, hashes=official != "amazon")
    out.mkdir(parents=True, exist_ok=True)
    for table, frame in (("items", items), ("events", events)):
        draft = out / f".{table}.parquet"
        frame.write_parquet(draft)
        draft.replace(out / f"{table}.parquet")
    if first.is_dir() and (first / "candidates.parquet").is_file():
        shutil.copyfile(first / "candidates.parquet", out / "candidates.parquet")
    print(json.dumps({"folder": str(out), **found}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
