"""A program to run, its limits, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Status = Literal[
    "ok", "exception", "timeout", "memory", "output_limit", "killed", "cancelled", "protocol", "infra_error"
]
STATUSES: tuple[Status, ...] = get_args(Status)
"""`infra_error` alone is the machine's fault: such a program is run again, and if that fails too its sample is masked.
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Seconds and bytes; memory is counted over all of its processes."""

    cpu_seconds: int = 5
    wall_seconds: float = 8.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    disk_bytes: int = 32 << 20
    disk_files: int = 4096
    files: int = 64
    processes: int = 32
    output_bytes: int = 1 << 20
    fork: bool = False
    """Whether the program may start processes and execute files."""


@dataclass(frozen=True)
class Job:
    """One program to run. `role` says how; the fields below it are what that role reads.

    `script`: as __main__, on `stdin`. `calls`: define, then answer `calls`, each `[entry, encoded args, encoded
    kwargs]`. `asserts`: `setup` and `tests` (the task's own code) in one jail, against stand-ins for the program's
    `names` in another.
    """

    role: Literal["script", "calls", "asserts"]
    code: str
    stdin: str = ""
    calls: Sequence[Any] = ()
    names: Sequence[str] = ()
    replace: bool = False
    """Whether a name of the program replaces one that `setup` made (the function a code prompt only announces)."""
    setup: str = ""
    tests: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """How one program ended. `stdout`, `stderr` and `channel` are untrusted bytes from the program."""

    status: Status
    stdout: bytes = b""
    stderr: bytes = b""
    channel: bytes = b""
    exit_code: int | None = None
    signal: int | None = None
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    max_rss_bytes: int = 0
    truncated: tuple[str, ...] = ()
    detail: str = ""
    backend: str = ""
    instructions: int | None = None
    """Counted by the processor, in user space; None where it offers no such counter."""
