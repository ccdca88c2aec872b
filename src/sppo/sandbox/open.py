"""A sandbox from the options of a recipe: `backend=bwrap,slots=2,wall=8,cpu=5,memory_mb=512,fork=false`."""

from __future__ import annotations

from ..errors import RecipeError
from .job import Limits
from .pool import Runs, Sandbox
from .remote import RemoteSandbox


def open_sandbox(
    *,
    backend: str = "bwrap",
    url: str = "",
    python: str = "",
    slots: int = 2,
    wall: float = 8.0,
    cpu: int = 5,
    memory_mb: int = 512,
    fork: bool = False,
) -> Runs:
    """A sandbox whose probe has run a program on this machine.

    Args:
        backend: bwrap, landlock, unsafe-subprocess, or remote (with its `url`; its token is in SPPO_SANDBOX_TOKEN).
        python: the interpreter that programs see, by default the system's; readable by everybody.
        slots: programs at a time. `wall`, `cpu`: seconds per program. `memory_mb`: per program, over all of its processes.
        fork: programs may start processes.

    Raises:
        RecipeError: an option out of range. SandboxUnavailable: with the cause and the remedy.
    """
    for name, value, kind in (
        ("slots", slots, int),
        ("wall", wall, (int, float)),
        ("cpu", cpu, int),
        ("memory_mb", memory_mb, int),
    ):
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 1e6:
            raise RecipeError(f"sandbox: {name}={value} must be a {'whole ' if kind is int else ''}number above 0")
    if not isinstance(fork, bool):
        raise RecipeError(f"sandbox: fork={fork} must be true or false")
    limits = Limits(cpu_seconds=cpu, wall_seconds=wall, memory_bytes=memory_mb << 20, fork=fork)
    sandbox: Runs
    if backend == "remote":
        if not url:
            raise RecipeError("sandbox: backend=remote needs url=http://HOST:PORT of a server (sppo sandbox serve)")
        if python:
            raise RecipeError("sandbox: python= is the server's to choose with backend=remote")
        sandbox = RemoteSandbox(url, slots, limits)
    else:
        if url:
            raise RecipeError(f"sandbox: url= goes with backend=remote, not {backend}")
        sandbox = Sandbox(backend, slots, limits, python or None)
    sandbox.probe()
    return sandbox
