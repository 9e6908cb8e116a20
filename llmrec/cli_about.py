"""`llmrec about`: what a saved recommender holds, and what its language model is and brings."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from llmrec.cli_options import InJSON, Model
from llmrec.cli_show import harmless, weights_of


def about(model: Model, in_json: InJSON = False) -> None:
    """Say what is in a saved recommender: items, events, encoder, weights, language model."""
    told = described(model)
    if in_json:
        typer.echo(json.dumps(told, indent=1, ensure_ascii=False))
        return
    weights = {f"weights by {kind}": named for kind, named in told.pop("weights").items()}
    for name, value in (told | weights).items():
        for one in value if isinstance(value, list) else [value]:
            typer.echo(harmless(f"{name}: {_words(one)}"))


def described(folder: Path) -> dict[str, Any]:
    """What there is to say, by name.

    Raises
    ------
    ModelError, StoreError
        As `Recommender.load` does.
    """
    from llmrec.recommender import Recommender
    from llmrec.saved import open_events
    from llmrec.store.places import in_database

    rec = Recommender.load(folder)
    try:
        manifest, store, _ = open_events(folder.resolve(), None)
        with contextlib.closing(store):
            events = store.count()
        catalog = rec.catalog
        active, cards = int(catalog.active.sum()), (folder / manifest["state"]).rglob("card.json")
        return {
            "items": {
                "active": active,
                "removed": len(catalog) - active,
                "attributes": list(catalog.attributes),
            },
            "events": {"stored": events, "in": "PostgreSQL" if in_database(manifest["events"]) else "a file"},
            "encoder": {"name": rec.config.encoder.name, "dimensions": rec.texts.encoder.dim},
            "weights": weights_of(rec.recipe),
            "language model": [_model(card) for card in sorted(cards)],
            "saved by": f"llmrec {manifest.get('llmrec', 'of an unknown version')}",
        }
    finally:
        rec.close()


def _model(card: Path) -> dict[str, Any]:
    written = json.loads(card.read_text(encoding="utf-8"))
    config, training = written["config"], written["card"]["training"]
    data, blend = training.get("data", {}), training.get("blend", {})
    until = data.get("until")
    return {
        "mode": config["mode"],
        "base": config["base"],
        "events": data.get("events"),
        "until": None if until is None else datetime.fromtimestamp(until, UTC).date().isoformat(),
        "weight": blend.get("weight"),
        "weight with typed words": blend.get("query_weight"),
        "gain": {key: blend.get(key) for key in ("metric", "difference", "ci95", "users", "shown")},
    }


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value}"
