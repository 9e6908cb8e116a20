"""Serving a recommender to chat and search apps: a service without transport, HTTP and MCP around it."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

from llmrec.serve.config import ApiKey, ServeConfig
from llmrec.serve.service import Service

if TYPE_CHECKING:
    import socket
    from pathlib import Path
    from types import FrameType

    from fastapi import FastAPI
    from mcp.server.mcpserver import MCPServer

    from llmrec.recommender import Recommender

GRACE_SECONDS = 30
"""How long the end waits for requests under way; one that is never sent whole must not hold it up."""

DRAIN_SECONDS = 1.0
"""How long a server that ends goes on answering, with the word that it closes the connection."""

__all__ = ["ApiKey", "ServeConfig", "Service", "create_app", "create_server", "run_app"]


def create_app(
    recommender: Recommender, config: ServeConfig | None = None, *, counted: Path | None = None
) -> FastAPI:
    """Make the HTTP app, with MCP at ``/mcp``; see `llmrec.serve.http.create_app`.

    Raises
    ------
    ImportError
        If the packages for serving are not installed.
    """
    try:
        from llmrec.serve.http import create_app as create
    except ImportError as missing:
        raise ImportError('serving over HTTP needs: pip install "llmrec[serve]"') from missing
    return create(recommender, config, counted=counted)


def create_server(recommender: Recommender | Service, *, writable: bool = True) -> MCPServer:
    """Make the MCP server; see `llmrec.serve.mcp.create_server`.

    Raises
    ------
    ImportError
        If the packages for serving are not installed.
    """
    try:
        from llmrec.serve.mcp import create_server as create
    except ImportError as missing:
        raise ImportError('serving over MCP needs: pip install "llmrec[serve]"') from missing
    return create(recommender, writable=writable)


def run_app(app: FastAPI, listening: socket.socket) -> None:
    """Answer on a socket until SIGINT or SIGTERM; what is under way then has `GRACE_SECONDS` to finish.

    On SIGTERM, answers tell clients for `DRAIN_SECONDS` that their connections will be closed, so that none
    is closed while a request is on its way.

    Raises
    ------
    ImportError
        If the packages for serving are not installed.
    """
    try:
        import uvicorn
    except ImportError as missing:
        raise ImportError('serving over HTTP needs: pip install "llmrec[serve]"') from missing
    # The access log would hold user ids; what went wrong is logged by the app.
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if sig != signal.SIGTERM or app.state.draining:
                super().handle_exit(sig, frame)
                return
            app.state.draining = True
            later = threading.Timer(DRAIN_SECONDS, super().handle_exit, (sig, frame))
            later.daemon = True
            later.start()

    Server(settings).run(sockets=[listening])
