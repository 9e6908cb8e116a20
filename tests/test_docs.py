"""The blocks of the guide run as they stand, and it builds."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import polars as pl
import pytest

from llmrec import Recommender
from llmrec.catalog import Catalog
from llmrec.config import Config, DataConfig
from llmrec.errors import DataError
from llmrec.serve import ServeConfig, create_app
from llmrec.streaming import StreamedLog
from llmrec.testing import tiny_lm, toy_data

ROOT = Path(__file__).parent.parent
SECTIONS = re.findall(r"## (.+?)\n\n```python\n(.*?)```", (ROOT / "docs" / "frameworks.md").read_text(), re.S)
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when Haystack is imported


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the quickstart has saved its model."""
    folder, before = tmp_path_factory.mktemp("docs"), Path.cwd()
    quickstart = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    os.chdir(folder)
    try:
        exec(compile(quickstart, "README.md", "exec"), {})
    finally:
        os.chdir(before)
    return folder


def test_every_framework_has_a_short_block():
    assert [name for name, _ in SECTIONS] == ["LangChain", "LlamaIndex", "Haystack", "Chat APIs with tools"]
    assert all(len(code.splitlines()) <= 16 for _, code in SECTIONS)


@pytest.mark.parametrize(("name", "code"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_the_block_runs(name, code, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, name, "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    match name:
        case "LangChain":
            assert lines[0].startswith("['Toy Story', 'Toy Story 2'")
            assert lines[2].startswith('{"items": [{"item_id"')
        case "LlamaIndex":
            assert "Toy Story" in lines[0] and "Toy Story" in lines[1]
        case "Haystack":
            assert "Toy Story" in lines[0]
            assert names["again"].to_dict() == names["pipeline"].to_dict()
        case _:
            _, good, bad = lines
            assert '"title": "Alien"' in good
            assert bad == '{"error": "the request is invalid: k: Input should be less than or equal to 100"}'


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Where the first page was followed, and what it printed."""
    folder, before = tmp_path_factory.mktemp("guide"), Path.cwd()
    os.chdir(folder)
    try:
        names = {}
        for code in blocks("index.md"):
            exec(compile(code, "index.md", "exec"), names)
    finally:
        os.chdir(before)
    names["rec"].close()
    return folder


def run(page, names, **replaced):
    code = "\n".join(blocks(page))
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, page, "exec"), names)


def test_the_first_page_runs(guide):
    assert (guide / "model" / "manifest.json").is_file()
    rec = Recommender.load(guide / "model")
    # The pages that follow ask for these.
    assert all(rec.history(f"user{n}") for n in (1, 2, 3)) and not rec.history("user7")
    rec.close()


def test_the_page_about_data_runs_and_shows_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("data.md", {})
    found, *problems = capsys.readouterr().out.splitlines()
    assert eval(found) and "Red lipstick" not in found
    assert "nowhere" in "".join(problems) or "unknown item" in "".join(problems)


def test_the_page_about_evaluation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("evaluation.md", {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {"popularity", "merge", "default"} <= {name for name, *_ in printed}
    assert all(0 <= float(value) <= 1 for _, *values in printed for value in values)


def test_the_page_about_fine_tuning_runs(guide, monkeypatch, capsys):
    monkeypatch.chdir(guide)
    base = tiny_lm(guide / "lm")
    settings = f'[lm]\nbase = "{base}"\nlayers = 2\nrank = 4\nhead_dim = 16\nprecision = "float32"\n'
    Path("finetune.toml").write_text(settings, encoding="utf-8")
    names = {}
    run("finetuning.md", names, **{"minutes=20": "minutes=0.02"})
    assert names["rec"].adapters == ("shop-b",)
    names["rec"].close()
    assert capsys.readouterr().out.splitlines()[-1] == "('shop-b',)"
    modes, adapters = blocks("finetuning.md", "toml")
    config = Config.of(tomllib.loads(modes))
    assert [config.lm.mode, *(more.lm.mode for more in config.beside)] == ["item_tokens", "yes_no"]
    assert ServeConfig.of(tomllib.loads(adapters)).adapters["shop-b"].weight == 0.5


def test_the_page_about_scaling_sorts_a_log_for_a_stream(tmp_path, monkeypatch):
    items, events = toy_data(users=20, items=12)
    catalog = Catalog.load(items)
    table = pl.DataFrame(
        [{"user_id": e.user_id, "item_id": e.item_id, "timestamp": e.timestamp} for e in events]
    )
    monkeypatch.chdir(tmp_path)
    Path("log").mkdir()
    table[::2].write_parquet("log/a.parquet")
    table[1::2].write_parquet("log/b.parquet")
    with pytest.raises(DataError, match="is not sorted by user_id"):
        StreamedLog("log/*.parquet", catalog, DataConfig()).users  # noqa: B018
    run("scaling.md", {})
    stream = StreamedLog("events", catalog, DataConfig())
    assert (stream.users, stream.events) == (20, len(events))


def test_the_page_about_serving_runs(guide, monkeypatch, capsys):
    import uvicorn

    monkeypatch.chdir(guide)
    rec = Recommender.load("model")
    server = uvicorn.Server(uvicorn.Config(create_app(rec), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started and time.monotonic() < until:
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        run("serving.md", {}, **{"http://127.0.0.1:8000": f"http://127.0.0.1:{port}"})
    finally:
        server.should_exit = True
        thread.join()
        rec.close()
    shown, probable, ranked = map(eval, capsys.readouterr().out.splitlines())
    assert shown[0][0] == 1 and 0 < sum(probable.values()) < 1 and ranked[0] == "partner-7"
    (limits,) = blocks("serving.md", "toml")
    assert ServeConfig.of(tomllib.loads(limits.replace('"..."', f'"{"0" * 64}"'))).max_k == 50


def test_the_notebook_runs_from_log_to_report(tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "docs" / "from-log-to-report.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "kept without outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    names["rec"].close()
    assert (tmp_path / "report" / "index.html").is_file()
    assert "Because you chose" in capsys.readouterr().out
    # Everyone likes one kind: what was learned beats what is popular.
    systems = names["evaluation"].result["systems"]
    assert systems["default"]["ndcg@10"] > systems["popularity"]["ndcg@10"]


def test_the_guide_builds_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("**/index.html")}
    assert {"data", "finetuning", "evaluation", "serving", "frameworks", "scaling", "design"} <= set(pages)
    reference = pages["reference"]
    for name in ("recommend_many", "add_adapter", "budget_ms", "tokens_per_step", "max_candidates"):
        assert name in reference
    loaded = re.findall(
        r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", "".join(pages.values())
    )
    assert not loaded
