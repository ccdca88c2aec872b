"""A user's own reward: called under a time limit, its results checked, its faults named in one sentence.

A call that raises, hangs or returns a wrong count is repeated one sample at a time, so that only the samples at fault
are lost: they are masked, with the sentence in their evidence. Where more than a tenth is at fault, the reward is
broken: RewardError.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RecipeError, RewardError
from ..spec import nearest
from ..tasks.rows import columns_found
from ..types import OUTCOMES, Rollout, Task, Verdict

TOLERATED = 0.1
LIMIT = 600.0
"""Seconds that one call may take, by default (`reward.limit`)."""
LEAST = 1.0
IN_PROCESS = 10.0
"""Seconds that one of our own judges may take for one response, in the trainer's process.

They are linear in it: none comes near.
"""


GIVEN_TO_ALL = ("prompts", "completions", "completion_ids")
"""Names under which a callable receives the responses."""


class Fault(Exception):
    """What is wrong with a call of a reward, in a sentence."""


class _Overrun(BaseException):
    """Raised inside a reward that does not come back; not an Exception, which a user's `except Exception` would
    swallow."""


class CallableReward:
    """A user's `f(prompts, completions, **columns)`: checked at every call, because a silent 0 is the worst answer.

    Prompts and completions are given as the user's rows gave them: text for text prompts, chat messages for chat
    prompts. A trajectory of several turns is all its messages, and `evidence` is what its environment said of it
    (empty where it said nothing); `environments` are the objects of `environment_factory`, as TRL has it. `options` go
    with each call, before columns of the same name.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, limit: float = LIMIT, options: Mapping[str, Any] | None = None
    ) -> None:
        """Raises RecipeError for an option that the function does not take."""
        self.function, self.name, self.limit, self.options = function, name, limit, dict(options or {})
        parameters = inspect.signature(function).parameters.values()
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}
        for key in self.options:
            if key in GIVEN_TO_ALL or not (self.takes_any or key in self.takes):
                known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in GIVEN_TO_ALL]
                raise RecipeError(f"reward {name} has no option {key!r}: {nearest(key, known)}")

    @property
    def divisible(self) -> bool:
        """Whether the function says `divisible = True`: it scores every response by itself."""
        return bool(getattr(self.function, "divisible", False))

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Raises RewardError naming the reward and the remedy when it raises, hangs or returns what it may not."""
        return guarded(self.name, self.limit, rollouts, self._call)

    def _call(self, rollouts: Sequence[Rollout]) -> list[Verdict | str]:
        columns = {key for r in rollouts for key in r.task.columns} - {
            *GIVEN_TO_ALL,
            "prompt",
            "completion",
            *self.options,
        }
        chosen = columns if self.takes_any else columns & self.takes
        arguments: dict[str, Any] = {key: [r.task.columns.get(key) for r in rollouts] for key in sorted(chosen)}
        if self.takes_any or "completion_ids" in self.takes:
            arguments["completion_ids"] = [list(r.response_ids) for r in rollouts]
        prompts = [r.task.prompt for r in rollouts]
        completions = [
            list(r.messages)
            or (r.text if isinstance(r.task.prompt, str) else [{"role": "assistant", "content": r.text}])
            for r in rollouts
        ]
        told = "evidence" in self.takes or (self.takes_any and any(r.evidence for r in rollouts))
        if told and "evidence" not in columns:
            arguments["evidence"] = [dict(r.evidence) for r in rollouts]
        if "environments" in self.takes or (self.takes_any and any(r.environment is not None for r in rollouts)):
            arguments["environments"] = [r.environment for r in rollouts]
        arguments |= {"prompts": prompts, "completions": completions, **self.options}
        if not self.takes_any:
            arguments = {key: value for key, value in arguments.items() if key in self.takes}
        scores = self.function(**arguments)
        if not isinstance(scores, (list, tuple)):
            scores = getattr(scores, "tolist", lambda: scores)()
        if not isinstance(scores, (list, tuple)) or len(scores) != len(rollouts):
            got = f"{len(scores)} scores" if isinstance(scores, (list, tuple)) else type(scores).__name__
            raise Fault(
                f"reward {self.name} returned {got} for {len(rollouts)} completions; it must return one each, in order"
            )
        return [self._verdict(score, r) for score, r in zip(scores, rollouts, strict=True)]

    def _verdict(self, score: Any, rollout: Rollout) -> Verdict | str:
        if score is None:
            return Verdict(0.0, "infra_error", {"reason": f"{self.name} returned None"})
        try:
            value = float(score)
        except (TypeError, ValueError):
            return f"reward {self.name} returned {score!r} for task {rollout.task.id}; scores are numbers in [0, 1]"
        if math.isnan(value) or not 0.0 <= value <= 1.0:
            return f"reward {self.name} returned {value} for task {rollout.task.id}; scores must lie in [0, 1], None means ungradable"
        return Verdict(value, "correct" if value >= 0.5 else "wrong", {"reward": self.name})

    def check(self, task: Task) -> str | None:
        return None

    def close(self) -> None:
        return None


class UserJudge:
    """A user's object with `judge`: the count and the types are checked."""

    def __init__(self, inner: Any, name: str, limit: float) -> None:
        self.inner, self.name, self.limit = inner, name, limit

    @property
    def divisible(self) -> bool:
        """Whether the object says `divisible = True`: it judges every response by itself."""
        return bool(getattr(self.inner, "divisible", False))

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Raises RewardError as `CallableReward` does."""
        return guarded(self.name, self.limit, rollouts, self._call)

    def _call(self, rollouts: Sequence[Rollout]) -> list[Verdict | str]:
        verdicts = list(self.inner.judge(rollouts))
        if len(verdicts) != len(rollouts) or not all(isinstance(v, Verdict) for v in verdicts):
            raise Fault(
                f"reward {self.name} must return one Verdict for each of {len(rollouts)} rollouts, got {len(verdicts)} objects"
            )
        return [self._checked(v, r) for v, r in zip(verdicts, rollouts, strict=True)]

    def _checked(self, verdict: Verdict, rollout: Rollout) -> Verdict | str:
        if verdict.outcome not in OUTCOMES:
            return f"reward {self.name} gave task {rollout.task.id} the outcome {verdict.outcome!r}; known: {', '.join(OUTCOMES)}"
        if not verdict.masked and not (0.0 <= verdict.score <= 1.0 and 0.0 <= verdict.correct <= 1.0):
            return f"reward {self.name} scored task {rollout.task.id} {verdict.score}; scores must lie in [0, 1]"
        return replace(
            verdict, score=float(verdict.score), correctness=float(verdict.correct)
        )  # plain numbers, not NumPy's

    def check(self, task: Task) -> str | None:
        check = getattr(self.inner, "check", None)
        return None if check is None else check(task)

    def close(self) -> None:
        getattr(self.inner, "close", lambda: None)()


def guarded(
    name: str, limit: float, rollouts: Sequence[Rollout], call: Callable[[Sequence[Rollout]], Sequence[Verdict | str]]
) -> list[Verdict]:
    """One verdict for each rollout, from a `call` that gives a verdict, or the sentence that says what is wrong with a
    sample.

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
    """The verdicts of a judge of our own, one by one.

    A response that keeps it busy for `limit` seconds is a `timeout`, score 0.
    """
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
    """Each sample by itself.

    Once more than a tenth has failed the rest is not tried: every try may take its whole limit.
    """
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
        # what a missing key or argument is looked for among
        have = (
            f"; the columns are {columns_found(rollouts[0].task.columns)}"
            if isinstance(error, KeyError | TypeError)
            else ""
        )
        raise Fault(
            f"reward {name} raised {type(error).__name__}: {error} (called with {len(rollouts)} completions); "
            f"a sample that cannot be graded should get None{have}"
        ) from error


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise _Overrun in this thread when time is up; what is yielded begins the time anew.

    The reward stays in its thread: some use signals, which work in the main one only.

    In the main thread a signal also ends a sleep or a read; in another thread, or where the signal is taken, the
    exception comes when Python code runs next.
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
