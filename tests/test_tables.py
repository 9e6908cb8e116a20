from __future__ import annotations

import contextlib
import gzip
import json
import random
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from llmrec.errors import DataError
from llmrec.tables import read_table
from llmrec.types import Event, Item

ROWS = [
    {"item_id": "007", "title": 'Caf\u00e9, the "best"'},
    {"item_id": "8", "title": "two\nlines"},
    {"item_id": "9", "title": "last"},
]


def written(folder, suffix):
    path = folder / f"items{suffix}"
    frame = pl.DataFrame(ROWS)
    if suffix == ".parquet":
        frame.write_parquet(path)
    elif suffix.startswith(".jsonl"):
        data = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n\n"
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    else:
        data = frame.write_csv(separator="\t" if "tsv" in suffix else ",").replace("\n8", "\r\n8").encode()
        data = b"\xef\xbb\xbf" + data
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz"])
def test_every_kind_of_file_gives_the_same_table(tmp_path, suffix):
    path = written(tmp_path, suffix)
    assert read_table(path, "items").to_dicts() == ROWS
    assert read_table(str(path), "items").to_dicts() == ROWS


def test_every_kind_of_object_gives_the_same_table():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    frame = pl.DataFrame(ROWS)
    shuffled = datasets.Dataset.from_list(ROWS[::-1]).select([2, 1, 0])
    for source in (frame, frame.lazy(), pandas.DataFrame(ROWS), shuffled, ROWS, tuple(ROWS)):
        assert read_table(source, "items").to_dicts() == ROWS
    with pytest.raises(DataError, match="one split"):
        read_table(datasets.DatasetDict(train=shuffled), "items")


def test_pandas_types_arrive_as_they_are():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "whole": pandas.array([1, None], dtype="Int64"),
            "real": [1.5, float("nan")],
            "flag": [True, False],
            "tags": [np.array(["a", "b"]), None],
            "when": pandas.to_datetime(["2020-01-01T01:00:00+01:00", None], utc=True),
            "kind": pandas.Categorical(["x", None]),
            "word": ["a", None],
        }
    )
    table = read_table(frame, "items")
    assert table["whole"].to_list() == [1, None] and table["flag"].to_list() == [True, False]
    assert table["tags"].to_list() == [["a", "b"], None] and table["kind"].to_list() == ["x", None]
    assert table["when"].dt.epoch("s").to_list() == [1577836800, None]
    assert table["word"].to_list() == ["a", None]


@pytest.mark.parametrize("backend", ["numpy_nullable", "pyarrow"])
def test_nullable_pandas_types_arrive_as_they_are(backend):
    pandas = pytest.importorskip("pandas")
    rows = {"whole": [1, 2], "real": [1.5, 2.0], "flag": [True, False], "word": ["a", "b"]}
    frame = pandas.DataFrame(rows).convert_dtypes(dtype_backend=backend)
    assert read_table(frame, "items").to_dict(as_series=False) == rows
    frame.loc[1] = [None] * 4
    assert read_table(frame.drop(columns="real"), "items").row(1) == (None,) * 3
    assert np.isnan(read_table(frame, "items")["real"][1]), "as in any column of floats"


def test_sets_are_read_in_one_order():
    words = [f"word{n}" for n in range(50)]
    for made in (set(words), frozenset(words)):
        table = read_table([Item("1", "A", attributes={"tags": made})], "items")
        assert table["tags"].to_list() == [sorted(words)]


def test_values_of_the_types_module():
    items = [
        Item("1", "A", attributes={"year": 1995, "tags": ("x", "y")}),
        Item("2", "B", "words", {"price": 2.5}),
    ]
    table = read_table(items, "items")
    assert table.row(0, named=True) == {
        "item_id": "1", "title": "A", "text": "", "year": 1995, "tags": ["x", "y"], "price": None
    }  # fmt: skip
    events = read_table([Event("u", "1", 5), Event("u", "2", None, 2.0)], "events")
    assert events["timestamp"].to_list() == [5, None] and events["weight"].to_list() == [1.0, 2.0]


def test_recbole_atomic_files(tmp_path):
    (tmp_path / "a.item").write_text(
        "item_id:token\tmovie_title:token_seq\tgenre:token_seq\tprice:float\n"
        '1\t"Toy" Story\tComedy Drama\t2.5\n2\tHeat\t\t\n'
    )
    table = read_table(tmp_path / "a.item", "items", {"movie_title": "title"})
    assert table.to_dicts() == [
        {"item_id": "1", "title": '"Toy" Story', "genre": ["Comedy", "Drama"], "price": 2.5},
        {"item_id": "2", "title": "Heat", "genre": None, "price": None},
    ]
    (tmp_path / "a.inter").write_text("user_id\titem_id\n1\t2\n")
    with pytest.raises(DataError, match="has no type"):
        read_table(tmp_path / "a.inter", "events")
    (tmp_path / "a.inter").write_text("user_id:token\ttimestamp:float\n1\tx\n")
    with pytest.raises(DataError, match="not a number in data row 1"):
        read_table(tmp_path / "a.inter", "events")


BAD_FILES = {
    "empty.csv": (b"", "empty"),
    "blank.csv": (b"\n \n", "empty"),
    "header.csv": (b"item_id,title\n", "no rows"),
    "zero.jsonl": (b"", "empty"),
    "latin.csv": (
        "item_id,title\n1,ok\n2,Caf\u00e9\n".encode("latin-1"),
        r"line 3 \(data row 2\) is not UTF-8",
    ),
    "short.csv": (b"a,b,c\n1,2,3\n1,2\n", "data row 2 has 2 fields, the header 3"),
    "long.csv": (b"a,b\n1,2\n1,2,3\n", "cannot read"),
    "twice.csv": (b"a,b,a\n1,2,3\n", "several columns are called 'a'"),
    "quote.csv": (b'a,b\n1,"x\n', "cannot read"),
    "cut.csv.gz": (gzip.compress(b"a,b\n1,2\n" * 100)[:-12], "cannot read"),
    "not.csv.gz": (b"a,b\n1,2\n", "cannot read"),
    "not.parquet": (b"PAR1 nothing of the kind PAR1", "cannot read"),
    "no.parquet": (b"", "cannot read"),
    "bad.jsonl": (b'{"a": 1}\n{"a": \n', "row 2 is not JSON"),
    "list.jsonl": (b"[1, 2]\n", "row 1 is a list"),
    "mixed.jsonl": (b'{"a": 1}\n{"a": "x"}\n', "mixes int and str"),
    "what.xlsx": (b"x", "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_data_errors_that_name_the_file(tmp_path, name):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as raised:
        read_table(tmp_path / name, "items")
    assert name in str(raised.value)


def test_damaged_parquet_never_escapes_as_another_error(tmp_path):
    path = written(tmp_path, ".parquet")
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bytes(bad[: rng.randint(len(bad) // 2, len(bad))] if rng.random() < 0.3 else bad))
        with contextlib.suppress(DataError):
            read_table(path, "items")


def test_mapping_is_checked(tmp_path):
    with pytest.raises(DataError, match=r"'sku', 'x'.*the columns are item_id, title"):
        read_table(ROWS, "items", {"sku": "item_id", "x": "title"})
    with pytest.raises(DataError, match="two columns would be called 'title'"):
        read_table(ROWS, "items", {"item_id": "title"})
    assert read_table(ROWS, "items", {"item_id": "title", "title": "item_id"})["title"][0] == "007"


@pytest.mark.parametrize(
    "source", [[], pl.DataFrame(), 5, None, b"x", {"a": [1]}, [1], "missing.csv", "", "."]
)
def test_other_sources_are_data_errors(source):
    with pytest.raises(DataError):
        read_table(source, "items")


def test_reading_files_imports_neither_pandas_nor_datasets(tmp_path):
    path = written(tmp_path, ".csv")
    code = (
        "import sys; from llmrec.tables import read_table; read_table(sys.argv[1], 'items');"
        "assert not {'pandas', 'datasets', 'pyarrow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
