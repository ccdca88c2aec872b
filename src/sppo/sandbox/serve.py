"""The server of `sppo sandbox serve`: a sandbox behind a token, for trainers on other machines.

POST /run        a job and its limits in, a result out (remote.py is the client)
POST /run_code   SandboxFusion's form for Python programs: {"code", "language", "stdin", "run_timeout"}
GET  /health     {"ok": true, "backend": ..., "slots": ...}: the one address without a token

uvicorn speaks HTTP. It does not limit the time of a request, so `Connection` does: a client without a token has a few
seconds per request, and is dropped first when there are too many connections. Anything but a plain request (an
unexpected body, two lengths) is refused and its connection closed. Jobs whose client has left are ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .pool import CallOff, Sandbox
from .remote import job_from, limits_from, result_to

LARGEST_REQUEST, MOST_JOBS = 64 << 20, 4096
MOST_CONNECTIONS, BACKLOG = 512, 128
"""Connections open at a time, and accepted at a time: few enough that a new one is read before others can displace it.
"""
HEAD_SECONDS, BODY_SECONDS, IDLE_SECONDS = 10.0, 300.0, 30
"""How long a client may take over a request's head and over its body, and how long a connection may lie idle."""
CALL_OFF_SECONDS = 0.05
"""Seconds between attempts to end the jobs of a client that has left."""
Work = Callable[[Any, CallOff], dict[str, Any]]


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


class Server:
    """An HTTP server over a sandbox.

    Raises SandboxUnavailable before it listens when programs cannot be isolated here, OSError when it cannot listen.
    """

    def __init__(self, address: tuple[str, int], sandbox: Sandbox, token: str) -> None:
        sandbox.probe()
        self.sandbox, self.token = sandbox, token
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.create_server(address, family=family, backlog=BACKLOG)
        self.server_address: tuple[str, int] = self._socket.getsockname()[:2]
        self._threads = ThreadPoolExecutor(sandbox.slots, thread_name_prefix="sppo-serve")
        self._running: dict[Future[Any], CallOff] = {}
        config = uvicorn.Config(
            self._application, http=functools.partial(Connection, places=Places(token)), ws="none", lifespan="off", interface="asgi3", log_config=None,  # type: ignore[arg-type]
            log_level="critical", access_log=False, server_header=False, proxy_headers=False, backlog=BACKLOG,
            timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)

    def serve_forever(self) -> None:
        """Answer until `shutdown`, or a signal that ends the program (in the main thread)."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.server_close()

    def shutdown(self) -> None:
        """Have `serve_forever` return soon; from any thread."""
        self._server.should_exit = True

    def server_close(self) -> None:
        """Release the port and end running jobs."""
        self._socket.close()
        for job, call_off in list(self._running.items()):
            while not job.cancel() and not job.done():
                call_off.now()
                wait([job], CALL_OFF_SECONDS)
        self._threads.shutdown()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            answer, status = await self._answer(request), 200
        except Refusal as refusal:
            answer, status = {"error": str(refusal)}, refusal.status
        if answer is not None:
            response = JSONResponse(answer, status)
            if status != 200:
                response.headers["Connection"] = "close"
            with contextlib.suppress(OSError):  # the client has left
                await response(scope, receive, send)

    async def _answer(self, request: Request) -> dict[str, Any] | None:
        """The answer to send, or None where nobody waits for it."""
        route, headers = (request.method, request.url.path), request.headers
        size = headers.getlist("content-length")
        if "transfer-encoding" in headers or len(size) > 1 or (request.method != "POST" and size not in ([], ["0"])):
            raise Refusal(400, "send a body with POST only, and its length in one Content-Length")
        if route == ("GET", "/health"):
            return {"ok": True, "backend": self.sandbox.backend, "slots": self.sandbox.slots}
        work = {("POST", "/run"): self.run, ("POST", "/run_code"): self.run_code}.get(route)
        if request.method == "POST" and not authorised(request.scope["headers"], self.token):
            raise Refusal(401, "the token is not right: Authorization: Bearer TOKEN")
        if work is None:
            raise Refusal(404, "POST /run or /run_code, GET /health")
        if not size or not size[0].isdigit() or int(size[0]) > LARGEST_REQUEST:
            raise Refusal(413, f"POST /run or /run_code, at most {LARGEST_REQUEST} bytes")
        body = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False):
                return await self._while_wanted(request, functools.partial(_on_json, work, bytes(body)))

    async def _while_wanted(self, request: Request, work: Callable[[CallOff], dict[str, Any]]) -> dict[str, Any] | None:
        """Do the work in a thread of its own, as long as its client stays."""
        call_off = CallOff()
        job = self._threads.submit(work, call_off)
        self._running[job] = call_off
        job.add_done_callback(lambda job: self._running.pop(job, None))
        done: asyncio.Future[Any] = asyncio.wrap_future(job)
        left: asyncio.Future[Any] = asyncio.ensure_future(
            request.receive()
        )  # after a body, nothing comes but the end of the connection
        try:
            await asyncio.wait({done, left}, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            while not job.cancel() and not job.done():
                call_off.now()
                await asyncio.wait({done}, timeout=CALL_OFF_SECONDS)
            return None
        finally:
            left.cancel()

    def run(self, tree: Any, call_off: CallOff) -> dict[str, Any]:
        """`/run`. Raises ValueError for a request that is not one."""
        jobs = tree.get("jobs")
        if not isinstance(jobs, list) or not 1 <= len(jobs) <= MOST_JOBS:
            raise ValueError(f"`jobs` must be a list of 1 to {MOST_JOBS}")
        limits = limits_from(tree.get("limits", {}), self.sandbox.limits)
        results = self.sandbox.run_groups([[job_from(j) for j in jobs]], limits, call_off)[0]
        return {"results": [result_to(r) for r in results]}

    def run_code(self, tree: Any, call_off: CallOff) -> dict[str, Any]:
        """`/run_code`. Raises ValueError for a request that is not one."""
        if tree.get("language", "python") not in ("python", "python3"):
            raise ValueError(f"language {tree['language']!r} is not run here, only python")
        job = job_from({"role": "script", "code": tree.get("code"), "stdin": str(tree.get("stdin") or "")})
        asked = {"wall_seconds": tree["run_timeout"]} if tree.get("run_timeout") else {}
        result = self.sandbox.run_groups([[job]], limits_from(asked, self.sandbox.limits), call_off)[0][0]
        how = {"ok": "Finished", "exception": "Finished", "timeout": "TimeLimitExceeded"}.get(result.status, "Error")
        failed = result.status == "infra_error"
        return {
            "status": "SandboxError" if failed else "Success" if result.status == "ok" else "Failed",
            "message": result.detail,
            "compile_result": None,
            "run_result": {
                "status": how,
                "execution_time": result.wall_seconds,
                "return_code": result.exit_code,
                "stdout": result.stdout.decode("utf-8", "replace"),
                "stderr": result.stderr.decode("utf-8", "replace"),
            },
            "files": {},
        }


def _on_json(work: Work, body: bytes, call_off: CallOff) -> dict[str, Any]:
    try:
        tree = json.loads(body)
        if not isinstance(tree, dict):
            raise ValueError("the request is not an object")
        return work(tree, call_off)
    except (ValueError, TypeError, RecursionError) as error:
        raise Refusal(400, str(error)) from None
