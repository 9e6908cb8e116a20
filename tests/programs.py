"""The programs of `eval/` and `finetune/`, as modules, and toy data in a folder as they are given it."""

import importlib.util
import sys
from pathlib import Path

import polars as pl
import pytest

from llmrec.testing import tiny_lm, toy_data

ROOT = Path(__file__).parent.parent


def program(name):
    """The module of a program, by its path without its ending."""
    path = ROOT / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    # As a program that is run finds what lies beside it.
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


def write_data(folder, lm):
    """Items, events and a configuration with a tiny language model, made in the folder `lm`."""
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
    lines = ["[encoder]", 'name = "light"', "[lm]", f'base = "{tiny_lm(lm)}"', "layers = 2"]
    lines += ['precision = "float32"', "[training]", "steps = 10"]
    (folder / "c.toml").write_text("\n".join(lines))
    return folder
