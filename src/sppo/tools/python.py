"""`python`: a session in the jail. What a trajectory defines stays for its later calls; `python:wall=5,memory_mb=512,slots=2` are the jail's
options (sandbox/open.py).

Every call runs the session from its start, in a fresh jail, and shows what its own code prints: no process waits while the policy writes,
none is left when the trainer dies, and what a call gives depends on what was written alone. The limits are those of all of it together.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from ..environments.base import Broken
from ..sandbox import Job, Limits, Runs, open_sandbox

MOST_CODE = 100_000
"""Characters of a session."""
SESSION = """
import ast, contextlib, io, json, linecache, sys, traceback
def _session(cells):
    space = {"__name__": "__main__"}
    def show(cell, number):
        name = f"<cell {number}>"
        linecache.cache[name] = len(cell), None, cell.splitlines(True), name
        tree = ast.parse(cell, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), space)
            if value is not None:
                print(repr(value))
    for number, cell in enumerate(cells[:-1], 1):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(BaseException):
            show(cell, number)
    sys.stderr = sys.stdout
    try:
        show(cells[-1], len(cells))
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith("<cell")]
        print("".join(traceback.format_list(frames[-4:]) + traceback.format_exception_only(error)), end="")
_cells = json.loads(sys.stdin.read())
sys.stdin = io.StringIO("")
_session(_cells)
"""
SAID = {
    "timeout": "the session took longer than {wall:g} s in all",
    "memory": "the session took more than {memory} MB",
    "output_limit": "the session printed too much",
    "killed": "the session was ended by the system",
}


def build(**options: Any) -> Session:
    """A session of its own for a trajectory; all share the jails. Raises SandboxUnavailable."""
    return Session(_sandbox(tuple(sorted(options.items()))))


@functools.cache
def _sandbox(options: tuple[tuple[str, Any], ...]) -> Runs:
    return open_sandbox(**dict(options))


class Session:
    """What one trajectory has run."""

    def __init__(self, sandbox: Runs) -> None:
        self._runs = sandbox
        self._cells: list[str] = []

    def python(self, code: str) -> str:
        """Run Python code, and read what it prints and the value of its last expression. Variables stay for later calls.

        Args:
            code: The code. There is no network, and no file stays but by this session.
        """
        cells = [*self._cells, code]
        if sum(map(len, cells)) > MOST_CODE:
            raise ValueError(f"the session holds more than {MOST_CODE} characters of code")
        (result,) = self._runs.run([Job("script", SESSION, stdin=json.dumps(cells))])
        if result.status == "infra_error":
            raise Broken(f"the sandbox failed: {result.detail}")
        said = result.stdout.decode("utf-8", "replace")
        if result.status in SAID:
            return said + f"[{_limit(result.status, self._runs.limits)}; this call is undone]"
        self._cells = cells
        return said


def _limit(status: str, limits: Limits) -> str:
    return SAID[status].format(wall=limits.wall_seconds, memory=limits.memory_bytes >> 20)
