"""Calls to actors, and whether these live.

An actor holds one object, whose methods are called by name. Beside the call that it is at, a thread of its own answers signs of life: a
process that computes for an hour lives, one that was stopped does not.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import RunFailure, SPPOError, WorkerLost

PERIOD = 1.0
"""Seconds between two questions whether an actor lives."""
BROKEN = (
    "gloo",
    "nccl",
    "distbackenderror",
    "distnetworkerror",
    "diststoreerror",
    "connection closed",
    "connection reset",
    "broken pipe",
)
"""Words of errors that an exchange between processes raises when one of them is lost."""
HEALTH = "health"
"""The concurrency group of signs of life."""


@dataclass(frozen=True)
class Failed:
    """What a call raised: the error where it can travel, and its traceback."""

    error: BaseException
    trace: str

    @property
    def of_another(self) -> bool:
        """Whether it says that the other end of an exchange is gone or late, and nothing of its own."""
        text = str(self.error).lower()
        return not isinstance(self.error, SPPOError | MemoryError) and any(word in text for word in BROKEN)


class Hosted:
    """The inside of every actor."""

    def __init__(self) -> None:
        self.inner: Any = None

    def warm(self, inner: type) -> None:
        """Import what a class needs, which is done once its name is here."""

    def open(self, make: Callable[[], Any]) -> Any:
        """Make the object, and return its `facts`."""
        return self._guarded(lambda: self._opened(make))

    def _opened(self, make: Callable[[], Any]) -> Any:
        self.inner = make()
        return self.inner.facts()

    def call(self, name: str, *args: Any) -> Any:
        """What a method of the object returns, or Failed."""
        return self._guarded(lambda: getattr(self.inner, name)(*args))

    def _guarded(self, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Exception as error:  # whatever it is, the driver decides
            kept: BaseException = RuntimeError(f"{type(error).__name__}: {error}")
            if isinstance(error, SPPOError):
                kept = error
            elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                kept = MemoryError(str(error))
            return Failed(kept, traceback.format_exc())

    def pid(self) -> int:
        """Of its process, on its node."""
        return os.getpid()

    def alive(self) -> Any:
        """A sign of life: how far the present call is."""
        return None if self.inner is None else self.inner.progress()


class LearnerRank(Hosted):
    """An actor that trains."""


class RolloutWorker(Hosted):
    """An actor that samples."""


class VerifierWorker(Hosted):
    """An actor that judges."""


class Handle:
    """An actor as the driver knows it."""

    def __init__(self, name: str, actor: Any, timeout: float) -> None:
        """`name` is for people; `timeout` in seconds without a sign of life."""
        self.name, self.actor, self.timeout = name, actor, timeout
        self.progress: Any = None
        self._asked, self._ping = 0.0, None
        self.expect()

    def expect(self, timeout: float | None = None) -> None:
        """From now on the time without a sign of life is counted anew; `timeout` holds until the first one."""
        self._seen, self._limit = time.monotonic(), timeout or self.timeout

    def call(self, name: str, *args: Any) -> Any:
        """Begin a call; returns Ray's reference to what it will return."""
        self.expect()
        return self.actor.call.remote(name, *args)

    def open(self, make: Callable[[], Any], timeout: float) -> Any:
        """Begin to make the object in the actor."""
        self.expect(timeout)
        return self.actor.open.remote(make)

    def lives(self) -> bool:
        """Whether it has shown a sign of life in time; asks for the next one."""
        import ray

        now = time.monotonic()
        if self._ping is not None and ray.wait([self._ping], timeout=0)[0]:
            ping, self._ping = self._ping, None
            try:
                self.progress, self._seen, self._limit = ray.get(ping), now, self.timeout
            except ray.exceptions.RayError:
                return False
        if self._ping is None and now - self._asked >= PERIOD:
            self._ping, self._asked = self.actor.alive.options(concurrency_group=HEALTH).remote(), now
        return now - self._seen < self._limit

    def kill(self) -> None:
        """End its process, whatever it does."""
        import ray

        ray.kill(self.actor)


def outcomes(running: dict[Any, Handle], tick: Callable[[], None] | None = None) -> Iterator[tuple[Any, Handle, Any]]:
    """What calls return, as they end: the reference, whose it is, and the value, Failed, or WorkerLost (its actor is dead or hangs, or has lost what it
    works with).

    More calls may be added to `running` while this goes on. `tick` is called about every second.
    """
    import ray

    looked = time.monotonic()
    while running:
        done, _ = ray.wait(list(running), num_returns=1, timeout=PERIOD)
        for ref in done:
            handle = running.pop(ref)
            try:
                value = ray.get(ref)
            except ray.exceptions.RayTaskError:
                raise  # of the actor's own code, not of its process
            except ray.exceptions.RayError as error:  # the process, its node, or what it had returned is gone
                value = WorkerLost(f"{handle.name} died" + _reason(error))
            if isinstance(value, Failed) and isinstance(value.error, WorkerLost):  # what it works with is lost
                value = WorkerLost(f"{handle.name}: {value.error}")
            yield ref, handle, value
        if time.monotonic() - looked < PERIOD:
            continue
        looked = time.monotonic()
        for ref, handle in [*running.items()]:
            if not handle.lives():
                del running[ref]
                yield ref, handle, WorkerLost(f"{handle.name} has shown no sign of life for {handle.timeout:g} seconds")
        if tick is not None:
            tick()


def _reason(error: Exception) -> str:
    text = str(error)
    if "low on memory" in text.lower():  # every death is said to be perhaps one of too much memory
        return ": Ray ended it, because its node is short of memory"
    return (
        ": its node is gone"
        if "node" in text.lower() and "died" in text.lower() and "worker process" not in text
        else ""
    )


def raised(handle: Handle, failed: Failed) -> BaseException:
    """The error that a call raised, to be raised here: sppo's own, or a RunFailure that says where."""
    if isinstance(failed.error, SPPOError | MemoryError):
        return failed.error
    return RunFailure(f"{handle.name}: {failed.error}\n{failed.trace}")
