"""A pool of jails: jobs in, results out, in order. A backend is chosen by name; there is no silent fallback."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from ..errors import RecipeError, SandboxUnavailable
from ..spec import nearest
from .jail import Jail
from .job import Job, Limits, Result

BACKENDS = ("bwrap", "landlock", "unsafe-subprocess")
"""`bwrap` isolates. `landlock` holds files, network and signals back, but shares the machine's process list and disk,
and no program may fork. `unsafe-subprocess` keeps limits only: for trusted programs, where no jail can be had."""
UNSAFE = (
    "warning: backend=unsafe-subprocess is not a sandbox: programs run as you, and can read, change and send whatever you can. "
    "Use it for programs that you trust; bwrap and landlock isolate.\n"
)
"""Printed each time such a backend starts."""
ANEW = ("/tmp/", "/proc/", "/dev/")
LINGER = 0.25
"""Seconds that a solution may outlive its tests."""
PROBE = Job(
    "script",
    "def opens(path):\n try: open(path).close()\n except OSError: return False\n return True\n"
    "print(6 * 7, opens('/etc/passwd'), opens('/proc/1/status'))",
)


class Runs(Protocol):
    """What runs jobs: a `Sandbox` here, or a `RemoteSandbox` elsewhere."""

    backend: str
    limits: Limits

    def probe(self) -> None:
        """Raises SandboxUnavailable with the cause and the remedy."""

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """One result for each job, in order."""

    def run_groups(self, groups: Sequence[Sequence[Job]]) -> list[list[Result]]:
        """One result for each job; those of a group run one after the other in the same jail, to be compared."""

    def close(self) -> None:
        """Release its resources; it may be used again."""


class CallOff:
    """Ends jobs that nobody waits for any more: `now` ends the one that runs, and the rest are not begun.

    A job may be entering its jail at that moment: repeat the call until the work is done.
    """

    def __init__(self) -> None:
        self.said = False
        self._jails: tuple[Jail, ...] = ()

    def now(self) -> None:
        """End the jobs; may be called from any thread."""
        self.said = True
        for jail in self._jails:
            jail.cancel()

    @contextlib.contextmanager
    def over(self, jails: tuple[Jail, ...]) -> Iterator[None]:
        """Jobs in these jails are the ones that `now` ends."""
        self._jails = jails
        try:
            yield
        finally:
            self._jails = ()


class Sandbox:
    """`slots` programs at a time. Start-up runs a probe; SandboxUnavailable names what is missing.

    >>> with Sandbox() as sandbox:                                        # doctest: +SKIP
    ...     sandbox.run([Job("script", "print(input()[::-1])", stdin="abc")])[0].stdout
    b'cba\\n'
    """

    def __init__(
        self, backend: str = "bwrap", slots: int = 2, limits: Limits | None = None, python: str | None = None
    ) -> None:
        if backend not in BACKENDS:
            raise RecipeError(f"sandbox: no backend {backend!r}: {nearest(backend, [*BACKENDS, 'remote'])}")
        if slots < 1:
            raise RecipeError(f"sandbox: slots={slots} must be at least 1")
        if python and backend == "bwrap" and os.path.realpath(python).startswith(ANEW):
            raise RecipeError(
                f"sandbox: python={python} lies in a folder that each program gets anew: move the interpreter elsewhere"
            )
        self.backend, self.slots, self.limits = backend, slots, limits or Limits()
        if backend == "landlock" and self.limits.fork:
            raise RecipeError("sandbox: landlock runs no programs that fork; take bwrap")
        self._jails = [(Jail(backend, 2 * k, python), Jail(backend, 2 * k + 1, python)) for k in range(slots)]
        self._free: queue.SimpleQueue[tuple[Jail, Jail]] = queue.SimpleQueue()
        for pair in self._jails:
            self._free.put(pair)
        self._probed = False

    def __enter__(self) -> Sandbox:
        self.probe()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def probe(self) -> None:
        """Run a real program and see that it is where it should be. Raises SandboxUnavailable."""
        if self._probed:
            return
        check_probe(
            self._on_a_slot([PROBE], self.limits)[0], self.backend, isolates=self.backend != "unsafe-subprocess"
        )
        self._probed = True
        if self.backend == "unsafe-subprocess":
            sys.stderr.write(UNSAFE)

    def run(self, jobs: Sequence[Job], limits: Limits | None = None) -> list[Result]:
        """One result for each job, in order. What the machine got wrong is tried once more, then `infra_error`."""
        return [result for (result,) in self.run_groups([[job] for job in jobs], limits)]

    def run_groups(
        self, groups: Sequence[Sequence[Job]], limits: Limits | None = None, call_off: CallOff | None = None
    ) -> list[list[Result]]:
        """One result for each job; those of a group run one after the other in the same jail, to be compared.

        `call_off` ends them early; of one group only.
        """
        self.probe()
        limits = limits or self.limits
        results: list[list[Result]] = [[] for _ in groups]
        numbers = iter(range(len(groups)))
        lock = threading.Lock()
        failure: list[BaseException] = []

        def serve() -> None:
            while not failure:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return
                try:
                    results[i] = self._on_a_slot(groups[i], limits, call_off)
                except BaseException as error:
                    failure.append(error)

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(len(self._jails), len(groups)) - 1)]
        for thread in threads:
            thread.start()
        serve()  # this thread works too
        for thread in threads:
            thread.join()
        if failure:
            raise failure[0]
        return results

    def close(self) -> None:
        """End every jail."""
        for pair in self._jails:
            for jail in pair:
                jail.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _on_a_slot(self, jobs: Sequence[Job], limits: Limits, call_off: CallOff | None = None) -> list[Result]:
        call_off = call_off or CallOff()
        pair = self._free.get()
        try:
            with call_off.over(pair):
                return [
                    Result("cancelled", backend=self.backend) if call_off.said else _with_retry(job, pair, limits)
                    for job in jobs
                ]
        finally:
            self._free.put(pair)


def _with_retry(job: Job, pair: tuple[Jail, Jail], limits: Limits) -> Result:
    run: Callable[[Job, tuple[Jail, Jail], Limits], Result] = _asserts if job.role == "asserts" else _alone
    result = run(job, pair, limits)
    return run(job, pair, limits) if result.status == "infra_error" else result


def check_probe(result: Result, name: str, *, isolates: bool) -> None:
    """Raises SandboxUnavailable unless the probe ran, and saw nothing of the machine if it is to be isolated."""
    if result.status != "ok":
        detail = result.detail or result.stderr.decode(errors="replace").strip() or result.status
        raise SandboxUnavailable(f"the sandbox ({name}) does not run programs here: {detail}")
    if isolates and result.stdout.split() != [b"42", b"False", b"False"]:
        raise SandboxUnavailable(
            f"the sandbox ({name}) does not isolate: the probe saw {result.stdout[:80]!r}; see docs/sandbox.md"
        )


def _alone(job: Job, pair: tuple[Jail, Jail], limits: Limits) -> Result:
    request = {"role": job.role, "code": job.code, "calls": job.calls}
    return pair[0].run(request, limits, job.stdin.encode("utf-8", "surrogateescape"))


def _asserts(job: Job, pair: tuple[Jail, Jail], limits: Limits) -> Result:
    """The program in one jail, the tests in the other, a socket between them, and the word of the tests' jail alone."""
    solution, tests = pair
    for jail in pair:
        jail.ready()  # now, because neither may wait for the other's start in the time that it is given
    near, far = socket.socketpair()
    ended: list[Result] = []
    request = {
        "role": "tests",
        "names": list(job.names),
        "replace": job.replace,
        "setup": job.setup,
        "tests": list(job.tests),
    }

    def run_solution() -> None:
        try:
            ended.append(solution.run({"role": "solution", "code": job.code}, limits, peer=near))
        except SandboxUnavailable as error:
            ended.append(Result("infra_error", detail=str(error), backend=solution.backend))

    thread = threading.Thread(target=run_solution, daemon=True)
    thread.start()
    try:
        verdict = tests.run(request, limits, peer=far)
    finally:
        thread.join(LINGER)  # with the tests' jail gone it ends by itself, and says how; unless it does not want to
        if thread.is_alive():
            solution.cancel()
        thread.join()
    program = ended[0]
    status = verdict.status if program.status in ("ok", "cancelled") else program.status
    if "infra_error" in (program.status, verdict.status):
        status = "infra_error"
    elif status == "ok" and not _is_report(verdict.channel, len(job.tests)):
        status = "protocol"
    return replace(
        verdict, status=status, stdout=program.stdout, stderr=program.stderr + verdict.stderr,
        cpu_seconds=program.cpu_seconds, max_rss_bytes=program.max_rss_bytes, instructions=program.instructions,
    )  # fmt: skip


def _is_report(channel: bytes, n: int) -> bool:
    try:
        held = json.loads(channel)["held"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(held, list) and len(held) == n
