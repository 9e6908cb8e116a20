"""The package as a whole: what importing it loads, which way its imports run, and what it ships."""

import ast
import itertools
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llmrec
from llmrec.config import Config
from llmrec.stages import FITTING
from llmrec.testing import tiny_lm, toy_data

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmrec"

# Lowest first. A module imports from lower layers only; those of one layer do not know each other.
LAYERS = [
    {"errors", "timing"},
    {"types"},
    {"protocols"},
    {"budget", "quiet", "environment", "ranking", "metrics", "prompt", "text", "words", "rows", "tables"},
    {"attributes", "clock", "database", "weights"},
    {"catalog"},
    {"rules", "events", "sequences", "titles"},
    {"candidates"},
    {"encode", "explain", "index", "retrieve", "score", "store"},
    {"pipeline", "fusion", "arrange"},
    {"families"},
    {"recipe"},
    {"features"},
    {"blending"},
    {"search"},
    {"selection"},
    {"encoder_training", "evaluation", "fetch", "lora", "persistence", "processes", "progress", "tensors"},
    {"run_log", "sharding"},
    {"training"},
    {"card", "config"},
    {"model_card"},
    {"adapter"},
    {"word_model"},
    {"remote_model"},
    {"language_model"},
    {"several"},
    {"assembly"},
    {"state", "saved", "streaming"},
    {"mining"},
    {"lm_training"},
    {"tuning", "stages", "answering", "seeds"},
    {"continuing"},
    {"offline", "asking"},
    {"changing"},
    {"recommender"},
    {"testing", "cli_options", "cli_show", "serve", "batch"},
    {"cli_about", "cli_change", "cli_evaluate", "cli_serve", "client", "adapters"},
    {"cli_batch"},
    {"cli"},
]
HEAVY = {"torch", "transformers", "sentence_transformers", "peft", "accelerate", "datasets"}


def layer_of(module):
    return next((n for n, layer in enumerate(LAYERS) if module in layer), None)


def imported(path):
    """Every imported name, those inside functions included, e.g. ``llmrec.score.config``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module == "llmrec":
                yield from (f"llmrec.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield node.module


def test_importing_the_library_or_its_command_line_loads_no_model_library():
    code = f"import sys, llmrec, llmrec.cli, llmrec.testing; print(sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_imports_run_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        mine = layer_of(own)
        assert mine is not None, f"{path} belongs to no layer: add it to LAYERS"
        for name in imported(path):
            root, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if root in ("tests", "eval", "finetune"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            elif root == "llmrec" and other != own and (layer_of(other) is None or layer_of(other) >= mine):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_kept_stages_are_made_anew_when_any_source_that_decides_them_changes():
    seen, left = set(), {"selection", "families"}
    while left:
        seen |= left
        files = [
            file
            for name in left
            for file in (
                (PACKAGE / name).rglob("*.py") if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"]
            )
        ]
        names = {
            name.split(".")[1] for file in files for name in imported(file) if name.startswith("llmrec.")
        }
        left = names - seen
    # What holds or says something, and decides nothing.
    assert seen - set(FITTING) == {"budget", "database", "errors", "quiet", "types"}


def test_every_toml_file_is_a_valid_configuration():
    skipped = {"build", "dist", "runs", "site"}
    files = [
        path
        for path in ROOT.rglob("*.toml")
        # What ablations change is checked in test_eval.py.
        if path.name not in ("pyproject.toml", "trials.toml")
        and not any(p.startswith(".") or p in skipped for p in path.relative_to(ROOT).parts)
    ]
    assert files
    for path in files:
        Config.of(path)


def test_the_version_is_the_same_everywhere():
    with (ROOT / "pyproject.toml").open("rb") as opened:
        assert tomllib.load(opened)["project"]["version"] == llmrec.__version__


def test_toy_data_follows_its_rule():
    items, events = toy_data(users=80, items=30, seed=3)
    assert (items, events) == toy_data(users=80, items=30, seed=3)
    assert events != toy_data(users=80, items=30, seed=4)[1]
    assert len({item.title for item in items}) == len(items) == 30
    assert {event.item_id for event in events} <= {item.item_id for item in items}
    kept, pairs = 0, 0
    for before, after in itertools.pairwise(events):
        if before.user_id == after.user_id:
            assert before.timestamp < after.timestamp
            pairs += 1
            kept += int(after.item_id[1:]) == (int(before.item_id[1:]) + 1) % 30
    assert 0.65 < kept / pairs < 0.95


@pytest.mark.parametrize("items", [1, 2, 300])
def test_toy_data_of_any_size(items):
    catalogue, events = toy_data(users=3, items=items)
    assert len({item.title for item in catalogue}) == items and {e.user_id for e in events} == {
        "u0",
        "u1",
        "u2",
    }


def test_the_tiny_language_model_loads_and_reads_any_text(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = torch.get_rng_state()
    folder = tiny_lm(tmp_path / "lm", layers=3, hidden=16)
    assert torch.equal(state, torch.get_rng_state())
    assert sum(file.stat().st_size for file in folder.glob("tokenizer*")) < 100_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("What this person chose:", "Žluťoučký kůň ½ 猫 🎬\n"):
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.decode(tokens[1:]) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 3 and model.dtype == torch.float32
    assert model(torch.tensor([tokens])).logits.shape == (1, len(tokens), len(tokenizer))
    again = tiny_lm(tmp_path / "again", layers=3, hidden=16)
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_the_container_files_name_what_is_there():
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    command = compose["services"]["llmrec"]["command"]
    docker = (ROOT / "Dockerfile").read_text()
    for line in docker.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
    with (ROOT / "pyproject.toml").open("rb") as opened:
        extras = tomllib.load(opened)["project"]["optional-dependencies"]
    named = docker.split('".[')[1].split("]")[0].split(",")
    assert set(named) <= set(extras)
    said = subprocess.run(
        [sys.executable, "-m", "llmrec.cli", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    options = [part.split("=")[0] for part in command if part.startswith("--")]
    assert options and all(option in said for option in options)
    assert all(
        volume.startswith(("./", "${HOME}/")) or volume.split(":")[0] in compose["volumes"]
        for service in compose["services"].values()
        for volume in service["volumes"]
    )
