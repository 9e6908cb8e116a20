"""What commands of the command line take: arguments they share, and how lists and JSON in them are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmrec.errors import RequestError

Model = Annotated[Path, typer.Argument(help="Directory of a saved recommender.", show_default=False)]
User = Annotated[str | None, typer.Option(help="User whose stored history is used.")]
History = Annotated[str | None, typer.Option(help="Item ids, oldest first, with commas between.")]
Words = Annotated[str | None, typer.Option("--query", help="A wish typed in words.")]
Count = Annotated[int, typer.Option("-k", help="How many at most.")]
Where = Annotated[str | None, typer.Option(help="""Conditions as JSON: '{"year": {"gte": 1990}}'.""")]
InJSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Store = Annotated[
    str | None,
    typer.Option(
        help="postgresql+psycopg://...: events in a file are moved there first. LLMREC_STORE_URL, which the "
        "list of processes does not show, is enough for a model whose events are there already.",
        show_default=False,
    ),
]
Index = Annotated[
    str | None,
    typer.Option(
        help="postgresql+psycopg://... or http://host:19530 (Milvus): the vectors are searched there. "
        "LLMREC_INDEX_URL is enough for a model that was saved with them there.",
        show_default=False,
    ),
]
Settings = Annotated[
    Path | None, typer.Option("--config", help="TOML file: keys, adapters, limits, batching.")
]
Limits = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file: limits and batching; keys and adapters are for `llmrec serve`."
    ),
]


def ids_of(flag: str, text: str | None) -> list[str] | None:
    """Split ids at commas."""
    if text is None:
        return None
    ids = [part.strip() for part in text.split(",")]
    if not all(ids):
        raise RequestError(f"{flag} has an empty item id: {text!r}; write ids with one comma between them")
    return ids


def where_of(text: str | None) -> dict[str, Any] | None:
    """Read conditions."""
    return object_of("--where", text, '{"genres": "Comedy"}')


def object_of(flag: str, text: str | None, example: str) -> dict[str, Any] | None:
    """Read a JSON object."""
    if text is None:
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as wrong:
        at = text[wrong.pos : wrong.pos + 20]
        found = f"before {at!r}" if at else "at the end"
        raise RequestError(f"{flag} is not JSON: {wrong.msg} at character {wrong.pos + 1}, {found}") from None
    if not isinstance(values, dict):
        raise RequestError(f"{flag} must be a JSON object such as {example}, got {text}")
    return values
