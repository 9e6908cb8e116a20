"""What the README promises runs as written."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_quickstart_runs_and_is_short(tmp_path, monkeypatch, capsys):
    code, rules, newcomers = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 24
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = [eval(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 6
    assert printed[2][:2] == ["Toy Story", "Toy Story 2"]
    assert 0 < sum(printed[5].values()) < 1
    assert (tmp_path / "model" / "manifest.json").is_file()
    exec(compile(rules, "README.md", "exec"), names)
    reasons = capsys.readouterr().out.splitlines()
    assert reasons[0] == "1. Heat: Pinned by the request." and len(reasons) >= 3
    assert all(": Because you chose " in line for line in reasons[1:-1]) and "Influence(" in reasons[-1]
    exec(compile(newcomers, "README.md", "exec"), names)
    after, shown = [eval(line) for line in capsys.readouterr().out.splitlines()]
    asked = {names["first"][0].title, names["first"][1].title}
    assert after and shown and not asked & set(after)


def test_every_file_in_the_layout_exists():
    root = Path(__file__).parent.parent
    layout = README.split("## Layout")[1].split("```")[1]
    for name in re.findall(r"[a-z_]+\.py", layout):
        assert any((root / folder / name).is_file() for folder in ("llmrec", "eval", "finetune")), name
