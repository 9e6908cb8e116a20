"""The commands that serve a recommender: over HTTP with MCP, and MCP over standard input and output."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrec.cli_options import Index, Limits, Model, Settings, Store
from llmrec.cli_show import say
from llmrec.errors import ConflictError

if TYPE_CHECKING:
    from llmrec.recommender import Recommender
    from llmrec.serve import ServeConfig
    from llmrec.serve.workers import Job


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send at once.

    asyncio sees to that for the sockets that it makes. Otherwise the second part of every answer on a kept
    connection would wait for the client's delayed acknowledgement, 40 ms on Linux.
    """
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def serve(
    model: Model,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not given.")] = None,
    port: Annotated[int | None, typer.Option(help="Port, 8000 if not given; 0 takes a free one.")] = None,
    config: Settings = None,
    store: Store = None,
    index: Index = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that answer, 1 if not given. Several take over a model that is saved in the "
            "directory, one by one, without a pause."
        ),
    ] = None,
) -> None:
    """Serve a recommender over HTTP, with MCP at /mcp, until Ctrl-C.

    A host that other machines can reach needs keys: the file of --config lists them as "keys", each with a
    name, the SHA-256 of the key, and a role, read or write.
    """
    from llmrec.serve import ServeConfig, create_app, run_app
    from llmrec.serve.workers import Job, Workers, end, load

    settings = ServeConfig.of(config, host=host, port=port, workers=workers)
    job = Job(model, settings, store, index)
    if settings.workers > 1:
        with listen(settings.host, settings.port) as listening:
            Workers(job, listening, say).run(lambda: _say_where(settings, listening))
        _keep_items(job)
        return
    rec = load(job)
    app = None
    try:
        app = create_app(rec, settings)
        with listen(settings.host, settings.port) as listening:
            _say_where(settings, listening)
            signal.signal(signal.SIGTERM, end)
            run_app(app, listening)
    finally:
        if app is not None and app.state.service.changed:
            _save(rec, model)
        rec.close()


def _save(rec: Recommender, model: Path) -> None:
    say(f"saving the items that changed in {model}")
    try:
        rec.save(model)
    except ConflictError as conflict:
        say(
            f"{conflict}. Items that were put or removed here are known to the other process if it "
            f"loaded this directory; if it replaced the directory, put them again"
        )


def _keep_items(job: Job) -> None:
    """Save what workers stored of items, so that who loads the directory need not encode them again."""
    from llmrec.recommender import Recommender

    rec = Recommender.load(job.model, store=job.store, index=job.index)
    try:
        if rec.unsaved_items:
            _save(rec, job.model)
    finally:
        rec.close()


def _say_where(settings: ServeConfig, listening: socket.socket) -> None:
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = listening.getsockname()[1]
    say(f"serving on http://{shown}:{port}, MCP at /mcp, OpenAPI at /docs; Ctrl-C ends")


def mcp(model: Model, config: Limits = None, store: Store = None) -> None:
    """Serve a recommender to one chat app: MCP over standard input and output."""
    from llmrec.recommender import Recommender
    from llmrec.serve import ServeConfig, Service, create_server

    rec = Recommender.load(model, store=store)
    service = Service(rec, ServeConfig.of(config))
    try:
        service.submit(service.warm_up)
        create_server(service).run("stdio")
    finally:
        service.close()
        rec.close()
