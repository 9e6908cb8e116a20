"""The page that lies beside an adapter: what it is, what it was trained on and with, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmrec.card import Card
from llmrec.score.config import LMConfig

READS = {
    "item_tokens": "It reads a history as one vector an item and scores the whole catalogue in one pass.",
    "likelihood": "It reads items as words and gives each the probability of its line among all lines.",
    "generate": "It reads items as words and proposes some itself, by beam search over the lines there are.",
    "yes_no": "It reads items as words and says of each candidate whether it comes next.",
    "letters": "It reads all candidates in one prompt and answers with the letter of what comes next.",
}


def model_card(config: LMConfig, card: Card) -> str:
    """Markdown for people: data, settings, curve, measures, licence of the base, and how to load it.

    What an older version did not note is left out.
    """
    made = card.training
    base = base_name(config.base)
    parts = [
        _head(base, made),
        f"# {base}, tuned to recommend\n\nA LoRA adapter and a head, in mode `{config.mode}`. "
        f"{READS[config.mode]}",
        _section("Data", _table(("", ""), _data(card))),
        _section("Training", _training(made)),
        _section("Curve", _curve(made.get("curve", ()))),
        _section("What it brings", _brings(made)),
        _section("How to load it", _loading(config)),
        _section("What it belongs to", _belongs(card)),
        _section("Settings", _table(("setting", "value"), _settings(config, made))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    if not lines:
        return ""
    drawn = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in drawn)


def _head(base: str, made: Mapping[str, Any]) -> str:
    """Fields for programs that read the page."""
    licence = made.get("licence", "unknown")
    return f'---\nbase_model: "{base}"\nlicense: "{licence}"\nlibrary_name: llmrec\n---'


def _data(card: Card) -> list[tuple[str, str]]:
    data = card.training.get("data", {})
    named = {
        "users": "users",
        "events": "events",
        "items": "items in the catalogue",
        "held_out": "users whose last event is held out",
    }
    rows = [(words, f"{data[key]:,}") for key, words in named.items() if key in data]
    if data.get("until") is not None:
        rows.append(
            ("newest event", datetime.fromtimestamp(data["until"], UTC).strftime("%Y-%m-%d %H:%M UTC"))
        )
    return [*rows, ("sha256 of the log", f"`{card.data_sha256}`")]


def _training(made: Mapping[str, Any]) -> str:
    if "steps" not in made:
        return ""
    text = (
        f"{made['steps']:,} steps over {made['events']:,} events in {made['seconds'] / 60:.1f} minutes "
        f"({made['events_per_second']:.0f} events a second)."
    )
    if made.get("early"):
        text += f" It ended before its budget, since {made.get('reason') or 'the held-out loss rose'}."
    if "continued" in made:
        told = made["continued"]["summary"].splitlines()
        text += "\n\n" + "\n".join(f"- {line}" for line in told)
    return text


def _curve(rows: Sequence[Mapping[str, float]]) -> str:
    """One row a validation; the best is marked."""
    if not rows:
        return ""
    columns = [name for name in rows[0] if name != "seconds"]
    best = max(range(len(rows)), key=lambda i: rows[i]["ndcg@10"])
    drawn = []
    for number, row in enumerate(rows):
        cells = [_number(row.get(name)) for name in columns]
        drawn.append([*cells, "kept" if number == best else ""])
    return "Validation on held-out events, the model alone.\n\n" + _table([*columns, ""], drawn)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _brings(made: Mapping[str, Any]) -> str:
    blend = made.get("blend")
    if not blend:
        return ""
    used = f"Its weight in the blend is {blend['weight']:g}, with typed words {blend['query_weight']:g}."
    if not blend["weight"] and not blend["query_weight"]:
        used = "Its weight in the blend is 0: on held-out events it adds nothing beyond noise."
    low, high = blend["ci95"]
    return (
        f"{used}\n\nThe blend with it less the blend without it, {blend['metric']}: "
        f"{blend['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}] over {blend['users']:,} users: "
        f"{blend['where']}."
    )


def _loading(config: LMConfig) -> str:
    base = base_name(config.base)
    # What is no known name is an id of a model hub, which has to be allowed.
    hub = ", allow_hub=True" if "/" in base else ""
    return (
        "With the recommender in whose directory it lies:\n\n"
        "```python\n"
        "from llmrec import Recommender\n\n"
        'rec = Recommender.load("model/")\n'
        'rec.stages(user="42")["language model"]  # the adapter alone\n'
        "```\n\n"
        "Alone, for a catalogue in words and vectors (`rec.texts`):\n\n"
        "```python\n"
        "from pathlib import Path\n\n"
        "from llmrec.fetch import resolve\n"
        "from llmrec.language_model import load_language_model\n\n"
        f'base = resolve("{base}"{hub})\n'
        'lm = load_language_model(Path("adapter"), base, rec.texts, data=None)\n'
        "```\n\n"
        "`adapter_model.safetensors` and `adapter_config.json` are peft's, `head.safetensors` is ours."
    )


def base_name(base: str) -> str:
    """The base as others can ask for it: a known name or a hub id, or the last part of a folder here."""
    return Path(base).name if Path(base).is_absolute() or Path(base).is_dir() else base


def _belongs(card: Card) -> str:
    names = ("base", "tokenizer", "prompt", "renderer", "encoder")
    rows = [(name, f"`{getattr(card, f'{name}_sha256')}`") for name in names]
    made_with = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    return (
        "It refuses to load on another base, tokenizer, prompt, renderer or encoder.\n\n"
        + _table(("", "sha256"), rows)
        + f"\n\nMade with {made_with}. Licence of the base: {card.training.get('licence', 'unknown')}."
    )


def _settings(config: LMConfig, made: Mapping[str, Any]) -> list[tuple[str, Any]]:
    own = {**config.model_dump(), "base": base_name(config.base)}
    rows = [(f"lm.{name}", value) for name, value in own.items()]
    return rows + [(f"training.{name}", value) for name, value in made.get("settings", {}).items()]
