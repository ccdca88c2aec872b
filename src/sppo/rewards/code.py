"""Code: the program in a response, run in the sandbox against the row's tests. 1 when every test holds, else 0.

    code                            every test, visible and hidden, must hold
    code:partial=true               the share of tests that hold instead
    code:backend=bwrap,slots=2,wall=8,cpu=5,memory_mb=512,fork=false,python=/usr/bin/python3
    code:backend=remote,url=http://judge:8790      on another machine (sppo sandbox serve)

Layouts of tests, as published data sets have them (JSON text is parsed first):

    tests = ["assert f(1) == 2", …]                           MBPP (`test_list`; `test_setup_code`, `test_imports`)
    tests = [{"input": "3\\n", "output": "9\\n"}, …]            standard input and output
    tests = {"inputs": […], "outputs": […]}                   the same (APPS, TACO); with `fn_name`, calls and their values
    tests = [{"args": [1], "expected": 2}, …] + `entry_point`  calls and their values (`kwargs` too)
    test = "def check(candidate): …" + `entry_point`          HumanEval, its files unchanged
    entry_point = "Solution.f"                                 a method of a class; a class `Solution` is found by itself
    hidden_tests = …                                           any of these again: they count, and the gap is measured
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RecipeError
from ..sandbox import Report, Runs, Suite, judge, open_sandbox
from ..sandbox.names import parsed
from ..spec import call
from ..types import Outcome, Rollout, Task, Verdict
from .suites import defines, suites_of

PRELUDE = (
    "from typing import *\nimport collections, functools, heapq, itertools, math, re, string, bisect, random\n"
    "from collections import Counter, OrderedDict, defaultdict, deque\nfrom functools import cache, lru_cache, reduce\n"
)
"""What judges of `Solution` classes import for everybody."""


def build(partial: bool = False, **sandbox: Any) -> CodeReward:
    """The reward for `reward.use = "code:…"`. Raises SandboxUnavailable when programs cannot be isolated here."""
    if not isinstance(partial, bool):
        raise RecipeError(f"reward code: partial={partial} must be true or false")
    return CodeReward(call(open_sandbox, "reward code", **sandbox), partial)


def extract_code(text: str) -> str | None:
    """The last fenced block, Python's before any other's; an unclosed fence's rest; else the bare text, if it parses."""
    blocks: list[tuple[str, str]] = []
    fence, language = "", ""
    body: list[str] = []
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        mark = bare[: len(bare) - len(bare.lstrip(bare[0]))] if bare[:3] in ("```", "~~~") else ""
        if not fence and mark:
            fence, language, body = mark, bare[len(mark) :].strip().partition(" ")[0].lower(), []
        elif fence and bare == fence:
            blocks.append((language, "".join(body)))
            fence = ""
        elif fence:
            body.append(line)
    if blocks:
        tagged = [code for name, code in blocks if name in ("python", "py", "python3")]
        found = tagged or [code for name, code in blocks if name == ""] or [code for _, code in blocks]
        defining = [
            code for code in found if _defines_something(code)
        ]  # a usage example after the answer is not the answer
        return (defining or found)[-1]
    if fence:
        return "".join(body) or None
    return text if text.strip() and parsed(text) is not None else None


def _defines_something(code: str) -> bool:
    tree = parsed(code)
    return tree is not None and any(
        isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for n in tree.body
    )


def program_of(task: Task, text: str) -> str | None:
    """The whole program: what the response holds, or the row's code prompt continued by it (HumanEval's way)."""
    code, entry = extract_code(text), task.columns.get("entry_point")
    if isinstance(entry, str) and "test" in task.columns:
        head = entry.partition(".")[0]
        if code is None or not defines(code, head):
            continued = task.text + (text if code is None or code == text else code)
            return continued if defines(continued, head) else code
        joined = f"{_prompt_code(task, head)}\n{code}"  # the prompt's helpers stay in reach of a function written anew
        return joined if parsed(joined) is not None else code
    imports = task.columns.get("test_imports")
    if code is not None and isinstance(imports, list) and all(isinstance(line, str) for line in imports):
        return "\n".join(
            [*imports, code]
        )  # as people run these rows: what the tests import is there for the program too
    return code


def _prompt_code(task: Task, entry: str) -> str:
    """What a code prompt defines before the function that is asked for."""
    tree = parsed(task.text)
    if tree is None:
        return ""
    return "\n".join(
        ast.unparse(node)
        for node in tree.body
        if not (isinstance(node, ast.FunctionDef) and node.name == entry)
        and not isinstance(node, ast.Expr)  # a prompt of one word is Python too
    )


class CodeReward:
    """Verdicts by running; see the module."""

    def __init__(self, sandbox: Runs, partial: bool = False) -> None:
        self.sandbox, self.partial = sandbox, partial

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct, wrong, timeout, crashed, unparseable (no code: score 0); invalid_task and infra_error (masked)."""
        verdicts: list[Verdict | None] = [None] * len(rollouts)
        runs: list[tuple[int, str, str, Suite]] = []  # (rollout, "visible" or "hidden", program, tests)
        for i, rollout in enumerate(rollouts):
            suites = suites_of(rollout.task)
            if isinstance(suites, str):
                verdicts[i] = Verdict(0.0, "invalid_task", {"reason": suites})
                continue
            code = program_of(rollout.task, rollout.text)
            if code is None:
                verdicts[i] = Verdict(0.0, "unparseable", {"reason": "the response holds no Python code"})
                continue
            for name, suite in zip(("visible", "hidden"), suites, strict=True):
                if suite is not None:
                    runs.append((i, name, *fitted(code, suite)))
        reports: dict[int, dict[str, Report]] = {}
        done = judge(self.sandbox, [(code, suite) for _, _, code, suite in runs])
        for (i, name, _, _), report in zip(runs, done, strict=True):
            reports.setdefault(i, {})[name] = report
        for i, by_name in reports.items():
            verdicts[i] = self._verdict(by_name)
        return [v for v in verdicts if v is not None]

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
        if cannot is not None:  # said by the tests' jail of the tests' own values: no program can bring it about
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
        suites = suites_of(task)
        return suites if isinstance(suites, str) else None

    def close(self) -> None:
        self.sandbox.close()


def fitted(code: str, suite: Suite) -> tuple[str, Suite]:
    """A program with a `Solution` class gets the usual imports, and its calls go to a method of a fresh object."""
    if suite.kind != "calls" or not defines(code, "Solution"):
        return code, suite
    cases = (replace(c, entry=c.entry if "." in c.entry else f"Solution.{c.entry}") for c in suite.cases)
    return PRELUDE + code, replace(suite, cases=tuple(cases))
