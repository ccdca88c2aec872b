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
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import RecipeError
from ..sandbox import Case, Report, Runs, TestCode, asserts, calls, open_sandbox, stdio
from ..sandbox.inside.codec import Opaque, encode
from ..sandbox.verdict import parsed
from ..spec import call
from ..types import Outcome, Rollout, Task, Verdict

PRELUDE = (
    "from typing import *\nimport collections, functools, heapq, itertools, math, re, string, bisect, random\n"
    "from collections import Counter, OrderedDict, defaultdict, deque\nfrom functools import cache, lru_cache, reduce\n"
)
"""What judges of `Solution` classes import for everybody."""
COLUMNS = ("tests", "test_list", "test", "input_output")


def build(partial: bool = False, **sandbox: Any) -> CodeReward:
    """The reward for `reward.use = "code:…"`. Raises SandboxUnavailable when programs cannot be isolated here."""
    if not isinstance(partial, bool):
        raise RecipeError(f"reward code: partial={partial} must be true or false")
    return CodeReward(call(open_sandbox, "reward code", **sandbox), partial)


@dataclass(frozen=True)
class Suite:
    """A row's tests in one of three forms."""

    kind: Literal["stdio", "calls", "asserts"]
    cases: tuple[Case, ...] = ()
    code: TestCode | None = None


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
    python = [code for name, code in blocks if name in ("python", "py", "python3", "")]
    if blocks:
        return (python or [code for _, code in blocks])[-1]
    if fence:
        return "".join(body) or None
    return text if text.strip() and parsed(text) is not None else None


def _defines(code: str, name: str) -> bool:
    tree = parsed(code)
    return tree is not None and any(
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name
        for node in tree.body
    )


def program_of(task: Task, text: str) -> str | None:
    """The whole program: what the response holds, or the row's code prompt continued by it (HumanEval's way)."""
    code, entry = extract_code(text), task.columns.get("entry_point")
    if isinstance(entry, str) and "test" in task.columns:
        head = entry.partition(".")[0]
        if code is None or not _defines(code, head):
            continued = task.text + (text if code is None or code == text else code)
            return continued if _defines(continued, head) else code
        joined = f"{_prompt_code(task, head)}\n{code}"  # the prompt's helpers stay in reach of a function written anew
        return joined if parsed(joined) is not None else code
    return code


def _prompt_code(task: Task, entry: str) -> str:
    """What a code prompt defines before the function that is asked for."""
    tree = parsed(task.text)
    if tree is None:
        return ""
    return "\n".join(
        ast.unparse(node) for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == entry)
    )


def suites_of(task: Task) -> tuple[Suite, Suite | None] | str:
    """The visible and the hidden tests of a row, or why there are none that can be run."""
    column = next((name for name in COLUMNS if task.columns.get(name) not in (None, "", [], {})), None)
    if column is None:
        return f"the row has no tests (a column {', '.join(f'`{c}`' for c in COLUMNS)})"
    entry = task.columns.get("entry_point")
    if entry is not None and not (isinstance(entry, str) and all(part.isidentifier() for part in entry.split("."))):
        return f"column `entry_point`: {entry!r} is not the name of a function"
    visible = _checked(task, column)
    if isinstance(visible, str):
        return f"column `{column}`: {visible}"
    if task.columns.get("hidden_tests") in (None, "", [], {}):
        return visible, None
    hidden = _checked(task, "hidden_tests")
    return f"column `hidden_tests`: {hidden}" if isinstance(hidden, str) else (visible, hidden)


def _checked(task: Task, column: str) -> Suite | str:
    """The suite of a column, if everything in it can travel to the jail and checks something."""
    try:
        suite = _suite(task, task.columns[column])
        if isinstance(suite, Suite):
            for case in suite.cases:
                encode([list(case.args), dict(case.kwargs), case.expected])
                case.stdin.encode()
    except (Opaque, UnicodeEncodeError) as error:
        return f"a test's input cannot be handed over: {error}"
    return suite


def _suite(task: Task, value: Any) -> Suite | str:
    entry = task.columns.get("entry_point")
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return "is JSON text that does not parse"
    if isinstance(value, str):
        return _test_code(task, value, entry)
    if isinstance(value, Mapping):
        return _columns(value, value.get("fn_name") or entry)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or not value:
        return "holds no tests"
    if all(isinstance(test, str) for test in value):
        imports, code = task.columns.get("test_imports") or [], task.columns.get("test_setup_code") or ""
        imports = [imports] if isinstance(imports, str) else imports
        if (
            not isinstance(code, str)
            or not isinstance(imports, Sequence)
            or not all(isinstance(x, str) for x in imports)
        ):
            return "`test_setup_code` must be text, `test_imports` a list of texts"
        setup = "\n".join([*imports, code])
        if parsed(setup) is None:
            return "the setup code (`test_imports`, `test_setup_code`) is not Python"
        for i, test in enumerate(value):
            tree = parsed(test)
            if tree is None:
                return f"test {i} is not Python"
            if not any(isinstance(node, (ast.Assert, ast.Raise, ast.Call)) for node in ast.walk(tree)):
                return f"test {i} checks nothing: {test[:40]!r}"
        return Suite("asserts", code=TestCode(list(value), setup, None if entry is None else [entry.partition(".")[0]]))
    if not all(isinstance(test, Mapping) for test in value):
        return "tests must be all text (assertions) or all objects"
    return _rows(value, entry)


def _test_code(task: Task, code: str, entry: Any) -> Suite | str:
    if not isinstance(entry, str):
        return "test code needs an `entry_point`, the name of the function it checks"
    if parsed(code) is None:
        return "the test code is not Python"
    setup = (
        f"{task.text}\n" if _defines(task.text, entry) else ""
    )  # helpers of a code prompt; the entry itself is replaced
    call = f"check({entry})" if _defines(code, "check") else ""
    return Suite("asserts", code=TestCode([f"{code}\n{call}"], setup, [entry]))


def _columns(value: Mapping[str, Any], entry: Any) -> Suite | str:
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if (
        not isinstance(inputs, Sequence)
        or not isinstance(outputs, Sequence)
        or len(inputs) != len(outputs)
        or not inputs
    ):
        return "needs `inputs` and `outputs` of one length"
    if not entry:
        return Suite("stdio", tuple(Case(_joined(o), stdin=_joined(i)) for i, o in zip(inputs, outputs, strict=True)))
    cases = []
    for given, expected in zip(inputs, outputs, strict=True):
        if isinstance(given, str):  # LeetCode's way: one argument a line, as JSON
            try:
                given = [json.loads(line) for line in given.splitlines() if line.strip()]
                expected = json.loads(expected) if isinstance(expected, str) else expected
            except ValueError:
                return f"an input of {entry} is not JSON, one argument a line"
        if not isinstance(given, Sequence) or isinstance(given, str):
            return f"an input of {entry} is not a list of arguments"
        cases.append(Case(expected, entry=str(entry), args=given))
    return Suite("calls", tuple(cases))


def _rows(tests: Sequence[Mapping[str, Any]], entry: Any) -> Suite | str:
    cases = []
    kinds = set()
    for i, test in enumerate(tests):
        expected = next((test[k] for k in ("expected", "output", "expected_output", "stdout") if k in test), ...)
        if expected is ...:
            return f"test {i} has no `expected` (or `output`)"
        name = test.get("entry") or test.get("fn_name") or entry
        if "args" in test or "kwargs" in test:
            if not name:
                return f"test {i} has `args`, but the row has no `entry_point` to call"
            if not isinstance(test.get("args") or [], (list, tuple)) or not isinstance(
                test.get("kwargs") or {}, Mapping
            ):
                return f"test {i}: `args` must be a list and `kwargs` an object"
            kinds.add("calls")
            cases.append(Case(expected, entry=str(name), args=list(test.get("args") or ()), kwargs=dict(test.get("kwargs") or {})))  # fmt: skip
        else:
            given = next((test[k] for k in ("input", "stdin") if k in test), "")
            if given is None or expected is None:
                return f"test {i}: null is no standard input or output"
            kinds.add("stdio")
            cases.append(Case(_joined(expected), stdin=_joined(given)))
    if len(kinds) != 1:
        return "mixes calls with standard input"
    return Suite("calls" if "calls" in kinds else "stdio", tuple(cases))


def _joined(value: Any) -> str:
    """Text, or a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


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
                    runs.append((i, name, code, suite))
        reports: dict[int, dict[str, Report]] = {}
        for (i, name, _, _), report in zip(runs, self._run([(code, suite) for _, _, code, suite in runs]), strict=True):
            reports.setdefault(i, {})[name] = report
        for i, by_name in reports.items():
            verdicts[i] = self._verdict(by_name)
        return [v for v in verdicts if v is not None]

    def _run(self, programs: Sequence[tuple[str, Suite]]) -> list[Report]:
        """Every program against its tests, in order; those of one kind go to the sandbox together."""
        out: list[Report | None] = [None] * len(programs)

        def put(kind: str, reports: Sequence[Report]) -> None:
            where = [i for i, (_, suite) in enumerate(programs) if suite.kind == kind]
            for i, report in zip(where, reports, strict=True):
                out[i] = report

        of = {kind: [p for p in programs if p[1].kind == kind] for kind in ("stdio", "calls", "asserts")}
        put("stdio", stdio(self.sandbox, [(code, suite.cases) for code, suite in of["stdio"]]))
        put("calls", calls(self.sandbox, [_for_calls(code, suite.cases) for code, suite in of["calls"]]))
        put("asserts", asserts(self.sandbox, [(code, suite.code) for code, suite in of["asserts"] if suite.code]))
        return [r for r in out if r is not None]

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


def _for_calls(code: str, cases: Sequence[Case]) -> tuple[str, list[Case]]:
    """A program with a `Solution` class gets the usual imports, and its calls go to a method of a fresh object."""
    if not _defines(code, "Solution"):
        return code, list(cases)
    return PRELUDE + code, [replace(c, entry=c.entry if "." in c.entry else f"Solution.{c.entry}") for c in cases]
