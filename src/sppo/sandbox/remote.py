"""A client with the interface of `Sandbox`, which runs jobs on a server over HTTP. Results are still compared here.

    POST URL/run   Authorization: Bearer TOKEN   {"jobs": [{...}], "limits": {...}}   ->   {"results": [{...}]}

The jobs of one request run one after the other in one jail.

`sppo sandbox serve` answers it. The token comes from the environment variable SPPO_SANDBOX_TOKEN: recipes are shared,
secrets are not.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import queue
import ssl
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from typing import Any, get_args

from ..errors import RecipeError, SandboxUnavailable
from .job import Job, Limits, Result, Status
from .pool import PROBE, check_probe

TOKEN_VARIABLE = "SPPO_SANDBOX_TOKEN"
PATIENCE = 60.0
"""Seconds beyond a program's wall time: it may have to wait for a slot there."""
PAUSES = (0.0, 0.5, 2.0, 5.0)
"""Seconds before each attempt; after the last the sample is masked."""
BYTES = ("stdout", "stderr", "channel")


class RemoteSandbox:
    """`slots` programs at a time on a server.

    Raises SandboxUnavailable at its probe when that does not answer as it should.
    """

    backend = "remote"

    def __init__(self, url: str, slots: int = 2, limits: Limits | None = None, token: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(f"sandbox: url={url} is not http://HOST:PORT or https://HOST")
        self.url, self.parts, self.limits = url, parts, limits or Limits()
        self.token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        self.slots = slots
        self._idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()
        self._probed = False

    def __enter__(self) -> RemoteSandbox:
        self.probe()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def probe(self) -> None:
        """Run a real program there and see that it is isolated. Raises SandboxUnavailable."""
        if self._probed:
            return
        try:
            result = self._ask([PROBE])[0]
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SandboxUnavailable(
                f"the remote sandbox {self.url} does not answer ({error}); start one with: sppo sandbox serve"
            ) from None
        check_probe(result, f"remote, {self.url}", isolates="unsafe" not in result.backend)
        self._probed = True

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """One result for each job, in order.

        An unreachable server is retried; after that the result is `infra_error`.
        """
        return [result for (result,) in self.run_groups([[job] for job in jobs])]

    def run_groups(self, groups: Sequence[Sequence[Job]]) -> list[list[Result]]:
        """One result for each job; those of a group run one after the other in the same jail, to be compared."""
        self.probe()
        with ThreadPoolExecutor(self.slots, thread_name_prefix="sppo-remote") as pool:
            return list(pool.map(self._patiently, groups))

    def close(self) -> None:
        """Close the connections; they are opened again when needed."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def _patiently(self, jobs: Sequence[Job]) -> list[Result]:
        why: Exception | None = None
        for pause in PAUSES:
            time.sleep(pause)
            try:
                results = self._ask(jobs)
                failed = next((r for r in results if r.status == "infra_error"), None)
                if failed is None:
                    return results
                why = RuntimeError(failed.detail)
            except SandboxUnavailable as error:  # a refusal does not pass by waiting
                why = error
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = error
        return [Result("infra_error", detail=f"{self.url}: {why}", backend=self.backend) for _ in jobs]

    def _ask(self, jobs: Sequence[Job]) -> list[Result]:
        body = json.dumps({"jobs": [asdict(job) for job in jobs], "limits": asdict(self.limits)})
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        while True:
            connection, used_before = self._connection(len(jobs))
            try:
                connection.request("POST", f"{self.parts.path.rstrip('/')}/run", body, headers)
                response = connection.getresponse()
                text = response.read()
                break
            except BaseException as error:
                connection.close()
                if not (used_before and isinstance(error, ConnectionError)):
                    raise  # a connection that was idle for long may be closed over there: a fresh one, at once
        if response.status == 200:
            self._idle.put(connection)
        else:
            connection.close()
        if response.status == 401:
            raise SandboxUnavailable(
                f"the remote sandbox {self.url} refuses the token; set {TOKEN_VARIABLE} to the one its server printed"
            )
        if response.status == 400:
            raise SandboxUnavailable(f"the remote sandbox {self.url} refuses the job: {_reason(text)}")
        if response.status != 200:
            raise ValueError(f"HTTP {response.status} {_reason(text)}")
        answers = json.loads(text).get("results")
        if not isinstance(answers, list) or len(answers) != len(jobs):
            raise ValueError("the answer does not hold one result per job")
        return [result_from(answer) for answer in answers]

    def _connection(self, jobs: int) -> tuple[http.client.HTTPConnection, bool]:
        timeout = jobs * self.limits.wall_seconds + PATIENCE
        with contextlib.suppress(queue.Empty):
            connection = self._idle.get_nowait()
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            return connection, True
        host, port = self.parts.hostname or "", self.parts.port
        if self.parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context()), False
        return http.client.HTTPConnection(host, port, timeout=timeout), False


def _reason(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text[:200].decode("utf-8", "replace")


def result_to(result: Result) -> dict[str, Any]:
    """A result as JSON; bytes in base64."""
    tree = asdict(result)
    return tree | {name: base64.b64encode(tree[name]).decode() for name in BYTES}


def result_from(tree: Any) -> Result:
    """The result that JSON holds. Raises ValueError for anything else: a server's answer is checked, not trusted."""
    if not isinstance(tree, Mapping) or tree.get("status") not in get_args(Status):
        raise ValueError("the answer is not a result")
    known = {f.name for f in fields(Result)}
    values = {name: value for name, value in tree.items() if name in known}
    for name in BYTES:
        values[name] = base64.b64decode(str(values.get(name, "")))
    for name in ("cpu_seconds", "wall_seconds", "max_rss_bytes"):
        if not isinstance(values.get(name, 0), (int, float)):
            raise ValueError(f"the answer's {name} is not a number")
    if not isinstance(values.get("instructions"), (int, type(None))):
        raise ValueError("the answer's instructions are not a number")
    values["truncated"] = tuple(map(str, values.get("truncated", ())))
    values["backend"] = f"remote {values.get('backend', '')}".strip()
    return Result(**values)


def job_from(tree: Any) -> Job:
    """The job that JSON holds. Raises ValueError with what is wrong."""
    if not isinstance(tree, Mapping) or tree.get("role") not in ("script", "calls", "asserts"):
        raise ValueError("a job needs a `role`: script, calls or asserts")
    kinds: dict[str, type | tuple[type, ...]] = {
        "role": str, "code": str, "stdin": str, "calls": list, "names": list, "replace": bool, "setup": str, "tests": list,
    }  # fmt: skip
    for name, value in tree.items():
        if name not in kinds or not isinstance(value, kinds[name]):
            raise ValueError(f"a job's `{name}` is not known, or of the wrong type")
    if not isinstance(tree.get("code"), str):
        raise ValueError("a job's `code` is missing")
    if not all(isinstance(x, str) for name in ("names", "tests") for x in tree.get(name, ())):
        raise ValueError("a job's `names` and `tests` are lists of texts")
    return Job(**tree)


def limits_from(tree: Any, most: Limits) -> Limits:
    """The limits that JSON asks for, none above the server's own. Raises ValueError with what is wrong."""
    if not isinstance(tree, Mapping):
        raise ValueError("`limits` is not an object")
    highest = asdict(most)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in highest:
            raise ValueError(f"`limits.{name}` is not known")
        if isinstance(highest[name], bool):
            values[name] = bool(value) and highest[name]
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"`limits.{name}` must be a number above 0")
        else:
            values[name] = type(highest[name])(min(value, highest[name]))
    return Limits(**(highest | values))
