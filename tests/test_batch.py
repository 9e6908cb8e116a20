"""Batches: equal to the online path, interrupted, killed, and given what they cannot do."""

import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from llmrec import Event, Item, Recommender, Request, batch
from llmrec.batch import Batch, run
from llmrec.errors import DataError, ModelError, RequestError
from llmrec.testing import toy_data

CONFIG = {"encoder": {"name": "light", "dim": 16}, "retrieval": {"families": ["transitions", "profile"]}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch") / "model"
    rec = Recommender.fit(*toy_data(users=90), CONFIG)
    rec.save(folder)
    rec.close()
    return folder


@pytest.fixture
def rec(model):
    with_close = Recommender.load(model)
    yield with_close
    with_close.close()


def parts(out):
    return pl.read_parquet(out / "part-*.parquet")


def online(rec, requests):
    return [(r.rank, r.item.item_id, r.score) for found in rec.recommend_many(requests) for r in found]


def test_every_user_gets_what_the_online_path_answers(model, rec, tmp_path):
    told = []
    users = rec.users(limit=1000)
    assert run(Batch("recommend", model, tmp_path, k=5, size=40), on_part=lambda *n: told.append(n)) == 90
    found = parts(tmp_path)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)] and len(list(tmp_path.glob("part-*"))) == 3
    assert found["user_id"].unique(maintain_order=True).to_list() == users
    expected = online(rec, [Request(user=user, k=5) for user in users])
    assert found.select("rank", "item_id", "score").rows() == expected


def test_rows_with_histories_and_wishes_and_any_order_of_columns(model, rec, tmp_path):
    rows = {"query": ["river", None, None], "history": [None, ["i1", "i2"], []], "other": [1, 2, 3]}
    pl.DataFrame(rows).write_parquet(tmp_path / "asked.parquet")
    run(Batch("recommend", model, tmp_path / "out", str(tmp_path / "asked.parquet"), k=4))
    asked = [Request(query="river", k=4), Request(history=["i1", "i2"], k=4), Request(k=4)]
    found = parts(tmp_path / "out")
    assert found.select("rank", "item_id", "score").rows() == online(rec, asked)
    each = [len(answer) for answer in rec.recommend_many(asked)]
    run(Batch("recommend", model, tmp_path / "small", str(tmp_path / "asked.parquet"), k=4, size=2))
    assert parts(tmp_path / "small").equals(found)
    time.sleep(0.01)
    pl.DataFrame({**rows, "user_id": ["u1", None, None]}).write_parquet(tmp_path / "asked.parquet")
    with pytest.raises(DataError, match="its contents"):
        run(Batch("recommend", model, tmp_path / "out", str(tmp_path / "asked.parquet"), k=4))
    run(Batch("recommend", model, tmp_path / "some", str(tmp_path / "asked.parquet"), k=1))
    assert parts(tmp_path / "some")["user_id"].to_list() == ["u1", None, None]
    assert parts(tmp_path / "some")["row"].to_list() == [0, 1, 2]
    assert found["row"].to_list() == np.repeat(range(3), each).tolist()
    # Numbers as ids, and several files.
    for n in range(2):
        pl.DataFrame({"user_id": [n, n + 10]}).write_parquet(tmp_path / f"users-{n}.parquet")
    run(Batch("recommend", model, tmp_path / "ids", str(tmp_path / "users-*.parquet"), k=2, size=3))
    assert parts(tmp_path / "ids")["user_id"].unique(maintain_order=True).to_list() == ["0", "10", "1", "11"]


def test_lists_with_missing_values_and_ids_ahead_of_the_catalogue_are_read(model, tmp_path):
    items = [Item(str(n), f"Title {n}") for n in range(9)]
    rec = Recommender.fit(items, [Event(f"u{n % 5}", str(n % 9), n) for n in range(40)], CONFIG)
    rec.save(tmp_path / "model")
    rows = {"history": [[1.0, float("nan"), 2.0], [None, 3.0], [4.0, 999.0]]}
    folder = tmp_path / "asked" / "today"
    folder.mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(folder / "rows.parquet")
    job = Batch(
        "recommend", tmp_path / "model", tmp_path / "out", str(tmp_path / "asked/*/rows.parquet"), k=3
    )
    assert run(job) == 3
    asked = [Request(history=history, k=3) for history in (["1", "2"], ["3"], ["4"])]
    found = pl.read_parquet(tmp_path / "out/*.parquet")
    assert found.select("rank", "item_id", "score").rows() == online(rec, asked)
    time.sleep(0.01)
    pl.DataFrame({"history": [[1.5]]}).write_parquet(folder / "rows.parquet")
    with pytest.raises(DataError, match="its contents"):
        run(job)
    with pytest.raises(DataError, match=r"row 0: history must be text or a whole number, got 1\.5"):
        run(replace(job, out=tmp_path / "fractions"))
    rec.close()


def test_texts_become_the_encoders_vectors(model, rec, tmp_path):
    run(Batch("embed", model, tmp_path / "items", size=25))
    found = parts(tmp_path / "items")
    assert found["item_id"].to_list() == list(rec.catalog.ids)
    np.testing.assert_allclose(found["vector"].to_numpy(), rec.texts.vectors, atol=1e-6)
    table = pl.DataFrame({"text": ["Blue River", None], "id": ["a", "b"]})
    table.write_parquet(tmp_path / "texts.parquet")
    run(Batch("embed", model, tmp_path / "texts", str(tmp_path / "texts.parquet")))
    found = parts(tmp_path / "texts")
    assert found["id"].to_list() == ["a", "b"]
    np.testing.assert_allclose(found["vector"].to_numpy(), rec.texts.encoder.encode(["Blue River", ""]))


def test_an_interrupted_run_goes_on_with_what_is_missing(model, tmp_path, monkeypatch):
    whole, job = tmp_path / "whole", Batch("recommend", model, tmp_path / "out", size=20)
    run(Batch("recommend", model, whole, size=20))

    def interrupted(done, parts):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, on_part=interrupted)
    before = {path: path.stat().st_mtime_ns for path in job.out.glob("part-*")}
    assert len(before) == 2
    assert run(job) == 90
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert parts(job.out).equals(parts(whole)) and not list(job.out.glob(".part*"))
    monkeypatch.setattr(batch, "_here", None)
    assert run(job) == 90  # nothing is left to do
    for other in (
        Batch("recommend", model, job.out, size=30),
        Batch("recommend", model, job.out, k=3, size=20),
        Batch("embed", model, job.out, size=20),
    ):
        with pytest.raises(DataError, match="another run"):
            run(other)


def test_what_cannot_be_done_is_said(model, tmp_path):
    def fails(error, match, rows, task="recommend"):
        path = tmp_path / "asked.parquet"
        path.write_bytes(b"no parquet") if rows is None else pl.DataFrame(rows).write_parquet(path)
        with pytest.raises(error, match=match):
            run(Batch(task, model, tmp_path / f"out{time.monotonic_ns()}", str(path)))

    fails(DataError, "cannot read", None)
    fails(DataError, "one of user_id, history, query, and has users", {"users": ["u1"]})
    fails(DataError, "needs the column text", {"item_id": ["i1"]}, "embed")
    fails(DataError, r"row 1: .*'nope'", {"history": [["i1"], ["nope"]]})
    fails(DataError, "row 1: give either user", {"user_id": ["u1", "u2"], "history": [None, ["i1"]]})
    fails(DataError, "row 1: nobody is asked for", {"user_id": ["u1", None]})
    fails(DataError, "history must be lists of item ids, got String", {"history": ["i1,i2"]})
    fails(DataError, "text or whole numbers, got fractions", {"user_id": [1.5]})
    with pytest.raises(DataError, match="cannot read"):
        run(Batch("recommend", model, tmp_path / "a", str(tmp_path / "missing.parquet")))
    with pytest.raises(ModelError, match="not a saved recommender"):
        run(Batch("recommend", tmp_path, tmp_path / "b"))
    with pytest.raises(RequestError, match="at least 1"):
        run(Batch("recommend", model, tmp_path / "c", size=0))
    assert run(Batch("recommend", model, tmp_path / "d", str(_empty(tmp_path)))) == 0


def _empty(tmp_path):
    pl.DataFrame({"user_id": []}, schema={"user_id": pl.String}).write_parquet(tmp_path / "empty.parquet")
    return tmp_path / "empty.parquet"


SPREAD = """
import os, signal, sys
from pathlib import Path
from llmrec.batch import Batch, run
from llmrec.errors import DataError

model, out, source, kills = sys.argv[1:]
killed = []

def actors():
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(int(place.name))
        except OSError:
            continue
    return found

def kill(done, parts):
    if kills and done >= 2 and not killed and (found := actors()):
        os.kill(found[0], signal.SIGKILL)
        killed.append(found[0])

try:
    job = Batch("recommend", Path(model), Path(out), source or None, k=5, size=3)
    done = run(job, workers=2, on_part=kill)
except DataError as error:
    sys.exit(f"said: {error}")
print(done, len(killed))
"""


def test_two_actors_give_the_same_parts_and_one_that_is_killed_is_replaced(model, tmp_path):
    pytest.importorskip("ray")

    def spread(out, source="", kills=""):
        # In a process of its own: Ray leaves threads, and ends its process where it loses what it started.
        command = [sys.executable, "-c", SPREAD, str(model), str(tmp_path / out), str(source), kills]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    done = spread("spread", kills="one")
    # Ray says on standard output too that a worker died.
    assert done.stdout.splitlines()[-1:] == ["90 1"], done.stderr
    run(Batch("recommend", model, tmp_path / "here", k=5, size=3))
    assert parts(tmp_path / "spread").equals(parts(tmp_path / "here"))
    # The error of a row comes through as it is.
    pl.DataFrame({"history": [["nope"]]}).write_parquet(tmp_path / "bad.parquet")
    done = spread("bad", tmp_path / "bad.parquet")
    assert done.returncode == 1 and "said: " in done.stderr and "row 0: 1 of 1 item ids" in done.stderr


def test_the_command_line_does_a_batch_and_says_what_is_wrong(model, tmp_path):
    command = [sys.executable, "-m", "llmrec.cli", "batch", "recommend", str(model), "--out"]
    done = subprocess.run([*command, str(tmp_path / "o"), "-k", "3"], capture_output=True, text=True)
    assert done.returncode == 0 and "90 users done" in done.stderr and len(parts(tmp_path / "o")) == 270
    done = subprocess.run([*command, str(tmp_path / "o"), "-k", "3"], capture_output=True, text=True)
    assert done.returncode == 0 and "nothing was computed: 90 users were done before" in done.stderr
    done = subprocess.run([*command, str(tmp_path / "o"), "-k", "4"], capture_output=True, text=True)
    assert done.returncode == 2 and "another run" in done.stderr and "Traceback" not in done.stderr
