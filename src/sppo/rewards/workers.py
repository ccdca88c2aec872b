"""A small pool of killable worker processes, for judging that may hang or crash: one JSON line in, one JSON line out.

A worker is `python -m sppo.rewards.worker module:function`, started fresh (never forked from a trainer with threads,
never re-importing the user's script). A job that overruns its limit costs only its worker, which is killed and
replaced. Time in which a busy machine kept the worker waiting does not count. Works from any thread: nothing here uses
signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..sandbox.inside.kernel import seconds_in_line

PATIENCE = 60.0
"""Wall time that a job may take on a busy processor, in multiples of its limit."""
TICK = 0.05
START_LIMIT = 120.0
"""Seconds a worker may take to import its libraries (a cold disk, a loaded machine)."""


class WorkerPool:
    """Runs `target` ("module:function", JSON-able argument and result) over jobs, each under a limit of seconds.

    `command` starts another program that speaks the same lines: its argument list and its environment.
    """

    def __init__(
        self,
        target: str,
        *,
        workers: int = 2,
        limit: float = 5.0,
        command: Callable[[], tuple[list[str], dict[str, str]]] | None = None,
    ) -> None:
        self.target, self.size, self.limit = target, workers, limit
        self.command = command or (
            lambda: ([sys.executable, "-P", "-m", "sppo.rewards.worker", target], dict(os.environ))
        )
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Any]) -> list[dict[str, Any]]:
        """One result for each job, in order.

        `{"ok": result}`, `{"error": text}`, `{"timeout": seconds}`, `{"crashed": code}`, or `{"infra": text}` where the
        machine is at fault.
        """
        results: list[dict[str, Any]] = [{} for _ in jobs]
        pending: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(jobs)):
            pending.put(i)
        threads = [
            threading.Thread(target=self._serve, args=(jobs, results, pending), daemon=True)
            for _ in range(min(self.size, len(jobs)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _serve(self, jobs: Sequence[Any], results: list[dict[str, Any]], pending: queue.SimpleQueue[int]) -> None:
        worker: _Worker | None = None
        while True:
            try:
                i = pending.get_nowait()
            except queue.Empty:
                break
            try:
                worker = worker or self._take()
                results[i] = worker.ask(jobs[i], self.limit)
            except OSError as error:  # the machine, not the job: no process, no pipe
                results[i] = {"infra": str(error)}
            if worker is not None and not worker.alive:
                worker = None
        if worker is not None:
            with self._lock:
                self._idle.append(worker)

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            self._all = {w for w in self._all if w.alive}
        worker = _Worker(*self.command())
        with self._lock:
            self._all.add(worker)
        return worker

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            workers, self._all, self._idle = self._all, set(), []
        for worker in workers:
            worker.kill()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class _Worker:
    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is the trainer's to handle, not the worker's
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.buffer, self.alive, self.ready = b"", True, False

    def ask(self, job: Any, limit: float) -> dict[str, Any]:
        if not self.ready:
            hello = self._exchange(b"", START_LIMIT)
            if "ok" not in hello:
                self.kill()
                return {"infra": f"the judging worker did not start ({hello})"}
            self.ready = True
        answer = self._exchange(json.dumps(job).encode() + b"\n", limit)
        if "ok" not in answer and "error" not in answer:
            self.kill()
        return answer

    def _exchange(self, request: bytes, limit: float, patience: float = PATIENCE) -> dict[str, Any]:
        """Feed and drain in one loop, so that neither side can block the other; stop at the first whole line."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        began, in_line = time.monotonic(), seconds_in_line(self.process.pid)
        deadline = began + limit
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if request:
                selector.register(stdin, selectors.EVENT_WRITE)
            while b"\n" not in self.buffer:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    remaining = seconds_in_line(self.process.pid) - in_line - (time.monotonic() - began - limit)
                    if remaining <= 0:
                        return {"timeout": limit}
                    if time.monotonic() > began + limit * patience:
                        return {"infra": f"no answer after {limit * patience:g} s: the processors were busy elsewhere"}
                    remaining = max(remaining, TICK)
                    deadline = time.monotonic() + remaining
                for key, _ in selector.select(remaining):
                    if key.fileobj is stdin:
                        try:
                            request = request[os.write(stdin.fileno(), request) :]
                        except BlockingIOError:
                            continue
                        except BrokenPipeError:
                            return {"crashed": self.process.wait()}
                        if not request:
                            selector.unregister(stdin)
                    else:
                        chunk = os.read(stdout.fileno(), 1 << 16)
                        if not chunk:
                            return {"crashed": self.process.wait()}
                        self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
