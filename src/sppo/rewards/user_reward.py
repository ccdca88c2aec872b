"""A user's reward at work: what it may do wrong is named in one sentence, and costs no more samples than it must.

A call that raises, hangs or returns a wrong count is repeated one sample at a time, so that only the samples at fault are lost:
they are masked, with the sentence in their evidence. Where more than a tenth is at fault, the reward is broken: RewardError.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from ..errors import RewardError
from ..types import Rollout, Verdict

TOLERATED = 0.1
LIMIT = 600.0
"""Seconds that one call may take, by default (`reward.limit`)."""
LEAST = 1.0
IN_PROCESS = 10.0
"""Seconds that one of our own judges may take for one response, in the trainer's process. They are linear in it: none comes near."""


class Fault(Exception):
    """What is wrong with a call of a reward, in a sentence."""


class _Overrun(BaseException):
    """Raised inside a reward that does not come back; not an Exception, which a user's `except Exception` would swallow."""


def guarded(
    name: str, limit: float, rollouts: Sequence[Rollout], call: Callable[[Sequence[Rollout]], Sequence[Verdict | str]]
) -> list[Verdict]:
    """One verdict for each rollout, from a `call` that gives a verdict, or the sentence that says what is wrong with a sample.

    Raises RewardError when more than a tenth of the samples are at fault.
    """
    if not rollouts:
        return []
    n = len(rollouts)
    try:
        found = list(_once(name, limit, rollouts, call))
    except Fault as fault:
        if n * TOLERATED < 1:
            raise RewardError(str(fault)) from fault.__cause__
        found = _one_by_one(name, max(limit / n, LEAST), rollouts, call, str(fault))
    faults = [f for f in found if isinstance(f, str)]
    if len(faults) > TOLERATED * n:
        raise RewardError(faults[0] if n == 1 else f"{faults[0]} ({len(faults)} of {n} samples)")
    return [Verdict(0.0, "infra_error", {"reason": v}) if isinstance(v, str) else v for v in found]


def each_within(
    rollouts: Sequence[Rollout], judge: Callable[[Rollout], Verdict], limit: float = IN_PROCESS
) -> list[Verdict]:
    """The verdicts of a judge of our own, one by one. A response that keeps it busy for `limit` seconds is a `timeout`, score 0."""
    found: list[Verdict] = []
    while len(found) < len(rollouts):
        try:
            with _deadline(limit) as renew:
                for rollout in rollouts[len(found) :]:
                    renew()
                    found.append(judge(rollout))
        except _Overrun:
            found.append(Verdict(0.0, "timeout", {"limit_s": limit}))
    return found


def _one_by_one(
    name: str,
    limit: float,
    rollouts: Sequence[Rollout],
    call: Callable[[Sequence[Rollout]], Sequence[Verdict | str]],
    first: str,
) -> list[Verdict | str]:
    """Each sample by itself. Once more than a tenth has failed the rest is not tried: every try may take its whole limit."""
    found: list[Verdict | str] = []
    faults = 0
    for rollout in rollouts:
        if faults > TOLERATED * len(rollouts):
            raise RewardError(first)
        try:
            found += _once(name, limit, [rollout], call)
        except Fault as fault:
            found.append(f"{fault} (task {rollout.task.id})")
        faults += isinstance(found[-1], str)
    return found


def _once(
    name: str, limit: float, rollouts: Sequence[Rollout], call: Callable[[Sequence[Rollout]], Sequence[Verdict | str]]
) -> Sequence[Verdict | str]:
    try:
        with _deadline(limit):
            return call(rollouts)
    except Fault:
        raise
    except _Overrun:
        raise Fault(
            f"reward {name} did not come back within {limit:g} s with {len(rollouts)} completions (reward.limit)"
        ) from None
    except (Exception, SystemExit) as error:
        raise Fault(
            f"reward {name} raised {type(error).__name__}: {error} (called with {len(rollouts)} completions); "
            "a sample that cannot be graded should get None"
        ) from error


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise _Overrun in this thread when time is up; what is yielded begins the time anew.

    The reward stays in its thread: some use signals, which work in the main one only.

    In the main thread a signal also ends a sleep or a read; in another thread, or where the signal is taken, the exception comes
    when Python code runs next.
    """
    here = threading.get_ident()
    done = threading.Event()
    over = False
    began = time.monotonic()
    by_signal = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    )

    def raise_here(*_: object) -> None:
        if over and not done.is_set():
            raise _Overrun

    def watch() -> None:
        nonlocal over
        while (left := began + seconds - time.monotonic()) > 0:
            if done.wait(left):
                return
        over = True
        if by_signal:
            signal.pthread_kill(here, signal.SIGUSR2)
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(here), ctypes.py_object(_Overrun))

    def renew() -> None:
        nonlocal began
        began = time.monotonic()

    if by_signal:
        signal.signal(signal.SIGUSR2, raise_here)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield renew
    finally:
        done.set()
        watcher.join()
        if by_signal:
            signal.signal(signal.SIGUSR2, signal.SIG_DFL)
