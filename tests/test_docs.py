"""The blocks of docs/frameworks.md run as they stand, after the quickstart."""

import os
import re
from pathlib import Path

import pytest

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
            assert lines[0] == "['Toy Story', 'Toy Story 2']" and lines[2].startswith('{"items": [{"item_id"')
        case "LlamaIndex":
            assert "Toy Story" in lines[0] and "Toy Story" in lines[1]
        case "Haystack":
            assert "Toy Story" in lines[0]
            assert names["again"].to_dict() == names["pipeline"].to_dict()
        case _:
            _, good, bad = lines
            assert '"title": "Alien"' in good
            assert bad == '{"error": "the request is invalid: k: Input should be less than or equal to 100"}'
