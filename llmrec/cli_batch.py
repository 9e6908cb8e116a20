"""`llmrec batch`: recommendations for many users and vectors for many texts, from parquet to parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmrec.batch import Batch, Task, run
from llmrec.cli_options import Index, Model, Store
from llmrec.cli_show import say, stderr

app = typer.Typer(
    no_args_is_help=True, help="Many at once, from parquet to parquet; goes on where it stopped."
)

Out = Annotated[Path, typer.Option(help="Folder of the parts; the same one goes on with a run.")]
Size = Annotated[int, typer.Option(help="Rows of a part.")]
Workers = Annotated[
    int, typer.Option(help="Actors of Ray, each with the model mapped from the same files; 1 needs no Ray.")
]
Address = Annotated[
    str | None, typer.Option(help="Of a Ray cluster, such as auto; Ray is started here if not given.")
]


@app.command()
def recommend(
    model: Model,
    out: Out,
    users: Annotated[
        str | None,
        typer.Option(help="Parquet with user_id or history (ids), and query; if not given, all with events."),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Items for each row.")] = 10,
    size: Size = 1000,
    workers: Workers = 1,
    address: Address = None,
    store: Store = None,
    index: Index = None,
) -> None:
    """Recommend to many users, as `llmrec recommend` would: row, user_id if given, rank, item_id, score."""
    _do("recommend", Batch("recommend", model, out, users, k, size, store, index), workers, address)


@app.command()
def embed(
    model: Model,
    out: Out,
    texts: Annotated[
        str | None,
        typer.Option(help="Parquet with text, and item_id or id; the catalogue's items if not given."),
    ] = None,
    size: Size = 1000,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Turn texts into vectors with the model's encoder."""
    _do("embed", Batch("embed", model, out, texts, 10, size), workers, address)


def _do(task: Task, batch: Batch, workers: int, address: str | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr) as bar:
        shown = bar.add_task(f"{task}, parts")
        told: list[int] = []

        def on_part(done: int, parts: int) -> None:
            told.append(done)
            bar.update(shown, completed=done, total=parts)

        rows = run(batch, workers, address, on_part)
    what = "users" if task == "recommend" else "texts"
    if len(told) > 1 or not rows:
        say(f"{rows:,} {what} done, in {batch.out}")
    else:
        say(f"nothing was computed: {rows:,} {what} were done before, in {batch.out}; take another folder")
