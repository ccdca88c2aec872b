"""The speed of a correct program, relative to the row's reference solution: 0 for a wrong one, else min(speed-up,
cap)/cap.

    runtime                       as fast as the reference: 0.5; twice as fast or more: 1
    runtime:cap=4,pairs=11        up to four times as fast counts; eleven paired runs at a time instead of seven
    code + 0.5 * runtime          correctness first; the critic learns correctness alone
    runtime:backend=…             the options of `code` for its sandbox

A row needs its tests (as for `code`) and a `reference` (or `canonical_solution`, `code`, `solution`): a right program.
Speed is measured on `runtime_tests` where a row has them (larger inputs, in any layout of tests), else on all of its
tests.

The program and the reference take turns in one jail, each run in a fresh process: nothing is remembered between runs,
and drift of the machine affects both. The time is the processor's for the whole process as the jail's keeper sees it,
never a clock that the program could reach; where the machine counts instructions, those are used. The cost of a program
that does nothing is subtracted from both. The speed-up is the median over pairs in alternating order; noisy rows get up
to eight times as many pairs.

A quick reference is run several times for one turn, as `timeit` repeats a call, and the program as often: each time in
a fresh process and with all of its start, so that a repetition costs what the first run does. A reference that takes
less than a quarter of what starting a process takes is `invalid_task`: its tests need larger inputs. That is a ratio of
two times of the same machine, so a row that is sound on one machine is sound on a faster one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RecipeError
from ..sandbox import Job, Result, Runs, Suite, open_sandbox
from ..spec import call
from ..types import Outcome, Rollout, Task, Verdict
from .code import CodeReward
from .program import fitted, program_of
from .suites import suite_in, suites_of

REFERENCES = ("reference", "canonical_solution", "code", "solution")
RUNS = (1, 2, 5, 10)
"""How often a program may be run for one turn: the first of these that suffices for the reference."""
LEAST_WORK = 2.5
"""What the reference does in one turn, in runs of a process that does nothing; these take about 4 ms, give or take a
few tenths."""
ENOUGH, MOST_ROUNDS = 0.03, 8
"""`pairs` pairs are run at a time, until the median's relative standard error is this small; up to MOST_ROUNDS times.
"""
BROKEN = "the sandbox could not run the reference solution"
FLOOR = 0.025
"""Share of an idle run's time below which a cost cannot be distinguished from 0."""


def build(cap: float = 2.0, pairs: int = 7, **sandbox: Any) -> RuntimeReward:
    """The reward for `reward.use = "runtime:…"`. Raises SandboxUnavailable when programs cannot be isolated here."""
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 1 <= cap <= 1000:
        raise RecipeError(f"reward runtime: cap={cap} must be a speed-up between 1 and 1000")
    if isinstance(pairs, bool) or not isinstance(pairs, int) or not 1 <= pairs <= 50:
        raise RecipeError(f"reward runtime: pairs={pairs} must be a whole number between 1 and 50")
    return RuntimeReward(call(open_sandbox, "reward runtime", **sandbox), cap, pairs)


@dataclass(frozen=True)
class Cost:
    """What a run took, on average over a turn: processor time, and instructions where they are counted."""

    seconds: float
    instructions: float | None

    @classmethod
    def of(cls, results: Sequence[Result], runs: int = 1) -> Cost:
        """The cost of one run, from the processes of `runs` of them."""
        known = [r.instructions for r in results if r.instructions is not None]
        counted = sum(known) / runs if len(known) == len(results) else None
        return cls(sum(r.cpu_seconds for r in results) / runs, counted)

    def beyond(self, idle: Cost) -> Cost:
        """Minus the cost of a program that does nothing, and at least the smallest measurable cost."""
        counted = self.instructions is not None and idle.instructions is not None
        return Cost(
            max(self.seconds - idle.seconds, FLOOR * idle.seconds),
            max((self.instructions or 0) - (idle.instructions or 0), 1) if counted else None,
        )

    def times(self, other: Cost) -> float:
        """How many times the other's cost this one is: in instructions if both were counted, else in seconds."""
        if self.instructions is not None and other.instructions is not None:
            return self.instructions / other.instructions
        return self.seconds / other.seconds


@dataclass(frozen=True)
class Turn:
    """The reference and the program one after the other, and idle runs beside them."""

    idle: Cost
    reference: Cost
    program: Cost

    @property
    def speedup(self) -> float:
        """How many times as fast as the reference the program was."""
        return self.reference.beyond(self.idle).times(self.program.beyond(self.idle))


def standard_error(turns: Sequence[Turn]) -> float:
    """Relative standard error of the median speed-up, from the median absolute deviation of its logarithm (robust, as
    the median is)."""
    logs = [math.log(turn.speedup) for turn in turns]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    return 1.2533 * spread / math.sqrt(len(logs))


def settled(turns: Sequence[Turn], cap: float) -> bool:
    """Whether more pairs are unnecessary: the median is known well enough, or certainly above the cap."""
    error = standard_error(turns)
    return error <= ENOUGH or statistics.median(turn.speedup for turn in turns) * (1 - 3 * error) > cap


class RuntimeReward:
    """Verdicts of `code`, and for what is correct the speed."""

    divisible = False
    """Programs that are timed by several workers at once would slow each other down."""

    def __init__(self, sandbox: Runs, cap: float, pairs: int) -> None:
        self.sandbox, self.cap, self.pairs = sandbox, cap, pairs
        self.code = CodeReward(sandbox)
        self._checked: dict[str, str | None] = {}  # by task id: what is wrong with the row's reference
        self._runs: dict[str, int] = {}  # by task id: how often its programs are run for one turn

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """As `code`, with the speed as the score of correct programs; invalid_task where the reference cannot be
        measured."""
        problems = [self.check(r.task) for r in rollouts]
        good = [r for r, problem in zip(rollouts, problems, strict=True) if problem is None]
        judged = iter(self.code.judge(good))
        verdicts = [
            Verdict(0.0, "infra_error" if p == BROKEN else "invalid_task", {"reason": p}) if p else next(judged)
            for p in problems
        ]
        turns: dict[int, list[Turn]] = {i: [] for i, v in enumerate(verdicts) if v.outcome == "correct"}
        todo = list(turns)
        while todo:  # more pairs for those that are still noisy
            groups = [self._group(rollouts[i], k) for i in todo for k in range(self.pairs)]
            results = self.sandbox.run_groups(groups)
            for n, i in enumerate(todo):
                for k, group in enumerate(results[n * self.pairs : (n + 1) * self.pairs]):
                    found = self._turn(verdicts[i], rollouts[i].task, group, k)
                    if isinstance(found, Verdict):
                        verdicts[i] = found
                        del turns[i]
                        break
                    turns[i].append(found)
            todo = [
                i
                for i in todo
                if i in turns and not settled(turns[i], self.cap) and self._may_go_on(rollouts[i], turns[i])
            ]
        for i, measured in turns.items():
            verdicts[i] = self._timed(verdicts[i], rollouts[i].task, measured)
        return verdicts

    def _may_go_on(self, rollout: Rollout, turns: Sequence[Turn]) -> bool:
        return len(turns) * self._runs[rollout.task.id] < MOST_ROUNDS * self.pairs

    def _group(self, rollout: Rollout, k: int) -> list[Job]:
        """What is run for pair k: idle, reference, program; for the next one idle, program, reference; each as often as
        it takes."""
        task = rollout.task
        suite, runs = _suite(task), self._runs[task.id]
        program = program_of(task, rollout.text) or ""
        one, other = _jobs(_reference(task), suite) * runs, _jobs(program, suite) * runs
        return [*_idle(suite) * runs, *(one + other if k % 2 == 0 else other + one)]

    def _turn(self, verdict: Verdict, task: Task, results: Sequence[Result], k: int) -> Turn | Verdict:
        """The costs of pair k; a verdict instead where the program was wrong when it was timed."""
        suite, runs = _suite(task), self._runs[task.id]
        if any(r.status == "infra_error" for r in results):
            return replace(verdict, score=0.0, outcome="infra_error", correctness=None)
        idle, first, second = _parts(results, 3)
        reference, program = (first, second) if k % 2 == 0 else (second, first)
        for report in map(suite.report, _parts(program, runs)):
            if not all(report.passed):
                timed = {**report.evidence, "passed": sum(report.passed), "of": len(report.passed)}
                outcome: Outcome = "timeout" if report.status == "timeout" else "wrong"
                return Verdict(0.0, outcome, {**verdict.evidence, "timed": timed})
        return Turn(Cost.of(idle, runs), Cost.of(reference, runs), Cost.of(program, runs))

    def _timed(self, verdict: Verdict, task: Task, turns: Sequence[Turn]) -> Verdict:
        speedup = statistics.median(turn.speedup for turn in turns)
        typical = sorted(turns, key=lambda turn: turn.speedup)[len(turns) // 2]
        evidence = {
            **verdict.evidence, "speedup": speedup, "error": standard_error(turns), "pairs": len(turns), "runs": self._runs[task.id],
            "by": "seconds" if typical.program.instructions is None else "instructions",
            "seconds": typical.program.beyond(typical.idle).seconds,
            "reference_seconds": typical.reference.beyond(typical.idle).seconds,
        }  # fmt: skip
        evidence["measures"] = {**evidence.get("measures", {}), "speedup": min(speedup, self.cap)}
        return Verdict(min(speedup, self.cap) / self.cap, "correct", evidence, correctness=1.0)

    def check(self, task: Task) -> str | None:
        """Why the row cannot be judged (no tests, no reference, a reference that fails or is too quick to be measured),
        or None."""
        if task.id not in self._checked:
            problem = self._problem(task)
            if problem == BROKEN:  # the machine's fault, not the row's: asked again the next time
                return problem
            self._checked[task.id] = problem
        return self._checked[task.id]

    def _problem(self, task: Task) -> str | None:
        if problem := self.code.check(task):
            return problem
        suite = _suite(task)
        if isinstance(suite, str):
            return suite
        reference = _reference(task)
        if not reference:
            return f"the row has no reference solution (a column {', '.join(f'`{c}`' for c in REFERENCES)})"
        idle, jobs = _idle(suite), _jobs(reference, suite)
        for runs in RUNS:
            (results,) = self.sandbox.run_groups([(idle * runs + jobs * runs) * 3])
            if any(r.status == "infra_error" for r in results):
                return BROKEN
            turns = [_parts(turn, 2) for turn in _parts(results, 3)]
            report = suite.report(_parts(turns[0][1], runs)[0])
            if not all(report.passed):
                return f"the reference solution fails its own tests: {report.evidence}"
            start = min(r.cpu_seconds for nothing, _ in turns for r in nothing)  # what else the machine does adds to it
            own = statistics.median(Cost.of(r, runs).beyond(Cost.of(nothing, runs)).seconds for nothing, r in turns)
            if runs * own >= LEAST_WORK * start:
                self._runs[task.id] = runs
                return None
        return (
            f"the reference takes {1000 * own:.2g} ms on its tests, too little to be measured beside the {1000 * start:.2g} ms that "
            f"a process takes to start; give larger inputs in `runtime_tests` ({1000 * start * LEAST_WORK / RUNS[-1]:.2g} ms or more)"
        )

    def close(self) -> None:
        self.sandbox.close()


def _parts(results: Sequence[Result], n: int) -> list[Sequence[Result]]:
    """`n` equal parts, in order."""
    size = len(results) // n
    return [results[i * size : (i + 1) * size] for i in range(n)]


def _suite(task: Task) -> Any:
    """What is timed: `runtime_tests`, else the visible and hidden tests of the row (those of one kind); a reason if
    there is none."""
    if task.columns.get("runtime_tests") not in (None, "", [], {}):
        suite = suite_in(task, "runtime_tests")
        return f"column `runtime_tests`: {suite}" if isinstance(suite, str) else suite
    found = suites_of(task)
    if isinstance(found, str):
        return found
    visible, hidden = found
    if hidden is None or hidden.kind != visible.kind or visible.kind == "asserts":
        return visible
    return replace(visible, cases=(*visible.cases, *hidden.cases))


def _reference(task: Task) -> str:
    """The row's right program, assembled as a response would be; empty where there is none."""
    columns = (*((task.solution,) if task.solution else ()), *(task.columns.get(name) for name in REFERENCES))
    text = next((c for c in columns if isinstance(c, str) and c.strip()), "")
    return program_of(task, text) or "" if text else ""


def _jobs(program: str, suite: Suite) -> list[Job]:
    program, fit = fitted(program, suite)
    return fit.jobs(program)


def _idle(suite: Suite) -> list[Job]:
    """What answers the same questions without doing anything."""
    if suite.kind == "stdio":
        return [Job("script", "import sys\nsys.stdin.read()", stdin=case.stdin) for case in suite.cases]
    if suite.kind == "asserts":
        return [Job("script", "")]
    return replace(suite, cases=tuple(replace(c, entry="f") for c in suite.cases)).jobs("def f(*a, **k): pass")
