"""Commands that change a saved recommender: events, items, forgetting, fitting again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrec.cli_options import Model, ids_of
from llmrec.cli_show import say, say_weights, stages
from llmrec.errors import RequestError


def observe(
    model: Model,
    user: Annotated[str | None, typer.Option(help="User id.")] = None,
    item: Annotated[str | None, typer.Option(help="Item id.")] = None,
    event: Annotated[str | None, typer.Option(help="Its type, as data.event_weights has it.")] = None,
    events: Annotated[
        str | None, typer.Option(help="Instead: a file of events, with time stamps, as `fit` reads them.")
    ] = None,
) -> None:
    """Store an event that happened now, or those of a file that are new; they count in the next request."""
    from llmrec.recommender import Recommender

    one = user is not None and item is not None
    if one == (events is not None) or (user is None) != (item is None):
        raise RequestError("what happened? give --user and --item, or --events")
    rec = Recommender.load(model)
    if user is not None and item is not None:
        stored = rec.observe(user, item, event=event)
        say(f"{'stored' if stored else 'of weight 0, not stored'}: user {user!r}, item {item!r}")
        return
    report, new = rec.observe_table(events)
    say(f"events: {report}; {new:,} new")


def add_items(
    model: Model, items: Annotated[str, typer.Option(help="A file of items, as `fit` reads them.")]
) -> None:
    """Add the items of a file, or replace those with the same id; recommendable at once by their text."""
    from llmrec.assembly import read_catalog
    from llmrec.recommender import Recommender

    rec = Recommender.load(model)
    catalog = read_catalog(items, rec.config.data, rec.catalog.attributes)
    rec.add_items(catalog.items(range(len(catalog))))
    # With their vectors: who loads it need not encode them again.
    rec.save(model)
    say(f"items: {catalog.report}")


def remove_items(
    model: Model, items: Annotated[str, typer.Option(help="Item ids, with commas between.")]
) -> None:
    """Remove items: they are never returned again, unless they are added again."""
    from llmrec.recommender import Recommender

    ids = ids_of("--items", items) or []
    Recommender.load(model).remove_items(ids)
    say(f"removed: {', '.join(ids)}")


def refit(
    model: Model,
    choose: Annotated[
        bool,
        typer.Option("--choose", help="Choose settings and weights anew; drops a tuned language model."),
    ] = False,
) -> None:
    """Fit the retrievers again on all stored events; settings, weights and language model stay."""
    from llmrec.recommender import Recommender

    rec = Recommender.load(model)
    with stages() as on_stage:
        rec.refit(choose=choose, on_stage=on_stage)
        on_stage("saving")
        rec.save(model)
    if choose:
        say_weights(rec.recipe)
    typer.echo(str(model))


def forget(
    model: Model,
    user: Annotated[str | None, typer.Option(help="User id.")] = None,
    users: Annotated[Path | None, typer.Option(help="Instead: a text file of user ids, one a line.")] = None,
) -> None:
    """Erase all events of a user, or of many at once."""
    from llmrec.recommender import Recommender

    if (user is None) == (users is None):
        raise RequestError("whom to forget? give --user or --users")
    gone = [user] if user is not None else []
    if users is not None:
        try:
            gone = [line for line in users.read_text(encoding="utf-8-sig").split("\n") if line]
        except UnicodeDecodeError as broken:
            raise RequestError(f"{users} is no text in UTF-8: {broken.reason}") from None
    count = Recommender.load(model).forget(gone)
    whose = f"user {user!r}" if user is not None else f"{len(gone):,} users"
    say(f"erased {count:,} event{'s' * (count != 1)} of {whose}")
