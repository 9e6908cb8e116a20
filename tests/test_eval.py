"""The evaluation programs, run on toy data, and the tables that must say what the results say."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from programs import ROOT, program, write_data

from llmrec import cli
from llmrec.config import Config
from llmrec.errors import ConfigError, DataError
from llmrec.metrics import summary
from llmrec.offline import evaluate
from llmrec.protocols import Query
from llmrec.score.config import TrainingConfig, WordsConfig
from llmrec.score.labels import yes_no_labels
from llmrec.score.loading import load_causal
from llmrec.score.packed import forward, row_of
from llmrec.score.tasks import Choice
from llmrec.score.trie import Tree
from llmrec.sequences import Source
from llmrec.testing import tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def found(folder):
    return evaluate(
        folder / "items.parquet",
        folder / "events.parquet",
        Config.of(folder / "c.toml").with_flags(protocol={"users": 20, "seed": 3}),
    )


def test_every_system_is_measured_on_the_same_users_and_on_all_where_it_can_be(found):
    result = found.result
    names = {"popularity", "ease", "transitions", "profile", "merge", "lm", "lm_top100", "default"}
    assert set(result["systems"]) == names == set(found.ranks)
    assert {len(r) for r in found.ranks.values()} == {20}
    left_out = {"lm", "lm_top100"} | ({"default"} if result["recipe"]["history"]["lm"] > 0 else set())
    assert set(result["systems_all_users"]) == names - left_out
    for name, ranks in found.ranks.items():
        assert result["systems"][name] == summary(ranks)
    assert {"a", "b", "metric", "difference", "ci95", "p", "users"} < set(result["comparisons"][0])
    json.dumps(result)


def test_the_planted_rule_is_found_and_the_transitions_beat_popularity(found):
    systems = found.result["systems_all_users"]
    assert systems["transitions"]["ndcg@10"] > 2 * systems["popularity"]["ndcg@10"]


def test_the_ranks_of_one_list_of_100_put_the_merge_before_what_it_was_reranked_from(found):
    # Both order the same hundred candidates: what one finds the other finds.
    merge, again = found.ranks["merge"], found.ranks["lm_top100"]
    np.testing.assert_array_equal(merge > 0, again > 0)


def test_run_writes_results_and_ranks_and_logs_each_reading_of_test(folder, tmp_path, monkeypatch, capsys):
    run = program("eval/run")
    monkeypatch.setattr(run, "HERE", tmp_path)
    arguments = ["--data", str(folder), "--config", str(folder / "c.toml"), "--out", str(tmp_path), "--no-lm"]
    run.main(arguments)
    assert not (tmp_path / "LOG.md").exists()
    run.main([*arguments, "--final", "--name", "toy-test-x"])
    assert "toy-test-x.json" in (tmp_path / "LOG.md").read_text()
    result = json.loads((tmp_path / "toy-test-x.json").read_text())
    with np.load(tmp_path / "toy-test-x.ranks.npz") as ranks:
        assert summary(ranks["merge"].astype(np.int64)) == result["systems"]["merge"]
    assert "merge" in capsys.readouterr().out


def test_the_tables_say_what_the_results_say():
    program("eval/tables").main(["--check"])


def test_the_fine_tuning_program_runs_and_goes_on_with_what_is_there(folder, tmp_path, capsys):
    lora = program("finetune/lora")
    arguments = ["--items", str(folder / "items.parquet"), "--events", str(folder / "events.parquet")]
    arguments += ["--out", str(tmp_path / "model"), "--config", str(folder / "c.toml")]
    lora.main(arguments)
    assert "10 steps" in capsys.readouterr().out
    lora.main(arguments)
    assert "10 steps" in capsys.readouterr().out


def test_the_command_line_evaluates_and_writes_what_it_measured(folder, tmp_path, monkeypatch, capsys):
    arguments = [
        "evaluate",
        "--items",
        str(folder / "items.parquet"),
        "--events",
        str(folder / "events.parquet"),
    ]
    arguments += [
        "--config",
        str(folder / "c.toml"),
        "--no-lm",
        "--core",
        "2",
        "--json",
        str(tmp_path / "r.json"),
    ]
    monkeypatch.setattr("sys.argv", ["llmrec", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["protocol"]["part"] == "test"
    assert result["dataset"]["core"] == 2
    assert "transitions" in capsys.readouterr().out


SHARED = ROOT.parent / "shared" / "data"


def official_movielens(folder, out):
    """Write parquet files back in the form in which GroupLens gives them out."""
    items, events = (pl.read_parquet(folder / f"{t}.parquet") for t in ("items", "events"))
    out.mkdir()
    genres = pl.col("genres").str.replace_all(", ", "|")
    items.select(pl.col("item_id").alias("movieId"), "title", genres).write_csv(out / "movies.csv")
    names = {"user_id": "userId", "item_id": "movieId"}
    events.rename(names).select("userId", "movieId", "rating", "timestamp").write_csv(out / "ratings.csv")


@pytest.mark.skipif(not (SHARED / "ml-latest-small").is_dir(), reason="needs the data of ml-latest-small")
def test_official_movielens_files_become_the_tables_of_the_published_results(tmp_path, capsys):
    prepare = program("eval/prepare")
    official_movielens(SHARED / "ml-latest-small", tmp_path / "official")
    prepare.main(["ml-latest-small", str(tmp_path / "official"), "--out", str(tmp_path / "out")])
    said = json.loads(capsys.readouterr().out)
    assert said["log_sha256"] == prepare.HASHES["ml-latest-small"][1]
    events = pl.read_parquet(tmp_path / "out" / "events.parquet")
    events.head(-1).write_parquet(tmp_path / "out" / "events.parquet")
    with pytest.raises(DataError, match="events 100835, expected 100836"):
        prepare.main(["ml-latest-small", str(tmp_path / "out"), "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_amazon_files_are_read_and_a_smaller_log_is_refused(tmp_path):
    prepare = program("eval/prepare")
    review = {"reviewerID": "u", "asin": "a1", "overall": 5.0}
    lines = [json.dumps({**review, "unixReviewTime": t, "asin": a}) for t, a in ((9, "a1"), (3, "a2"))]
    (tmp_path / "reviews.json").write_text("\n".join(lines))
    meta = [
        {"asin": "a1", "title": "Mascara", "categories": [["Beauty", "Eyes"]], "brand": "X", "price": 3.5},
        {"asin": "a2", "categories": [["Beauty"]]},
        {"asin": "never reviewed", "title": "x"},
    ]
    (tmp_path / "meta.json").write_text("\n".join(map(repr, meta)))
    items, events = prepare.amazon(tmp_path / "reviews.json", tmp_path / "meta.json")
    assert items["categories"].to_list() == ["Beauty, Eyes", "Beauty"] and items["title"][1] is None
    assert events["item_id"].to_list() == ["a2", "a1"]
    arguments = ["amazon-beauty", str(tmp_path / "reviews.json"), str(tmp_path / "meta.json")]
    with pytest.raises(DataError, match="users 1, expected 22363"):
        prepare.main([*arguments, "--out", str(tmp_path / "out")])


TRIALS = """
[default]
detail = true
[zero-shot]
events = 0
against = "default"
[random-lora]
weights = "random"
against = "default"
[vocabulary]
lm = { mode = "likelihood", normalise = "vocabulary", window = 4 }
tokens = 12
against = "default"
[yes-no]
lm = { mode = "yes_no", window = 4, listed = 4, mined = 20 }
negatives = "random"
tokens = 100
[sasrec]
retriever = "sasrec"
against = "default"
[latest]
lm = { window = 4, wishes = 1.0, prompt = "latest.md" }
latest = 2
"""


def test_ablations_hold_each_trial_against_another_and_are_not_repeated(
    folder, tmp_path, capsys, monkeypatch
):
    ablations = program("eval/ablations")
    monkeypatch.setattr(ablations, "HERE", tmp_path / "eval")
    monkeypatch.setattr(ablations, "RUNS", tmp_path / "runs")
    (tmp_path / "trials.toml").write_text(TRIALS)
    shutil.copytree(ROOT / "eval" / "ablations", tmp_path / "eval" / "ablations")
    sizes = ["--events", "900", "--words", "60", "--users", "30", "--few", "10", "--out", str(tmp_path)]
    given = [
        "--data",
        str(folder),
        "--config",
        str(folder / "c.toml"),
        "--trials",
        str(tmp_path / "trials.toml"),
    ]
    ablations.main([*given, *sizes, "--name", "toy"])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "toy").glob("*.json")}
    assert len(kept) == 7
    ablations.main([*given, *sizes, "--name", "toy"])
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    ablations.main([*given, *sizes, "--name", "toy", "--gather"])
    result = json.loads((tmp_path / "toy-ablations.json").read_text())
    found = result["trials"]
    assert found["zero-shot"]["training"]["events"] == 0 < found["default"]["training"]["events"]
    assert {"alone", "first 20", "last 5"} < set(found["default"]["systems"])
    assert set(found["yes-no"]["systems"]) == {"first 20"} and set(found["sasrec"]["systems"]) == {"alone"}
    pairs = {(c["a"], c["b"], c["of"]) for c in result["comparisons"]}
    assert ("random-lora", "default", "alone") in pairs and ("vocabulary", "default", "first 20") in pairs
    for c in result["comparisons"]:
        own, other = (found[c[side]]["systems"][c["of"]]["ndcg@10"] for side in "ab")
        assert c["difference"] == pytest.approx(own - other)
    # The table has a row a trial, with what was measured.
    rows = program("eval/tables_trials").ablations("toy-ablations", result).splitlines()
    for trial, own in found.items():
        (row,) = [row for row in rows if row.startswith((f"| {trial} |", f"| {trial}: "))]
        for values in (own["systems"].get(kind) for kind in ("alone", "first 20")):
            assert values is None or f"| {values['ndcg@10']:.4f} " in row
    assert any("(to default)" in row for row in rows if row.startswith("| random-lora"))
    # Trials of another machine are held against what is published, and without its ranks nothing is lost.
    (tmp_path / "runs" / "toy" / "default.json").unlink()
    ablations.main([*given, *sizes, "--name", "toy", "--gather"])
    assert json.loads((tmp_path / "toy-ablations.json").read_text()) == result
    (tmp_path / "toy-ablations.ranks.npz").unlink()
    ablations.main([*given, *sizes, "--name", "toy", "--gather"])
    again = json.loads((tmp_path / "toy-ablations.json").read_text())
    assert again["trials"] == found
    assert sorted(map(str, again["comparisons"])) == sorted(map(str, result["comparisons"]))
    # What belongs to an earlier run of a trial is not shown beside a later one.
    changed = {**found["default"], "seconds": 0.0}
    (tmp_path / "runs" / "toy" / "default.json").write_text(json.dumps(changed))
    (tmp_path / "runs" / "toy" / "default.npz").unlink()
    ablations.main([*given, *sizes, "--name", "toy", "--gather"])
    assert not json.loads((tmp_path / "toy-ablations.json").read_text())["comparisons"]
    # Nor a trial that was run otherwise than it is described, here or before, and none is lost unsaid.
    (tmp_path / "trials.toml").write_text(TRIALS.replace('normalise = "vocabulary", ', ""))
    for _ in range(2):
        with pytest.raises(ConfigError, match="run: vocabulary"):
            ablations.main([*given, *sizes, "--name", "toy", "--gather"])
        (tmp_path / "runs" / "toy" / "vocabulary.json").unlink(missing_ok=True)
    (tmp_path / "trials.toml").write_text(TRIALS.replace("[vocabulary]", "[words]"))
    with pytest.raises(ConfigError, match=r"no longer described.*vocabulary"):
        ablations.main([*given, *sizes, "--name", "toy", "--gather"])
    ablations.main([*given, *sizes, "--name", "toy", "--gather", "--drop", "vocabulary"])
    assert "vocabulary" not in json.loads((tmp_path / "toy-ablations.json").read_text())["trials"]


def test_the_latest_items_in_words_come_before_the_item_that_is_predicted():
    words = program("eval/latest_words")
    written = []

    class Wish:
        def tokens(self, text):
            written.append(text)
            return [len(text), 7]

    latest = words.Latest(Wish(), ["a", "b", "c", "d"], 2)
    source = Source([np.array([0, 1, 2, 3], np.int32), np.array([2], np.int32)], None)
    task = words.LatestTask(latest, None, source, 4, TrainingConfig())
    windows = [window for batch in task.epoch(np.random.default_rng(0)) for window in batch]
    assert {len(window): tuple(window.typed) for window in windows} == {4: (4, 7), 1: ()}
    assert written == ["c; b"]
    asked = words.InWords(SimpleNamespace(score=lambda queries, lists: queries), latest)
    (query,) = asked.score([Query(np.array([3, 0, 2], np.int32))], [])
    assert query.text == "c; a" and query.history.tolist() == [3, 0, 2]


def test_what_workers_of_other_libraries_are_given_and_judge_by(tmp_path):
    split = program("eval/peer_split")
    rng = np.random.default_rng(0)
    histories = [rng.permutation(40)[:n] for n in (3, 1, 7)]
    split.write_split(tmp_path, histories, np.array([2, 0]), np.array([1]), np.array([5]))
    there, asked = split.read_split(tmp_path)
    assert [h.tolist() for h in there] == [h.tolist() for h in histories] and asked.tolist() == [2, 0]
    assert [part.tolist() for part in split.read_judges(tmp_path)] == [[1], [5]]
    rows, items, places = split.columns(there)
    assert [items[(rows == row)][np.argsort(places[rows == row])].tolist() for row in range(3)] == [
        h.tolist() for h in histories
    ]
    lists = [rng.permutation(40)[:100] for _ in range(200)]
    targets = rng.integers(0, 40, 200)
    ranks = np.array([int(np.flatnonzero(own == t)[0]) + 1 for own, t in zip(lists, targets, strict=True)])
    assert split.ndcg_at_10(lists, targets) == pytest.approx(summary(ranks, ["ndcg@10"])["ndcg@10"])
    split.write_lists(tmp_path, "some", [np.arange(3), np.arange(150)], 1.5)
    written = np.load(tmp_path / "some.npz")["lists"]
    assert written.shape == (2, 100) and (written[0, 3:] == -1).all() and written[1, 99] == 99


def test_answers_of_peers_are_taken_up_from_the_results_for_the_same_users_and_merge(tmp_path):
    peers = program("eval/peers")
    asked = SimpleNamespace(targets=np.arange(4), sha256=lambda: "users")
    here = SimpleNamespace(
        folder=tmp_path / "runs", published=tmp_path / "toy-peers.json", key="k", data="toy", minutes=1.0,
        asked=asked, judging=asked, timed="{} (1 min)".format,
    )  # fmt: skip
    here.folder.mkdir()
    ranks = {"merge": np.array([1, 0, 3, 2]), "implicit als": np.array([2, 1, 0, 0])}
    found = {name: peers.Found(own, 2.5, {"trees": 3}) for name, own in ranks.items()}
    assert peers.kept(here, "merge") is None
    peers.keep(here, "merge", found["merge"])
    assert peers.kept(here, "implicit als") is None
    np.testing.assert_array_equal(peers.kept(here, "merge").ranks, ranks["merge"])
    compared = peers.publish(here, found)
    assert {(c.a, c.b) for c in compared} == {("merge", "implicit als")}
    elsewhere = SimpleNamespace(**{**vars(here), "folder": tmp_path / "new"})
    for name, own in found.items():
        again = peers.kept(elsewhere, name)
        np.testing.assert_array_equal(again.ranks, own.ranks)
        assert (again.seconds, again.notes) == (2.5, {"trees": 3})
    other = SimpleNamespace(**{**vars(elsewhere), "key": "another merge"})
    assert peers.kept(other, "merge") is None


def test_the_cross_encoder_is_asked_as_plain_transformers_are_and_learns(tmp_path):
    from transformers import AutoModelForCausalLM

    cross, base = program("eval/peer_cross"), tiny_lm(tmp_path / "lm", seed=1)
    shape = WordsConfig(mode="yes_no", base=str(base), window=3, rank=4)
    scorer = cross.CrossScorer(base, ["some thing", "another one", "a third", "last"], shape)
    query, items = Query(np.array([0, 2], np.int32)), np.array([1, 3], np.int32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    words = scorer.prompt
    yes, no = yes_no_labels(words.vocabulary)
    expected = []
    for code in items:
        tokens = [*words.beginning(query.history), *words.stem(query), *words.lines[code]]
        tokens += [words.vocabulary.end, *words.last]
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([tokens])).logits[0, -1]
        expected.append(float(logits[yes] - logits[no]))
    # It reads in bfloat16.
    (before,) = scorer.score([query], [items])
    np.testing.assert_allclose(before, expected, atol=0.05)
    choices = [Choice(query, items, 1, 1.0)] * 40
    seconds, pairs = scorer.train(choices, 0.1, tmp_path / "run", "key")
    (after,) = scorer.score([query], [items])
    assert seconds >= 6 and pairs % cross.BATCH == 0 < pairs
    assert after[1] - after[0] > before[1] - before[0]

    # A killed run goes on: it does not learn again, and asks those alone who were not asked.
    again = cross.CrossScorer(base, ["some thing", "another one", "a third", "last"], shape)
    assert again.train(choices, 0.1, tmp_path / "run", "key") == (seconds, pairs)
    first, second = again.score([query, query], [items[::-1], items])
    np.testing.assert_array_equal(first, after)
    np.testing.assert_allclose(second, after, atol=1e-4)
    assert again.asking > scorer.asking
    # That of another data set does not, however little the time lets it learn.
    other = cross.CrossScorer(base, ["some thing", "another one", "a third", "last"], shape)
    assert other.train(choices, 0.0, tmp_path / "run", "another key") != (seconds, pairs)
    (fresh,) = other.score([query], [items])
    np.testing.assert_allclose(fresh, before, atol=0.05)
    assert np.abs(fresh - after).max() > 0.1


def test_the_trials_that_are_shipped_are_valid_and_held_against_trials_that_there_are():
    ablations = program("eval/ablations")
    trials = ablations.described(ROOT / "eval" / "ablations" / "trials.toml", 900, 60)
    for trial in trials.values():
        ablations.settings(Config(), trial)
        assert trial.get("against", "default") in trials


def test_the_memory_program_writes_what_it_found(folder, tmp_path, capsys):
    program("eval/memory").main(
        [
            "--data",
            str(folder),
            "--base",
            str(tiny_lm(tmp_path / "lm")),
            "--users",
            "9",
            "--out",
            str(tmp_path),
        ]
    )
    (path,) = tmp_path.glob("*-memory.json")
    assert json.loads(path.read_text())["gain_nats"]["users"] == 9
    assert "nats" in capsys.readouterr().out


def test_the_scale_program_fits_a_skewed_log_and_times_requests(tmp_path, capsys):
    scale = program("eval/scale")
    items, events = scale.synthetic(events=4000, items=120, users=150, seed=1)
    counts = events["item_id"].value_counts()["count"].sort(descending=True)
    assert counts[0] > 20 * counts.median() and events["user_id"].n_unique() == 150
    assert set(events["item_id"]) <= set(items["item_id"]) and 3000 < len(events) < 5000
    again = scale.synthetic(events=4000, items=120, users=150, seed=1)
    assert items.equals(again[0]) and events.equals(again[1])
    out = tmp_path / "scale.json"
    sizes = ["--events", "4000", "--items", "120", "--users", "150", "--batch", "100"]
    scale.main([*sizes, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["batch"]["users"] == 100 and found["batch"]["seconds"] > 0
    for row in (found["all_returned"], found["ten_returned"]):
        assert row["batch_ms"] > 0 and row["single_ms"] <= row["single_p95_ms"]
    assert found["fit_seconds"] > 0
    assert "fitting on all events" in capsys.readouterr().out
    twice = {**found, "items": 240, "fit_seconds": 4 * found["fit_seconds"]}
    rows = scale.growth([found, twice], "items")["rows"]
    assert rows["fit, s"]["exponent"] == pytest.approx(2) and rows["fit, MB"]["exponent"] == 0
    stages = {"reading": 0.0, "encoding, 1 of 2": 1.0, "encoding, 2 of 2": 3.0, "fitted": 7.0}
    assert scale.durations(stages) == {"reading": 1.0, "encoding": 6.0}


def test_the_limits_program_measures_ease_the_trie_and_states(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    limits = program("eval/limits")
    at_once, among = limits.ease(300, together=True), limits.ease(300, together=False)
    # Chance is below .01.
    assert min(at_once["ndcg@10"], among["ndcg@10"]) > 0.03 and at_once["solved"] != among["solved"]
    path = str(tmp_path / "lines")
    assert limits.tokens(400, path, str(tiny_lm(tmp_path / "lm")))["titles"] == 400
    built, opened = limits.build(400, path), limits.opened(400, path)
    assert built["nodes"] > 400 and opened["stage"] == "open the trie"
    assert limits.states(3000)["recall@100"] > 0.9


def test_the_encoder_program_trains_and_judges_similar_items(folder, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    base = tiny_lm(tmp_path / "lm", layers=1, hidden=32)
    SentenceTransformer(modules=[Transformer(str(base)), Pooling(32, "mean")]).save(str(tmp_path / "base"))
    (tmp_path / "c.toml").write_text(f'[encoder]\nname = "{tmp_path / "base"}"\n')
    arguments = ["--items", str(folder / "items.parquet"), "--events", str(folder / "events.parquet")]
    arguments += ["--out", str(tmp_path / "out"), "--config", str(tmp_path / "c.toml"), "--steps", "5"]
    program("finetune/encoder").main(arguments)
    said = capsys.readouterr().out
    assert "5 steps" in said and "after - before" in said and (tmp_path / "out").is_dir()


def test_the_load_program_measures_real_servers(folder, tmp_path, capsys):
    load = program("eval/load")
    arguments = ["--items", "60", "--users", "40", "--clients", "1", "3", "--seconds", "0.5"]
    arguments += ["--budgets", "0.001", "60000", "--mixed-minutes", "0.05", "--in-process", "70"]
    out = tmp_path / "load.json"
    load.main([*arguments, "--steps", "2", "--config", str(folder / "c.toml"), "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["command"].startswith("python eval/load.py --items 60") and result["environment"]
    (size,) = result["sizes"]
    for name in ("without_language_model", "with_language_model"):
        found = size[name]
        for part in found["clients"].values():
            assert part["requests"] > 0 and part["errors"] == {}
            assert 0 < part["p50_ms"] <= part["p95_ms"] <= part["p99_ms"]
        assert found["in_process"]["batch_of_32_ms"] > 0
    mixed = size["with_language_model"]["mixed"]
    assert mixed["requests"] > 0 and mixed["errors"] == {} and len(mixed["memory_mb"]) == 10
    budgets = size["with_language_model"]["budgets_ms"]
    assert [budgets[b]["degraded"] for b in ("0.001", "60000")] == [1.0, 0.0]
    assert all(part["degraded"] == 0 for part in size["without_language_model"]["clients"].values())


def test_the_timing_of_candidates_counts_what_is_read_and_keeps_systems_side_by_side(tmp_path):
    speed = program("eval/speed")
    body, _ = load_causal(tiny_lm(tmp_path, seed=1), None, torch.float32)
    tree, _ = Tree.of([[5, 6, 7], [5, 8]])
    row = row_of([3, 4, 9], tree)
    asked, order = [(Query(np.array([0], np.int32)), np.arange(2, dtype=np.int32))] * 6, []

    def packed(query, items):
        order.append("packed")
        return forward(body.eval(), [row], keep=False)

    def plain(query, items):
        order.append("plain")
        return body(input_ids=torch.tensor([[3, 4, 9, 5]] * 2), use_cache=False)

    systems = [
        speed.System("packed", packed, body),
        speed.System("plain", plain, body, slow=True),
        speed.System("elsewhere", lambda query, items: None, None),
    ]
    with speed.reads_of(body) as read:
        packed(*asked[0])
        plain(*asked[0])
    assert read == [speed.Read(7, int(row.sees.sum())), speed.Read(8, 2 * 10)]
    order.clear()
    *rows, elsewhere = speed.timed(systems, asked, torch.float32)
    assert elsewhere["memory_mb"] is elsewhere["positions"] is elsewhere["share_of_limit"] is None
    assert order == ["packed", "plain"] * (1 + speed.SLOW) + ["packed"] * (5 - speed.SLOW)
    assert [row["requests"] for row in rows] == [5, speed.SLOW]
    assert [row["positions"] for row in rows] == [7, 8]
    assert all(len(row["shared_ms"]) == speed.SLOW for row in rows)
    assert speed.best_batch(systems[:1], *asked[0]) is systems[0]
    assert all(row["share_of_limit"] > 0 and row["p95_ms"] >= row["median_ms"] > 0 for row in rows)
    # The pairs of so long a prompt take more than its linear layers.
    alone = speed.limit_seconds(body, [speed.Read(4096, 0)], torch.float32)
    assert speed.limit_seconds(body, [speed.Read(4096, 4096**2)], torch.float32) > 2 * alone > 0
    told = [
        {"system": name, "precision": "float32", "candidates": 20, "median_ms": ms[0], "shared_ms": ms}
        for name, ms in (("CrossEncoder, batches of 8", [50.0, 70.0, 60.0]), ("ours", [4.0, 10.0, 1.0]))
    ]
    ratios = speed.with_ratios(told)
    assert [row["times_as_fast_as_cross_encoder"] for row in ratios] == [1.0, 12.5]
    table = program("eval/tables_speed").speed(
        {
            "command": "c", "base": "b", "history": 20, "data": "d", "items": 9, "threads": 2,
            "environment": {"machine": "m"},
            "systems": [
                row | {"p95_ms": 60.0, "positions": 7, "share_of_limit": 0.5, "requests": 3, "memory_mb": 9}
                for row in ratios
            ]
            + [{**ratios[1], **elsewhere, "system": "elsewhere"}],
        },
        short=True,
    )  # fmt: skip
    (line,) = [line for line in table.splitlines() if line.startswith("| elsewhere")]
    assert line.endswith("|  |  |  |")
    assert "| ours | 4.0 | 60.0 | 3 | 12.5 | 7 | 0.50 | 9 |" in table


LLAMA = """
import math


class Options:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = Sizes(), Sizes(), Sizes()


class Sizes:
    pass


CommonParams = Options


class Server:
    def __init__(self, params):
        assert params.model.path == "some.gguf" and params.cpuparams_batch.n_threads == 2

    def handle_completions(self, asked):
        raised = dict(asked["logit_bias"])
        total = sum(asked["prompt"])
        logits = {token: math.sin(token * total) + raised.get(token, 0.0) for token in range(50)}
        total = sum(map(math.exp, logits.values()))
        top = sorted(logits, key=logits.get, reverse=True)[: asked["n_probs"]]
        rows = [{"id": token, "prob": math.exp(logits[token]) / total} for token in top]
        return {"choices": [{"logprobs": {"content": [{"top_probs": rows}]}}]}
"""


def test_llama_cpp_is_asked_for_two_labels_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "xllamacpp.py").write_text(LLAMA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    llama = program("eval/speed_llama").Llama(Path(sys.executable), Path("some.gguf"), 2)
    prompts = [[1, 2, 3], [4]]
    expected = [np.sin(7 * sum(prompt)) - np.sin(9 * sum(prompt)) for prompt in prompts]
    np.testing.assert_allclose(llama.score(prompts, [7, 9]), expected, atol=1e-9)
    llama.close()
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('no such processor')")
    with pytest.raises(ConfigError, match=r"(?s)does not start:.*no such processor"):
        program("eval/speed_llama").Llama(Path(sys.executable), Path("some.gguf"), 2)
    with pytest.raises(ConfigError, match="no GGUF file"):
        program("eval/speed_llama").started("some/folder", tmp_path, 2)
