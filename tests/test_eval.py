"""The evaluation programs, run on toy data, and the tables that must say what the results say."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llmrec import cli
from llmrec.config import Config
from llmrec.metrics import summary
from llmrec.offline import evaluate
from llmrec.testing import tiny_lm, toy_data

ROOT = Path(__file__).parent.parent


def program(name):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    items, events = toy_data()
    rows = [
        {
            "item_id": i.item_id,
            "title": i.title,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in i.attributes.items()},
        }
        for i in items
    ]
    pl.DataFrame(rows).write_parquet(folder / "items.parquet")
    pl.DataFrame(
        [{"user_id": e.user_id, "item_id": e.item_id, "timestamp": e.timestamp} for e in events]
    ).write_parquet(folder / "events.parquet")
    base = tiny_lm(tmp_path_factory.mktemp("lm"))
    lines = ["[encoder]", 'name = "light"', "[lm]", f'base = "{base}"', "layers = 2", 'precision = "float32"']
    (folder / "c.toml").write_text("\n".join([*lines, "[training]", "steps = 10"]))
    return folder


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
