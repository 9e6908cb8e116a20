"""What every HTTP request passes first: an id, a key, a limit on its size, and a last resort for errors.

Plain ASGI, so that it stands around the routes of the app and around MCP alike.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from llmrec.serve.config import Role, ServeConfig, is_loopback
from llmrec.serve.models import Problem

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
"""Paths that need no key."""
PAGE = "/page/"
"""Files of the page at ``/`` need none either: the page asks for one."""

BODY_SECONDS = 30
"""A body that takes longer is not waited for."""

PROBLEM = "application/problem+json"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")


def problem(
    status: int, detail: str, code: str, request_id: str, errors: list[dict[str, str]] | None = None
) -> bytes:
    """Return an error as JSON, RFC 9457."""
    made = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id,
        errors=errors,
    )
    return json.dumps(made.model_dump(exclude_none=True)).encode()


class Gate:
    """ASGI middleware.

    Sets ``request_id`` and ``role`` in the state of a request.

    Parameters
    ----------
    app
        What comes after.
    config
        Keys and the largest body.
    on_done
        Told of each answer: scope, status and seconds.
    draining
        Says whether the server is about to end, so that clients should connect anew.
    """

    def __init__(
        self,
        app: App,
        config: ServeConfig,
        on_done: Callable[[Scope, int, float], None],
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app, self._config, self._on_done, self._draining = app, config, on_done, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        role = self._config.role_of(_key(headers))
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "role": role}
        began, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                closes = [(b"connection", b"close")] if self._draining() else []
                named = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", []), named, *closes]
            await send(message)

        try:
            free = scope["path"] in OPEN or scope["path"].startswith(PAGE)
            if not free:
                self._admit(scope, headers, role)
            # Who has no key could fill the memory.
            body = await _body(receive, headers, 0 if free else self._config.max_body)
            await self._app(scope, _replay(body, receive), answer)
        except _Refused as refused:
            await _tell(answer, refused, request_id)
        except Exception:
            # The route, not the path: that may name a user.
            route = getattr(scope.get("route"), "path", "(no route)")
            logger.exception("request %s failed: %s %s", request_id, scope["method"], route)
            if status:
                raise
            detail = f"an error inside the server; its log has it under the request id {request_id}"
            await _tell(answer, _Refused(500, detail, "internal"), request_id)
        finally:
            self._on_done(scope, status, time.monotonic() - began)

    def _admit(self, scope: Scope, headers: Mapping[str, str], role: Role | None) -> None:
        if not self._config.keys:
            alone, advice = "a server without keys answers this machine alone", "or add a key"
            if not is_loopback(_host(headers)):
                host = headers.get("host", "")
                raise _Refused(
                    421,
                    f"{alone}, and the request was sent to {host!r}: call 127.0.0.1 or localhost, {advice}",
                    "misdirected",
                )
            if _is_elsewhere(scope, headers):
                came = "the request comes from another, or by a proxy: ask directly"
                raise _Refused(421, f"{alone}, and {came}, {advice}", "misdirected")
        if role is None:
            detail = "this server needs a key it knows, in a header: Authorization: Bearer KEY"
            raise _Refused(401, detail, "unauthorized", (b"www-authenticate", b"Bearer"))


class _Refused(Exception):
    """Ends a request before the app has seen it."""

    def __init__(self, status: int, detail: str, code: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(detail)
        self.status, self.detail, self.code, self.headers = status, detail, code, headers


async def _tell(send: Send, refused: _Refused, request_id: str) -> None:
    body = problem(refused.status, refused.detail, refused.code, request_id)
    length = (b"content-length", str(len(body)).encode())
    head = [(b"content-type", PROBLEM.encode()), length, *refused.headers]
    await send({"type": "http.response.start", "status": refused.status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _host(headers: Mapping[str, str]) -> str:
    """Name or address that the request was sent to.

    A page of another site can make a browser call this machine under a name of its own, and would read what
    it answers; that name is all that tells such a request apart.
    """
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _key(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
    # The hash of a key is that of its UTF-8 bytes; headers were read as Latin-1.
    return None if given is None else given.encode("latin-1").decode("utf-8", "replace")


def _is_elsewhere(scope: Scope, headers: Mapping[str, str]) -> bool:
    """Whether a request comes from another machine, itself or by a proxy on this one."""
    client = scope.get("client")
    try:
        near = not client or is_loopback(str(_plain(ipaddress.ip_address(client[0]))))
    except ValueError:
        near = True  # no address: a socket of this machine, or a test
    return not near or "forwarded" in headers or "x-forwarded-for" in headers


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Any:
    """An IPv4 address that is written as one of IPv6 as it is."""
    return getattr(address, "ipv4_mapped", None) or address


async def _body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """The whole body, see `_whole`; refused where it takes longer than `BODY_SECONDS`."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _whole(receive, headers, limit)
    except TimeoutError:
        detail = f"the body did not come within {BODY_SECONDS} seconds"
        raise _Refused(408, detail, "timeout", (b"connection", b"close")) from None


async def _whole(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """Read the whole body; refused if it is larger than the limit, said or found, or holds broken text."""
    too_large = _Refused(413, f"the body may have {limit:,} bytes at most", "too_large")
    said = headers.get("content-length", "")
    if said.isdigit() and int(said) > limit:
        raise too_large
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large
        more = message.get("more_body", False)
    body = b"".join(parts)
    if not _is_text(body):
        detail = "the body is no UTF-8, or a text in it holds half of a surrogate pair, such as \\ud800 alone"
        raise _Refused(400, detail, "bad_request")
    return body


def _is_text(body: bytes) -> bool:
    r"""Whether all texts of a JSON body can be stored and answered.

    Python reads ``"\ud800"`` alone, but cannot write it. What is no JSON is left to whoever reads it.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    if b"\\ud" not in body and b"\\uD" not in body:
        return True
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (ValueError, RecursionError):
        pass
    return True


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read, then whatever comes next, such as the end of the connection."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
