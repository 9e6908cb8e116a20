"""The command line: as a process of its own for what works and what is killed, in this one for bad input."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmrec import Recommender, __version__, cli
from llmrec.testing import tiny_lm, toy_data

pytest.importorskip("torch")

COMMAND = [sys.executable, "-m", "llmrec.cli"]
# One thread: the models are tiny, and two threads that wait for each other on a busy machine take ten times
# as long.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
ODD = "The [bold red] River"
STEPS = 120


def run(*arguments, expect=0):
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


def ids(found):
    return [entry["item_id"] for entry in found]


def ids_of(folder, user="u1"):
    """What this process, which did not write the folder, recommends."""
    rec = Recommender.load(folder)
    try:
        return [r.item_id for r in rec.recommend(user=user, k=5)]
    finally:
        rec.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with items.jsonl, events.csv, a configuration and a tiny language model."""
    folder = tmp_path_factory.mktemp("data")
    items, events = toy_data()
    items[5] = replace(items[5], title=ODD)
    with (folder / "items.jsonl").open("w", encoding="utf-8") as opened:
        for item in items:
            opened.write(json.dumps({"item_id": item.item_id, "title": item.title, **item.attributes}) + "\n")
    with (folder / "events.csv").open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["user_id", "item_id", "timestamp"])
        rows.writerows((e.user_id, e.item_id, e.timestamp) for e in events)
    base = tiny_lm(folder / "lm").as_posix()
    (folder / "config.toml").write_text(
        f'[encoder]\nname = "light"\n[lm]\nbase = "{base}"\nlayers = 2\n[training]\nsteps = 5\n'
    )
    (folder / "long.toml").write_text(
        f"[training]\nsteps = {STEPS}\nvalidations = 1\ntokens_per_step = 100\ncheckpoint_seconds = 0.02\n"
    )
    return folder


@pytest.fixture(scope="module")
def fitting(data):
    """The finished `fit`, and the recommender that it wrote."""
    folder = data / "fitted"
    inputs = ("--items", data / "items.jsonl", "--events", data / "events.csv")
    return run("fit", *inputs, "--config", data / "config.toml", "--out", folder), folder


@pytest.fixture(scope="module")
def fitted(fitting):
    return fitting[1]


@pytest.fixture(scope="module")
def tuning(data, fitted):
    """The finished `finetune`, and the recommender that it changed."""
    folder = data / "tuned"
    shutil.copytree(fitted, folder)
    return run("finetune", folder), folder


@pytest.fixture(scope="module")
def tuned(tuning):
    return tuning[1]


@pytest.fixture
def mine(fitted, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(fitted, tmp_path / "model")


# ---- what works ----------------------------------------------------------------------------------


def test_version_and_help():
    assert run("--version").stdout.strip() == __version__
    started = time.monotonic()
    shown = run("--help").stdout
    assert time.monotonic() - started < 10  # about a second on a quiet machine
    for name in (
        "fetch",
        "fit",
        "finetune",
        "recommend",
        "similar",
        "search",
        "rank",
        "about",
        "observe",
        "forget",
    ):
        assert name in shown


def test_fit_says_what_it_read_and_chose(fitting):
    done, folder = fitting
    assert done.stdout == f"{folder}\n"
    assert "items: kept 40 of 40 rows" in done.stderr and "events: kept" in done.stderr
    assert "weights by history: " in done.stderr
    assert done.stderr.count("reading items and events") == 1 and "DEBUG" not in done.stderr


def test_about_says_what_is_saved(fitted, tuning):
    plain = json.loads(run("about", fitted, "--json").stdout)
    rec = Recommender.load(fitted)
    assert plain["items"]["active"] == len(rec.catalog) and plain["events"]["stored"] == len(rec.events())
    assert plain["weights"]["history"] == dict(rec.recipe.history.retrievers)
    assert plain["language model"] == [] and plain["encoder"]["name"] == "light"
    _, folder = tuning
    (model,) = json.loads(run("about", folder, "--json").stdout)["language model"]
    card = json.loads(next(folder.glob("state-*/adapter/card.json")).read_text(encoding="utf-8"))["card"]
    assert model["mode"] == "item_tokens" and model["events"] == card["training"]["data"]["events"]
    assert model["weight"] == card["training"]["blend"]["weight"]
    told = run("about", folder).stdout
    assert "weights by history: " in told and "language model: mode item_tokens" in told


def test_finetune_reports_and_shows_progress(tuning):
    done, folder = tuning
    assert done.stdout.startswith("5 steps, ") and "blend - merge" in done.stdout
    assert "100% step 5, " in done.stderr and "nats an item" in done.stderr and "events/s" in done.stderr
    for noise in ("Loading weights", "LOAD REPORT", "Batches", "No device", "DEBUG", "Warning"):
        assert noise not in done.stderr
    assert json.loads((folder / "manifest.json").read_text())["language_model"]
    assert not (folder / "training").exists()


def test_recommend_as_table_and_as_json(fitted):
    arguments = ("recommend", fitted, "--history", "i3,i4", "--seen", "include", "-k", 5)
    found = run_json(*arguments)
    assert [entry["rank"] for entry in found] == [1, 2, 3, 4, 5] and found[0]["item_id"] == "i5"
    assert set(found[0]) == {"item_id", "title", "rank", "score", "attributes", "sources"}
    assert isinstance(found[0]["attributes"]["genres"], list) and found[0]["title"] == ODD
    assert {"name", "rank", "score"} == set(found[0]["sources"][0])
    table = run(*arguments)
    rows = [line for line in table.stdout.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert len(rows) == 5 and rows[0].split()[:2] == ["1", "i5"]
    assert ODD in rows[0] and f"{found[0]['score']:.3f}" in rows[0] and "transitions +" in rows[0]
    assert table.stderr == ""


def test_rules_are_passed_on(fitted):
    ask = ("recommend", fitted, "--user", "u1", "--query", "river", "-k", 40, "--seen", "include")
    found = run_json(*ask, "--where", '{"brand": "Acme"}', "--exclude", "i4, i8")
    assert set(ids(found)) <= {f"i{code}" for code in range(0, 40, 4)} - {"i4", "i8"}
    assert found and all(entry["attributes"]["brand"] == "Acme" for entry in found)
    found = run_json(*ask[:-4], "-k", 4, "--caps", '{"brand": 1}', "--pins", "i9, i10", "--diversity", 0.3)
    assert ids(found)[:2] == ["i9", "i10"] and len({entry["attributes"]["brand"] for entry in found}) == 4


def test_explain_says_why(fitted):
    ask = ("recommend", fitted, "--history", "i20,i11,i30", "-k", 4, "--explain")
    found = {entry["item_id"]: entry["reason"] for entry in run_json(*ask)}
    assert found["i12"]["history"][0]["item_id"] == "i11" and found["i12"]["history"][0]["amount"] > 0
    assert all(
        set(reason) == {"sentence", "history", "shared", "words", "sources", "worded"}
        for reason in found.values()
    )
    table = run(*ask).stdout
    assert "why" in table and all(reason["sentence"] in table for reason in found.values())


def test_stages_show_the_language_model_beside_the_default(tuned):
    found = run_json("recommend", tuned, "--user", "u1", "-k", 3, "--stages")
    assert list(found) == ["retrieval", "language model", "default"]
    assert all(len(part) == 3 for part in found.values())


def test_similar_search_and_rank(fitted):
    assert "i3" not in ids(run_json("similar", fitted, "i3", "-k", 5))
    told = run("recommend", fitted, "--history", "i1,nope", "--json")
    assert "not in the catalogue, so that they do not count: 'nope'" in told.stderr
    assert json.loads(told.stdout) == run_json("recommend", fitted, "--history", "i1")
    assert "i5" in ids(run_json("search", fitted, "bold river", "--user", "u1", "-k", 5))
    assert sorted(ids(run_json("rank", fitted, "--items", "i7,i5,i6", "--history", "i4"))) == [
        "i5",
        "i6",
        "i7",
    ]


def test_observe_counts_in_the_next_request_and_forget_erases(mine):
    before = ids_of(mine, "someone new")
    done = run("observe", mine, "--user", "someone new", "--item", "i20")
    assert done.stdout == "" and "stored" in done.stderr
    after = ids(run_json("recommend", mine, "--user", "someone new", "-k", 5))
    assert after != before and after[0] == "i21"
    assert "erased 1 event " in run("forget", mine, "--user", "someone new").stderr
    assert ids_of(mine, "someone new") == before


def test_many_users_are_forgotten_at_once(mine, fails, tmp_path):
    for user in ("gone one", "gone two"):
        run("observe", mine, "--user", user, "--item", "i4")
    # As an editor of another system writes it.
    (tmp_path / "gone.txt").write_bytes("gone one\r\ngone two\r\n\r\n".encode("utf-8-sig"))
    told = run("forget", mine, "--users", tmp_path / "gone.txt")
    assert "erased 2 events of 2 users" in told.stderr
    assert "whom to forget?" in fails("forget", mine)
    (tmp_path / "gone.txt").write_bytes(b"\xff\xfe")
    assert "no text in UTF-8" in fails("forget", mine, "--users", tmp_path / "gone.txt")


def test_a_reader_that_leaves_early_is_no_error(fitted):
    process = subprocess.Popen(
        [*COMMAND, "recommend", str(fitted), "--user", "u1", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)


# ---- bad input -----------------------------------------------------------------------------------


def test_new_data_is_taken_into_a_model_and_a_fit_does_not_drop_it(data, fitted, tmp_path):
    model = Path(shutil.copytree(fitted, tmp_path / "model"))
    (tmp_path / "items.csv").write_text("item_id,title\nnew1,Zeppelin One\nnew2,Zeppelin Two\n")
    rows = "".join(f"u{n},new1,{2_000_000_000 + n}\n" for n in range(9))
    (tmp_path / "events.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    run("add-items", model, "--items", tmp_path / "items.csv")
    # Who loads it next need not encode them again.
    assert not Recommender.load(model).unsaved_items
    for new in (9, 0):
        assert f"; {new} new" in run("observe", model, "--events", tmp_path / "events.csv").stderr
    run("refit", model)
    run("remove-items", model, "--items", "new2")
    assert ids(run_json("search", model, "zeppelin")) == ["new1"]
    again = ("fit", "--items", tmp_path / "items.csv", "--events", tmp_path / "events.csv", "--out", model)
    refused = run(*again, "--encoder", "light", expect=2).stderr
    assert "--replace" in refused and ids(run_json("search", model, "zeppelin")) == ["new1"]
    run(*again, "--encoder", "light", "--replace")
    assert "what happened?" in run("observe", model, "--user", "u1", expect=2).stderr


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs a command in this process that must end with one line of error; returns that line."""

    def check(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmrec", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert ended.value.code == 2
        assert shown.out == "" and "Traceback" not in shown.err
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, shown.err
        return errors[0]

    return check


def test_a_catalogue_without_a_log_is_a_beginning(fails, data, tmp_path):
    begun = run("fit", "--items", data / "items.jsonl", "--out", tmp_path / "new", "--encoder", "light")
    assert "events: none yet, texts decide" in begun.stderr
    title = run_json("recommend", tmp_path / "new", "--history", "i3")[0]["title"]
    assert run_json("search", tmp_path / "new", title)[0]["title"] == title
    assert "no events are stored" in fails("refit", tmp_path / "new", "--choose")
    run("observe", tmp_path / "new", "--events", data / "events.csv")
    assert "weights by history:" in run("refit", tmp_path / "new", "--choose").stderr


def test_bad_requests(fails, fitted, tmp_path, monkeypatch):
    ask = ("recommend", fitted, "--user", "u1")
    assert "whom for?" in fails("recommend", fitted)
    assert "not both" in fails(*ask, "--history", "i1")
    assert "'nope'" in fails("similar", fitted, "nope")
    assert "'nope'" in fails("recommend", fitted, "--history", "nope")
    assert "'nope'" in fails("observe", fitted, "--user", "u1", "--item", "nope")
    assert "empty item id" in fails("rank", fitted, "--items", "i1,,i2")
    assert "twice" in fails("rank", fitted, "--items", "i1,i1")
    assert "k must be" in fails(*ask, "-k", 0)
    assert "seen must be" in fails(*ask, "--seen", "never")
    assert "needs words" in fails("search", fitted, " ")
    assert "minutes" in fails("finetune", fitted, "--minutes", 0)
    assert "not a saved recommender" in fails("recommend", tmp_path / "none", "--user", "u1")
    assert "not a known name" in fails("fetch", "no such name")
    tables = ("evaluate", "--items", "i.csv", "--events", "e.csv")
    assert "--no-lm leaves it out" in fails(*tables, "--no-lm", "--minutes", 3)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "nothing can be written" in fails(*tables, "--out", tmp_path / "report")
    assert "nothing can be written" in fails("fit", *tables[1:], "--out", tmp_path / "model")


def test_bad_conditions_say_where(fails, fitted):
    ask = ("recommend", fitted, "--user", "u1", "--where")
    assert "at character 11, before 'Acme}'" in fails(*ask, '{"brand": Acme}')
    assert "at the end" in fails(*ask, '{"brand": ')
    assert "must be a JSON object" in fails(*ask, '["brand"]')
    assert "brnd" in fails(*ask, '{"brnd": "Acme"}')
    caps = ("recommend", fitted, "--user", "u1", "--caps")
    assert "--caps is not JSON" in fails(*caps, "brand") and "--caps must be" in fails(*caps, "2")
    assert "brnd" in fails(*caps, '{"brnd": 2}')


def test_bad_data(fails, data, tmp_path):
    def fit(items=data / "items.jsonl", events=data / "events.csv", *more):
        return fails("fit", "--items", items, "--events", events, "--out", tmp_path / "out", *more)

    empty, no_time = tmp_path / "empty.csv", tmp_path / "no_time.csv"
    empty.touch()
    no_time.write_text("user_id,item_id\nu1,i1\n")
    assert "no such file" in fit(items=tmp_path / "none.csv")
    assert "the file is empty" in fit(events=empty)
    assert "no column 'timestamp'" in fit(events=no_time)
    assert "problem(s) in the configuration" in fit(data / "items.jsonl", no_time, "--clock", "maybe")
    assert "cannot read the configuration" in fit(
        data / "items.jsonl", no_time, "--config", tmp_path / "none.toml"
    )
    assert not (tmp_path / "out").exists()


def test_a_process_that_fails_says_so_in_one_line(tmp_path):
    done = run("recommend", tmp_path / "none", "--user", "u1", expect=2)
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- what is stopped -------------------------------------------------------------------------------


# A pytest in the background ignores Ctrl-C, and its children would inherit that.
STOPPABLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmrec.cli import main
main()
"""


def start_finetuning(model, data):
    return subprocess.Popen(
        [sys.executable, "-c", STOPPABLE, "finetune", str(model), "--config", str(data / "long.toml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def wait_for_checkpoint(process, path: Path, after=0):
    """Wait for a checkpoint that is younger than `after`, and return its time."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.stat().st_mtime_ns > after:
            return path.stat().st_mtime_ns
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint: {process.communicate(timeout=60)}")


def continued_at(stderr):
    return int(stderr.split("continuing from the checkpoint of step ")[1].split()[0])


def test_finetuning_goes_on_after_ctrl_c_and_after_a_kill(mine, data):
    checkpoint = mine / "training" / "checkpoint.safetensors"
    before = ids_of(mine)

    process = start_finetuning(mine, data)
    written = wait_for_checkpoint(process, checkpoint)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command continues" in stderr and "Traceback" not in stderr

    process = start_finetuning(mine, data)
    wait_for_checkpoint(process, checkpoint, after=max(written, checkpoint.stat().st_mtime_ns))
    process.kill()
    _, stderr = process.communicate(timeout=60)
    first = continued_at(stderr)
    assert 1 <= first < STEPS
    assert ids_of(mine) == before

    process = start_finetuning(mine, data)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert first < continued_at(stderr) < STEPS
    assert stdout.startswith(f"{STEPS} steps, ")
    assert not (mine / "training").exists()
    assert json.loads((mine / "manifest.json").read_text())["language_model"]


SAVE_FOR_EVER = """
import sys
from llmrec import Recommender
rec = Recommender.load(sys.argv[1])
print("ready", flush=True)
while True:
    rec.save(sys.argv[1])
"""


def test_a_kill_during_save_leaves_a_whole_recommender(tuned, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "model")
    expected = ids_of(folder)
    delays = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(folder)], stdout=subprocess.PIPE, env=ENVIRONMENT
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delays.uniform(0, 0.2))
        process.kill()
        process.communicate(timeout=60)
        assert ids_of(folder) == expected
    rec = Recommender.load(folder)
    rec.save(folder)
    rec.close()
    # The present one and the one before, which a reader may just be loading; what kills left is gone.
    assert len(list(folder.glob("state-*"))) == 2
