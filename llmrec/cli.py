"""The command line: what `Recommender` does, for files and a shell.

Results are on standard output, everything else on standard error. Exit codes: 0, 2 for what the user can
mend (one line ``error: ...``), 130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperGroup

from llmrec import __version__
from llmrec.cli_about import about
from llmrec.cli_batch import app as batch
from llmrec.cli_change import add_items, forget, observe, refit, remove_items
from llmrec.cli_evaluate import evaluate
from llmrec.cli_options import Count, History, InJSON, Model, User, Where, Words, ids_of, object_of, where_of
from llmrec.cli_serve import mcp, serve
from llmrec.cli_show import say, say_weights, show, show_families, show_known, stages, stderr, training_bar
from llmrec.errors import ConflictError, LLMRecError, RequestError

if TYPE_CHECKING:
    from llmrec.recommender import Recommender


class _Commands(TyperGroup):
    """Ends a command with one line on standard error instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read our output has seen enough; typer ends quietly.
            raise
        except (LLMRecError, ImportError, OSError) as error:
            say(f"error: {error}")
            raise typer.Exit(2) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """From a purchase log to recommendations reranked by a LoRA-tuned language model."""


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Known names or hub ids.")] = None,
    allow_hub: Annotated[bool, typer.Option("--allow-hub", help="A model hub may be asked.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the known names.")] = False,
) -> None:
    """Fetch models and data by name and print their folders; without names, list what is known."""
    from llmrec.fetch import fetch_with_progress, known

    if listed or not names:
        show_known(known())
        return
    for folder in fetch_with_progress(names, allow_hub=allow_hub, console=stderr):
        typer.echo(str(folder))


@app.command()
def fit(
    items: Annotated[str, typer.Option(help="Items: .parquet, .csv(.gz), .tsv(.gz), .jsonl(.gz), .item.")],
    out: Annotated[Path, typer.Option(help="Directory of the recommender.")],
    events: Annotated[
        str | None,
        typer.Option(help="Events: .parquet, .csv(.gz), .tsv(.gz), .jsonl(.gz), .inter. Left out: none yet."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; the flags below win over it.")] = None,
    clock: Annotated[str | None, typer.Option(help="time, or none: rows are in order.")] = None,
    policy: Annotated[str | None, typer.Option(help="Bad rows: raise, or drop and count.")] = None,
    ties: Annotated[str | None, typer.Option(help="Equal time stamps: order of input, or item id.")] = None,
    encoder: Annotated[str | None, typer.Option(help="light, a known name, hub id or folder.")] = None,
    search: Annotated[
        float | None, typer.Option(help="Try all families for so many minutes; keep those that pay.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Keep events in a database: postgresql+psycopg://...", show_default=False),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a recommender that is there, with its stored events.")
    ] = False,
) -> None:
    """Fit a recommender on a catalogue and a log, and save it.

    To take new events and items into one that is there: observe, add-items and refit.
    """
    from llmrec.assembly import read_catalog, read_log
    from llmrec.config import Config
    from llmrec.events import EventLog
    from llmrec.persistence import MANIFEST, check_place
    from llmrec.recommender import Recommender

    # Before anything is computed.
    check_place(out.resolve())
    if (out / MANIFEST).is_file() and not replace:
        raise ConflictError(
            f"{out} holds a recommender. Take new data into it with `llmrec observe --events`, `add-items` "
            "and `refit`; or give --replace, which drops its stored events, items and language model"
        )
    settings = Config.of(config).with_flags(
        data={"clock": clock, "policy": policy, "ties": ties},
        encoder={"name": encoder},
        retrieval={"search_minutes": search},
        store={"url": store},
    )
    with stages() as on_stage:
        on_stage("reading items and events")
        catalog = read_catalog(items, settings.data)
        log = (
            EventLog.none(settings.data.clock) if events is None else read_log(events, catalog, settings.data)
        )
        rec = Recommender.fit(catalog, log, settings, on_stage=on_stage)
        on_stage("saving")
        rec.save(out)
    say(f"items: {catalog.report}")
    if events is None:
        say("events: none yet, texts decide; then observe, and refit --choose")
    else:
        say("; ".join(filter(None, [f"events: {log.report}", log.span()])))
    if search is not None:
        show_families(rec.recipe)
    say_weights(rec.recipe)
    typer.echo(str(out))


@app.command()
def finetune(
    model: Model,
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes to train each model; those of the configuration if not given, or 20."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file; its lm, training, beside and allow_hub count.")
    ] = None,
    further: Annotated[
        bool, typer.Option("--continue", help="Continue the tuned model on the events that came since.")
    ] = False,
    stream: Annotated[
        str | None,
        typer.Option(help="Files of events sorted by user, to learn from; larger than the memory."),
    ] = None,
) -> None:
    """Fine-tune the language model on the stored log, choose its weight, and save.

    An interrupted run goes on from its last checkpoint when the same command is given again. With --continue
    the retrievers are fitted on all stored events too, and the continued model is kept unless it is shown to
    be worse than the one before on new events.
    """
    from llmrec.recommender import Recommender

    rec = Recommender.load(model)
    if config is not None:
        rec.configure(config)
    if minutes is not None and not minutes > 0:
        raise RequestError(f"--minutes must be above 0, got {minutes:g}")
    if stream is not None:
        say("counting the events of the stream first")
    try:
        with training_bar() as on_step:
            report = rec.finetune(minutes, on_step=on_step, since="last" if further else None, stream=stream)
        if further:
            rec.refit()
        try:
            rec.save(model)
        except ConflictError as conflict:
            # Minutes of training are not thrown away.
            other = model.resolve().with_name(f"{model.resolve().name}-{uuid.uuid4().hex[:8]}")
            rec.save(other)
            say(f"saved as {other}: {conflict}")
    except KeyboardInterrupt:
        kept = (model / "training" / "checkpoint.safetensors").is_file()
        say(
            "stopped; the last checkpoint is kept, the same command continues from there"
            if kept
            else "stopped before the first checkpoint; the same command starts again"
        )
        raise
    typer.echo(str(report))


@app.command()
def recommend(
    model: Model,
    user: User = None,
    history: History = None,
    query: Words = None,
    k: Count = 10,
    where: Where = None,
    exclude: Annotated[
        str | None, typer.Option(help="Item ids never to return, with commas between.")
    ] = None,
    seen: Annotated[
        str, typer.Option(help="May items of the history return: auto, include, exclude.")
    ] = "auto",
    caps: Annotated[
        str | None, typer.Option(help="""At most so many of a value, as JSON: '{"brand": 2}'.""")
    ] = None,
    pins: Annotated[str | None, typer.Option(help="Item ids that come first, with commas between.")] = None,
    diversity: Annotated[float, typer.Option(help="0: by score alone, to 1: as unlike as can be.")] = 0.0,
    by_stage: Annotated[
        bool, typer.Option("--stages", help="Show what each stage alone would answer.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say why, for each item.")] = False,
    phrase: Annotated[
        bool, typer.Option("--phrase", help="Say why in the model's own words, where these stay true.")
    ] = False,
    in_json: InJSON = False,
) -> None:
    """Recommend items to a user, for a history, for typed words, or for words and one of the others."""
    from llmrec.recommender import Recommender
    from llmrec.types import Request

    if user is None and history is None and query is None:
        raise RequestError("whom for? give --user, --history or --query")
    fields: dict[str, Any] = {
        "user": user,
        "history": ids_of("--history", history),
        "query": query,
        "k": k,
        "where": where_of(where),
        "exclude": ids_of("--exclude", exclude) or [],
        "seen": seen,
        "caps": object_of("--caps", caps, '{"brand": 2}'),
        "pins": ids_of("--pins", pins) or [],
        "diversity": diversity,
        "explain": explain or phrase,
    }
    request = Request(**fields)
    rec = Recommender.load(model)
    if user is not None and history is None and not rec.history(user, limit=1):
        say(f"no events of a user {user!r} are stored: what follows is for somebody new")
    _say_unknown(rec, request.history)
    found = rec.stages(request) if by_stage else {"": rec.recommend(request)}
    if phrase:
        found = {name: rec.phrase(items) for name, items in found.items()}
    show(found if by_stage else found[""], in_json=in_json)


@app.command()
def similar(
    model: Model,
    item: Annotated[str, typer.Argument(help="Item id.")],
    k: Count = 10,
    where: Where = None,
    in_json: InJSON = False,
) -> None:
    """Show items like one item."""
    from llmrec.recommender import Recommender

    conditions = where_of(where)
    show(Recommender.load(model).similar(item, k, conditions), in_json=in_json)


@app.command()
def search(
    model: Model,
    text: Annotated[str, typer.Argument(help="What to look for, in words.")],
    user: User = None,
    k: Count = 10,
    where: Where = None,
    in_json: InJSON = False,
) -> None:
    """Search the catalogue, personalised where a user is given."""
    from llmrec.recommender import Recommender

    conditions = where_of(where)
    show(Recommender.load(model).search(text, user, k, conditions), in_json=in_json)


@app.command()
def rank(
    model: Model,
    items: Annotated[str, typer.Option(help="Item ids to order, with commas between.")],
    user: User = None,
    history: History = None,
    query: Words = None,
    in_json: InJSON = False,
) -> None:
    """Order given items, best first; all of them come back."""
    from llmrec.recommender import Recommender

    ids, past = ids_of("--items", items) or [], ids_of("--history", history)
    rec = Recommender.load(model)
    _say_unknown(rec, past)
    show(rec.rank(ids, user, past, query), in_json=in_json)


def _say_unknown(rec: Recommender, history: Sequence[Any] | None) -> None:
    unknown = [item for item in history or () if item not in rec.catalog]
    if unknown:
        say(f"not in the catalogue, so that they do not count: {', '.join(map(repr, unknown))}")


app.command()(about)
app.command()(observe)
app.command("add-items")(add_items)
app.command("remove-items")(remove_items)
app.command()(refit)
app.command()(forget)
app.command()(evaluate)
app.command()(serve)
app.command()(mcp)
app.add_typer(batch, name="batch")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # The handler has a level of its own, since some libraries set that of their loggers to DEBUG.
    handler = RichHandler(logging.WARNING, stderr, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
