"""Code: the program in a response, run in the sandbox against the row's tests. 1 when every test holds, else 0.

    code                            every test, visible and hidden, must hold
    code:partial=true               the share of tests that hold instead
    code:tolerance=1e-9             how far decimal numbers on standard output may be off; 0: not at all
    code:backend=bwrap,slots=2,wall=8,cpu=5,memory_mb=512,fork=false,python=/usr/bin/python3
    code:backend=remote,url=http://judge:8790      on another machine (sppo sandbox serve)

Layouts of tests, as published data sets have them (JSON text is parsed first):

    tests = ["assert f(1) == 2", …]                           MBPP (`test_list`; `test_setup_code`, `test_imports`)
    tests = [{"input": "3\\n", "output": "9\\n"}, …]            standard input and output
    tests = {"inputs": […], "outputs": […]}                   the same (APPS, TACO); with `fn_name`, calls and their values
    tests = [{"args": [1], "expected": 2}, …] + `entry_point`  calls and their values (`kwargs` too)
    test = "def check(candidate): …" + `entry_point`          HumanEval, its files unchanged
    tests = [{"input": "[1]\\n2", "output": "3", "testtype": "functional"}]   LiveCodeBench; the name from `metadata` or `entry_point`
    test = "class TestCases(unittest.TestCase): …"            BigCodeBench, which is run without a runner of its own
    entry_point = "Solution.f"                                 a method of a class; a class `Solution` is found by itself
    hidden_tests = …                                           any of these again: they count, and the gap is measured
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RecipeError
from ..sandbox import Report, Runs, Suite, TestCode, judge, open_sandbox
from ..sandbox.verdict import TOLERANCE
from ..spec import call
from ..types import Outcome, Rollout, Task, Verdict
from .probes import probes, problem
from .program import fitted, program_of, reference_of
from .suites import column_of, suites_of

BROKEN = "the sandbox could not try the row's tests"
DECIDED = ("ok", "exception")
"""Statuses of a reference solution that are the row's fault, not the machine's."""


def build(partial: bool = False, tolerance: float = TOLERANCE, **sandbox: Any) -> CodeReward:
    """The reward for `reward.use = "code:…"`. Raises SandboxUnavailable when programs cannot be isolated here."""
    if not isinstance(partial, bool):
        raise RecipeError(f"reward code: partial={partial} must be true or false")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise RecipeError(f"reward code: tolerance={tolerance} must be a number from 0 (exact) to below 1")
    return CodeReward(call(open_sandbox, "reward code", **sandbox), partial, tolerance)


class CodeReward:
    """Verdicts from running programs; see the module."""

    def __init__(self, sandbox: Runs, partial: bool = False, tolerance: float = TOLERANCE) -> None:
        self.sandbox, self.partial, self.tolerance = sandbox, partial, tolerance
        self._problems: dict[
            bytes, str | None
        ] = {}  # by a row's tests and reference: why nothing can be judged by them

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct, wrong, timeout, crashed, unparseable (no code: score 0); invalid_task and infra_error (masked)."""
        verdicts: list[Verdict | None] = [None] * len(rollouts)
        runs: list[tuple[int, str, str, Suite]] = []  # (rollout, "visible" or "hidden", program, tests)
        rows = {id(r.task): r.task for r in rollouts}
        suites = {key: self._suites(task) for key, task in rows.items()}
        for i, rollout in enumerate(rollouts):
            found = suites[id(rollout.task)]
            if isinstance(found, str):
                continue
            code = program_of(rollout.task, rollout.text, found[0])
            if code is None:
                verdicts[i] = Verdict(0.0, "unparseable", {"reason": "the response holds no Python code"})
                continue
            for name, suite in zip(("visible", "hidden"), found, strict=True):
                if suite is not None:
                    runs.append((i, name, *fitted(code, suite)))
        done, problems = self._run([(code, suite) for _, _, code, suite in runs], rows, suites)
        reports: dict[int, dict[str, Report]] = {}
        for (i, name, _, _), report in zip(runs, done, strict=True):
            reports.setdefault(i, {})[name] = report
        for i, by_name in reports.items():
            verdicts[i] = self._verdict(by_name)
        for i, rollout in enumerate(rollouts):
            if problem := problems[id(rollout.task)]:
                verdicts[i] = Verdict(0.0, "infra_error" if problem == BROKEN else "invalid_task", {"reason": problem})
        return [v for v in verdicts if v is not None]

    def _suites(self, task: Task) -> tuple[Suite, Suite | None] | str:
        """A row's tests, if their expected output fits into the sandbox's output limit."""
        found = suites_of(task)
        if isinstance(found, str):
            return found
        visible, hidden = (None if s is None else replace(s, tolerance=self.tolerance) for s in found)
        assert visible is not None
        room = self.sandbox.limits.output_bytes
        for suite in (visible, hidden):
            for i, size in enumerate(() if suite is None else suite.sizes()):
                if size > room:
                    return f"test {i} expects {size / (1 << 20):.1f} MiB of output, and the sandbox keeps {room / (1 << 20):.1f} MiB"
        return visible, hidden

    def _run(
        self,
        runs: Sequence[tuple[str, Suite]],
        rows: Mapping[int, Task],
        suites: Mapping[int, tuple[Suite, Suite | None] | str],
    ) -> tuple[list[Report], dict[int, str | None]]:
        """The reports of programs, and for each row why it cannot be judged, or None; its probes run beside them, the
        first time."""
        problems: dict[int, str | None] = {}
        todo: list[tuple[int, bytes, str, TestCode, dict[str, str]]] = []
        for key, found in suites.items():
            problems[key] = found if isinstance(found, str) else None
            if isinstance(found, str):
                continue
            for column, suite in ((column_of(rows[key]), found[0]), ("hidden_tests", found[1])):
                if suite is not None and suite.code is not None:
                    reference = reference_of(rows[key], found[0])
                    described = repr((suite.code.tests, suite.code.setup, suite.code.names, reference)).encode(
                        "utf-8", "backslashreplace"
                    )
                    digest = hashlib.blake2b(described, digest_size=16).digest()
                    if digest in self._problems:
                        problems[key] = problems[key] or self._problems[digest]
                    else:
                        todo.append((key, digest, column, suite.code, probes(suite.code, reference)))
        asked = [
            fitted(program, Suite("asserts", code=code)) for *_, code, programs in todo for program in programs.values()
        ]
        reports = judge(self.sandbox, [*runs, *asked])
        answers = iter(reports[len(runs) :])
        for key, digest, column, code, programs in todo:
            ended = {name: next(answers) for name in programs}
            if any(report.status == "infra_error" for report in ended.values()):
                problems[key] = problems[key] or BROKEN  # the machine's fault, not the row's: asked again the next time
                continue
            decided = {name: report.status in DECIDED for name, report in ended.items()}
            why = problem(code.tests, {name: report.passed for name, report in ended.items()}, decided)
            cannot = next((report.evidence["cannot"] for report in ended.values() if "cannot" in report.evidence), None)
            why = f"the tests cannot be run in a jail of their own: {cannot}" if cannot else why
            self._problems[digest] = why and f"column `{column}`: {why}"
            problems[key] = problems[key] or self._problems[digest]
        return reports[: len(runs)], problems

    def _verdict(self, reports: Mapping[str, Report]) -> Verdict:
        evidence: dict[str, Any] = {}
        measures = {}
        for name, report in reports.items():
            evidence[name] = {"passed": sum(report.passed), "of": len(report.passed), **report.evidence}
            measures[f"{name}_pass_rate"] = report.fraction
        if "hidden" in reports:
            measures["hidden_gap"] = measures["visible_pass_rate"] - measures["hidden_pass_rate"]
        evidence["measures"] = measures
        if any(r.status == "infra_error" for r in reports.values()):
            return Verdict(0.0, "infra_error", evidence)
        passed = [held for r in reports.values() for held in r.passed]
        if passed and all(passed):
            return Verdict(1.0, "correct", evidence)
        cannot = next((r.evidence["cannot"] for r in reports.values() if "cannot" in r.evidence), None)
        if cannot is not None:  # reported by the tests' jail about the tests' own values: no program can cause it
            return Verdict(
                0.0, "invalid_task", evidence | {"reason": f"the tests cannot be run in a jail of their own: {cannot}"}
            )
        statuses = {r.status for r in reports.values()}
        outcome: Outcome = "timeout" if "timeout" in statuses else "wrong"
        if outcome == "wrong" and not any(passed) and statuses - {"ok"}:
            outcome = "crashed"
        return Verdict(sum(passed) / len(passed) if self.partial and passed else 0.0, outcome, evidence)

    def check(self, task: Task) -> str | None:
        """Why the row cannot be judged, or None."""
        return self.check_all([task])[0]

    def check_all(self, tasks: Sequence[Task]) -> list[str | None]:
        """For each row why it cannot be judged, or None; see probes.py."""
        problems = self._run([], dict(enumerate(tasks)), {i: self._suites(task) for i, task in enumerate(tasks)})[1]
        return [problems[i] for i in range(len(tasks))]

    def close(self) -> None:
        self.sandbox.close()
