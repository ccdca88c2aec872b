"""The server of `sppo sandbox serve`: a sandbox behind a token, for trainers on other machines.

POST /run        a job and its limits in, a result out (remote.py is the client)
POST /run_code   SandboxFusion's form for Python programs: {"code", "language", "stdin", "run_timeout"}
GET  /health     {"ok": true, "backend": ..., "slots": ...}: the one address without a token

Connections and plain requests are those of connections.py. Jobs whose client has left are ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ..connections import Refusal, authorised, http_server, listening, plain
from .pool import CallOff, Sandbox
from .remote import job_from, limits_from, result_to

LARGEST_REQUEST, MOST_JOBS = 64 << 20, 4096
CALL_OFF_SECONDS = 0.05
"""Seconds between attempts to end the jobs of a client that has left."""
Work = Callable[[Any, CallOff], dict[str, Any]]


class Server:
    """An HTTP server over a sandbox.

    Raises SandboxUnavailable before it listens when programs cannot be isolated here, OSError when it cannot listen.
    """

    def __init__(self, address: tuple[str, int], sandbox: Sandbox, token: str) -> None:
        sandbox.probe()
        self.sandbox, self.token = sandbox, token
        self._socket = listening(*address)
        self.server_address: tuple[str, int] = self._socket.getsockname()[:2]
        self._threads = ThreadPoolExecutor(sandbox.slots, thread_name_prefix="sppo-serve")
        self._running: dict[Future[Any], CallOff] = {}
        self._server = http_server(self._application, token)

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
        plain(request)
        route, size = (request.method, request.scope["path"]), request.headers.getlist("content-length")
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
