"""The server of `sppo rollout serve`: a policy and an engine behind a token, for a learner elsewhere (served.py).

wire.py has the addresses. The engine works in the program's main thread, one job at a time, so that a signal ends it
promptly; HTTP is answered in another, at once. Connections and plain requests are those of connections.py. A
generation whose client has left ends when its next sequence does.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qsl

import torch
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..connections import BACKLOG, Refusal, authorised, http_server, plain
from ..errors import OutOfMemory, RunFailure, UserError
from ..files import OUT_OF_MEMORY, first_line
from ..models.policy import Policy
from .engine import Engine
from .hosted import MOST_WAITING, CalledOff, Hosted, Job
from .wire import (
    LARGEST_REQUEST,
    MOST_TOKENS,
    finite,
    only,
    proof,
    read_object,
    rows_from,
    sample_to,
    text_from,
    wanted_from,
    whole,
    write_line,
)

BEAT_SECONDS, IDLE_SECONDS, END_SECONDS = 1.0, 120, 5.0
"""Between signs of life in an answer; for which a connection may lie idle; for open answers when the server ends."""
DRAIN = 1 << 23
"""Bytes of a refused body that are read all the same: who is still sending when a connection closes reads no answer."""
MOST_LINES = 1 << 16
"""Bytes of results that are sent at once."""
POSTED = ("/load", "/weight", "/loaded", "/generate", "/score", "/holds")


class Server:
    """HTTP on a socket that is bound, and listens from here on. `engine_name` is what the user calls the engine. Raises
    OSError where it cannot listen."""

    def __init__(self, listener: socket.socket, policy: Policy, engine: Engine, engine_name: str, token: str) -> None:
        self.hosted, self.engine_name, self.token = Hosted(policy, engine), engine_name, token
        known = [n for n in (policy.context, engine.context) if n is not None]
        self.context = min(known, default=MOST_TOKENS)
        self._listener, self._bodies = listener, 0
        self._server = http_server(self._application, token, IDLE_SECONDS)
        listener.listen(BACKLOG)

    def serve_forever(self) -> None:
        """Answer until `shutdown`, or an exception in this thread: KeyboardInterrupt, which a signal raises."""
        thread = threading.Thread(target=self._answer_http, name="sppo-http", daemon=True)
        thread.start()
        try:
            self.hosted.forever()
        finally:
            self._server.should_exit = True
            thread.join(END_SECONDS)
            self._listener.close()

    def shutdown(self) -> None:
        """Have `serve_forever` return soon; from any thread."""
        self.hosted.stop()

    def _answer_http(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self.hosted.stop()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            plain(request)
            if (scope["method"], scope["path"]) == ("GET", "/hello"):
                await _answer(request, send, {"proof": proof(self.token, _nonce(request))})
                return
            if not authorised(scope["headers"], self.token):
                raise Refusal(401, "the token is not right: Authorization: Bearer TOKEN")
            await self._route(request, send)
        except Refusal as refusal:
            if refusal.status != 401:
                await _drain(request)
            await _answer(request, send, {"error": str(refusal)}, refusal.status)

    async def _route(self, request: Request, send: Send) -> None:
        """Answer a request that shows the token. Raises Refusal."""
        route = request.method, request.scope["path"]
        if route == ("GET", "/health"):
            await _answer(request, send, self._health())
        elif route == ("GET", "/layout"):
            await _answer(request, send, self.hosted.layout)
        elif route == ("POST", "/weight"):
            await self._weight(request, send)
        elif route[0] == "POST" and route[1] in POSTED:
            await self._asked(route[1], request, send)
        else:
            raise Refusal(404, f"GET /health or /layout, or POST {', '.join(POSTED)}")

    def _health(self) -> dict[str, Any]:
        held, loading, job = self.hosted.held, self.hosted.loading, self.hosted.running
        return {
            "sppo": __version__, "torch": torch.__version__, "model": self.hosted.policy.name,
            "layout": self.hosted.layout_hash, "engine": self.engine_name, "stated": self.hosted.engine.stated,
            "context": self.context, "weights": None if held is None else asdict(held),
            "loading": None if loading is None else {
                "version": loading.version, "missing": len(loading.missing), "of": len(self.hosted.layout["weights"])
            },
            "busy": None if job is None else {
                "what": job.what, "finished": job.finished, "of": job.of, "seconds": time.monotonic() - job.began
            },
            "waiting": self.hosted.waiting,
        }  # fmt: skip

    async def _asked(self, path: str, request: Request, send: Send) -> None:
        """A request whose body is JSON."""
        if self._bodies >= MOST_WAITING:
            raise Refusal(503, f"{self._bodies} requests are being received already")
        self._bodies += 1
        try:
            body = await _body(request)
        finally:
            self._bodies -= 1
        if body is None:
            return
        try:
            tree = await run_in_threadpool(read_object, body)
            if path == "/load":
                only(tree, "version", "layout")
                begun = self.hosted.begin(
                    whole(tree.get("version"), 0, 2**63 - 1, "version"), text_from(tree, "layout")
                )
                await _answer(request, send, {"load": begun})
                return
            job, line = await run_in_threadpool(self._job, path, tree)
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        await _stream(request, send, job, line)

    def _job(self, path: str, tree: dict[str, Any]) -> tuple[Job, Callable[[Any], dict[str, Any]]]:
        """What is to be done, and how one of its results becomes a line. Raises ValueError, Refusal."""
        hosted, vocabulary, load = self.hosted, self.hosted.policy.vocabulary, text_from(tree, "load")
        if path == "/generate":
            wanted = wanted_from(tree, vocabulary, self.context)
            job = hosted.submit("generate", len(wanted.prompts), lambda job: hosted.generate(wanted, job))
            return job, lambda sample: {"sample": sample_to(sample)}
        if path == "/score":
            only(tree, "load", "prompts", "responses")
            prompts, responses = (rows_from(tree, key, vocabulary) for key in ("prompts", "responses"))
            if len(prompts) != len(responses):
                raise ValueError("prompts and responses are not equally many")
            if max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) > self.context:
                raise ValueError(f"a prompt and its response are above {self.context} tokens")
            job = hosted.submit("score", len(prompts), lambda job: hosted.score(load, prompts, responses))
            return job, lambda logps: {"logps": finite(logps)}
        if path == "/holds":
            only(tree, "load", "fingerprint")
            asked = text_from(tree, "fingerprint")
            return hosted.submit("holds", 1, lambda job: hosted.holds(load, asked)), lambda held: {"holds": held}
        only(tree, "load")
        return hosted.submit("loaded", 1, lambda job: hosted.finish(load)), lambda held: {"held": held}

    async def _weight(self, request: Request, send: Send) -> None:
        """Receive one tensor into memory of its own, then have it taken over."""
        try:
            query = request.scope["query_string"].decode("ascii")
            given = dict(parse_qsl(query, strict_parsing=True, max_num_fields=5))
            only(given, "load", "name", "dtype", "shape", "fingerprint")
            load, name, dtype, sent = (text_from(given, key) for key in ("load", "name", "dtype", "fingerprint"))
            shape = [int(n) for n in given.get("shape", "").split(",") if n]
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        own = self.hosted.receivable(load, name, dtype, shape)
        size = own.numel() * own.element_size()
        if _length(request) != size:
            raise Refusal(400, f"weight {name} has {size} bytes, and {_length(request)} are announced")
        loading = self.hosted.loading
        assert loading is not None
        loading.receiving = True
        try:
            tensor = torch.empty(own.shape, dtype=own.dtype, device="cpu")
            into, at = tensor.reshape(-1).view(torch.uint8).numpy().data, 0
            async for part in _parts(request):
                into[at : at + len(part)] = part
                at += len(part)
        finally:
            loading.receiving = False
        if at == size:  # else the client has left
            job = self.hosted.submit("weight", 1, lambda job: self.hosted.take(load, name, tensor, sent))
            await _stream(request, send, job, lambda _: {})


def _nonce(request: Request) -> str:
    found = request.query_params.getlist("nonce")
    if len(found) != 1 or not re.fullmatch("[0-9a-f]{32,64}", found[0]):
        raise Refusal(400, "GET /hello?nonce= with 32 to 64 hexadecimal digits")
    return found[0]


# -- bodies and answers ------------------------------------------------------------------------------------------------


def _length(request: Request) -> int:
    """The length of a body, as announced. Raises Refusal where it is not."""
    size = request.headers.getlist("content-length")
    if len(size) != 1 or not (size[0].isascii() and size[0].isdigit()):
        raise Refusal(411, "say the length of the body in Content-Length")
    return int(size[0])


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """A body as it comes; where the client leaves, it ends early."""
    while True:
        message = await request.receive()
        gone = message["type"] == "http.disconnect"
        request.state.read = gone or not message.get("more_body", False)
        if gone:
            return
        yield message.get("body", b"")
        if request.state.read:
            return


async def _body(request: Request) -> bytes | None:
    """A body of JSON, or None where the client has left. Raises Refusal."""
    if (size := _length(request)) > LARGEST_REQUEST:
        raise Refusal(413, f"a request may have {LARGEST_REQUEST} bytes, and this has {size}")
    found = bytearray()
    async for part in _parts(request):
        found += part
    return bytes(found) if len(found) == size else None


async def _drain(request: Request) -> None:
    """Read what is left of a refused body, if it is short."""
    size = request.headers.get("content-length", "")
    short = size.isascii() and size.isdigit() and int(size) <= DRAIN
    if short and not getattr(request.state, "read", False):
        async for _ in _parts(request):
            pass


async def _answer(request: Request, send: Send, tree: dict[str, Any], status: int = 200) -> None:
    response = Response(write_line(tree), status, media_type="application/json")
    if status != 200:
        response.headers["Connection"] = "close"
    with contextlib.suppress(OSError):  # the client has left
        await response(request.scope, request.receive, send)


async def _stream(request: Request, send: Send, job: Job, line: Callable[[Any], dict[str, Any]]) -> None:
    """Signs of life until a job is done, then its results. Raises Refusal where it is refused before the first sign."""
    done: asyncio.Future[Any] = asyncio.wrap_future(job.future)
    done.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, where nobody waits for it
    left: asyncio.Future[Any] = asyncio.ensure_future(request.receive())  # after a body: the end of the connection
    begun = False

    async def say(body: bytes, more: bool = True) -> None:
        nonlocal begun
        if not begun:
            headers = [(b"content-type", b"application/x-ndjson")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            begun = True
        await send({"type": "http.response.body", "body": body, "more_body": more})

    try:
        while not done.done():
            await asyncio.wait({done, left}, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                job.call_off()
                return
            if not done.done():
                await say(write_line({"finished": job.finished}))
        try:
            results = done.result()
        except Refusal as refusal:
            if not begun:
                raise
            await say(write_line({"error": str(refusal), "kind": "lost"}), more=False)
            return
        except (Exception, asyncio.CancelledError) as error:
            await say(write_line(_failed(error)), more=False)
            return
        for lines in _together(results, line):
            await say(lines)
        await say(write_line({"done": True}), more=False)
    finally:
        left.cancel()


def _together(results: Iterable[Any], line: Callable[[Any], dict[str, Any]]) -> Iterator[bytes]:
    """Lines for results, several at once where they are short."""
    lines = bytearray()
    for result in results:
        lines += write_line(line(result))
        if len(lines) >= MOST_LINES:
            yield bytes(lines)
            lines.clear()
    yield bytes(lines)


def _failed(error: BaseException) -> dict[str, Any]:
    """What is said of a job that raised: whose mistake it is (`kind`: user, memory, run, or lost, the server's own)."""
    text = first_line(error)
    if isinstance(error, CalledOff | asyncio.CancelledError):
        return {"error": "the server is ending", "kind": "lost"}
    if isinstance(error, UserError):
        return {"error": str(error), "kind": "user"}
    if isinstance(error, OutOfMemory | MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return {"error": text, "kind": "memory"}
    if isinstance(error, RunFailure):
        return {"error": str(error), "kind": "run"}
    traceback.print_exception(error, file=sys.stderr)
    return {"error": f"{type(error).__name__}: {text}", "kind": "lost"}
