"""HTTP connections for servers that ask for a token: what uvicorn leaves open, for `sppo sandbox serve` and `sppo rollout serve`.

uvicorn speaks HTTP. It does not limit the time of a request, so `Connection` does: a client without a token has a few
seconds per request, and is dropped first when there are too many connections. Anything but a plain request (an
unexpected body, two lengths) is refused and its connection closed.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS, BACKLOG = 512, 128
"""Connections open at a time, and accepted at a time: few enough that a new one is read before others can displace it.
"""
HEAD_SECONDS, BODY_SECONDS, IDLE_SECONDS = 10.0, 300.0, 30
"""How long a client may take over a request's head and over its body, and how long a connection may lie idle."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that has an address and does not listen there yet; port 0 takes a free one. Raises OSError, or
    OverflowError for a port that is none."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except BaseException:
        made.close()
        raise
    return made


def listening(host: str, port: int) -> socket.socket:
    """The same, listening."""
    made = bound(host, port)
    made.listen(BACKLOG)
    return made


def http_server(application: ASGIApp, token: str, idle_seconds: int = IDLE_SECONDS) -> uvicorn.Server:
    """uvicorn with connections that are limited; it logs nothing."""
    config = uvicorn.Config(
        application, http=functools.partial(Connection, places=Places(token)), ws="none", lifespan="off", interface="asgi3", log_config=None,  # type: ignore[arg-type]
        log_level="critical", access_log=False, server_header=False, proxy_headers=False, backlog=BACKLOG,
        timeout_keep_alive=idle_seconds, timeout_graceful_shutdown=1,
    )  # fmt: skip
    return uvicorn.Server(config)


def plain(request: Request) -> None:
    """Raises Refusal for a request that two readers could cut at different places."""
    headers, size = request.headers, request.headers.getlist("content-length")
    if "transfer-encoding" in headers or len(size) > 1 or (request.method != "POST" and size not in ([], ["0"])):
        raise Refusal(400, "send a body with POST only, and its length in one Content-Length")


class Places:
    """The open connections in order of arrival, and which of them is closed when there are too many."""

    def __init__(self, token: str, most: int = MOST_CONNECTIONS) -> None:
        self.token, self.most = token, most
        self.open: dict[Connection, None] = {}

    def enter(self, newcomer: Connection) -> None:
        """Keep a new connection, and end the oldest that has shown no token, else the oldest that is idle, if there are
        too many."""
        self.open[newcomer] = None
        if len(self.open) > self.most:
            strangers = (c for c in self.open if c is not newcomer and not c.known)
            idle = (c for c in self.open if c is not newcomer and c.phase == "head")
            (next(strangers, None) or next(idle, None) or newcomer).abandon()

    def leave(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self.open.pop(connection, None)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit on each part of a request."""

    def __init__(self, *args: Any, places: Places, **options: Any) -> None:
        super().__init__(*args, **options)
        self.places, self.known = places, False
        self._clock: asyncio.TimerHandle | None = None
        self._timed = ""

    @property
    def phase(self) -> str:
        """What the client is to do next: send a request's `head`, its `body`, or wait for its `answer`."""
        if self.cycle is None or self.cycle.response_complete:
            return "head"
        return "body" if self.cycle.more_body else "answer"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.places.enter(self)
        self._time("head")

    def data_received(self, data: bytes) -> None:
        if self.phase == "head":
            self._time("head")  # one clock from its first byte on: more bytes do not wind it up again
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()
        if self.phase == "head":
            self._time("")  # idle: uvicorn's own clock

    def connection_lost(self, exc: Exception | None) -> None:
        self._time("")
        self.places.leave(self)
        super().connection_lost(exc)

    def abandon(self) -> None:
        """End the connection at once, whatever it still holds."""
        self.transport.abort()

    def _follow(self) -> None:
        if self.phase != "head":
            self.known = self.known or authorised(self.headers, self.places.token)
            self._time(self.phase if self.known else "head")

    def _time(self, phase: str) -> None:
        """Let the clock of this phase run; one that runs already runs on."""
        if phase == self._timed:
            return
        if self._clock is not None:
            self._clock.cancel()
        seconds = {"head": HEAD_SECONDS, "body": BODY_SECONDS}.get(phase)
        self._clock = None if seconds is None else self.loop.call_later(seconds, self.abandon)
        self._timed = phase


def authorised(headers: Sequence[tuple[bytes, bytes]], token: str) -> bool:
    """Whether a request shows the token, in constant time."""
    given = [value for name, value in headers if name == b"authorization"]
    return len(given) == 1 and hmac.compare_digest(given[0].removeprefix(b"Bearer "), token.encode())


class Refusal(Exception):
    """An answer that is not 200; its connection is closed after it."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
