"""`sppo sandbox serve`'s server: the local sandbox behind a token, so that one machine judges for trainers on others.

POST /run        a job and its limits in, a result out (remote.py is the client)
POST /run_code   SandboxFusion's form for Python programs: {"code", "language", "stdin", "run_timeout"}
GET  /health     {"ok": true, "backend": ..., "slots": ...}: the one address without a token
"""

from __future__ import annotations

import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .pool import Sandbox
from .remote import job_from, limits_from, result_to

LARGEST_REQUEST, MOST_JOBS = 64 << 20, 4096
MOST_CONNECTIONS, IDLE_SECONDS = 256, 30
"""Connections held at a time, and how long one may say nothing: whoever has no token cannot keep others out for longer."""


class Server(ThreadingHTTPServer):
    """An HTTP server over a sandbox. Raises SandboxUnavailable before it listens when programs cannot be isolated here."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], sandbox: Sandbox, token: str) -> None:
        sandbox.probe()
        self.sandbox, self.token = sandbox, token
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each connection, as long as there are places."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is its client's affair."""

    def run(self, tree: Any) -> dict[str, Any]:
        """`/run`. Raises ValueError for a request that is not one."""
        jobs = tree.get("jobs")
        if not isinstance(jobs, list) or not 1 <= len(jobs) <= MOST_JOBS:
            raise ValueError(f"`jobs` must be a list of 1 to {MOST_JOBS}")
        limits = limits_from(tree.get("limits", {}), self.sandbox.limits)
        return {"results": [result_to(r) for r in self.sandbox.run_groups([[job_from(j) for j in jobs]], limits)[0]]}

    def run_code(self, tree: Any) -> dict[str, Any]:
        """`/run_code`. Raises ValueError for a request that is not one."""
        if tree.get("language", "python") not in ("python", "python3"):
            raise ValueError(f"language {tree['language']!r} is not run here, only python")
        job = job_from({"role": "script", "code": tree.get("code"), "stdin": str(tree.get("stdin") or "")})
        asked = {"wall_seconds": tree["run_timeout"]} if tree.get("run_timeout") else {}
        result = self.sandbox.run([job], limits_from(asked, self.sandbox.limits))[0]
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


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"  # connections stay open between jobs
    timeout = IDLE_SECONDS

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY: an answer is small and waited for

    def do_GET(self) -> None:
        if self.path == "/health":
            sandbox = self.server.sandbox
            self._say(200, {"ok": True, "backend": sandbox.backend, "slots": sandbox.slots})
        else:
            self._say(404, {"error": "POST /run or /run_code, GET /health"})

    def do_POST(self) -> None:
        answer = {"/run": self.server.run, "/run_code": self.server.run_code}.get(self.path)
        size = self.headers.get("Content-Length", "")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            self.close_connection = True  # its body was not read
            return self._say(401, {"error": "the token is not right: Authorization: Bearer TOKEN"})
        if answer is None or not (size.isascii() and size.isdigit()) or int(size) > LARGEST_REQUEST:
            self.close_connection = True
            return self._say(
                404 if answer is None else 413, {"error": f"POST /run or /run_code, at most {LARGEST_REQUEST} bytes"}
            )
        try:
            tree = json.loads(self.rfile.read(int(size)))
            if not isinstance(tree, dict):
                raise ValueError("the request is not an object")
            self._say(200, answer(tree))
        except (ValueError, TypeError, RecursionError) as error:
            self._say(400, {"error": str(error)})

    def _say(self, status: int, tree: dict[str, Any]) -> None:
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Requests are the trainers' business; errors reach them in the answer."""
