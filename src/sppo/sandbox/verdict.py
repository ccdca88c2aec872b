"""Which of a program's tests hold. Comparison happens here, on plain data; the jail never sees an expected value.

`stdio`: a fresh process per case, its standard output against the expected one. `calls`: one process answers calls with
values. `asserts`: the task's own test code runs in a second jail.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .inside.codec import encode
from .job import Job, Result, Status
from .names import after_imports, names_taken
from .pool import Runs

TOLERANCE = 1e-6
DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
LONGEST_NUMBER = 60
SHOWN = 400
"""Characters of a program's output that go into the evidence."""


@dataclass(frozen=True)
class Case:
    """One test by example: standard input and output as text, or the arguments and value of a call."""

    expected: Any
    stdin: str = ""
    entry: str = ""
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Which tests held (False where the program never got there), how the program ended, and what can be shown of it."""

    passed: tuple[bool, ...]
    status: Status
    evidence: Mapping[str, Any]

    @property
    def fraction(self) -> float:
        """The share of tests that held."""
        return sum(self.passed) / len(self.passed) if self.passed else 0.0


@dataclass(frozen=True)
class TestCode:
    """The task's own test code. `setup` is trusted and runs in the tests' jail; each test raises when it fails.

    `names`: what the tests take from the program, also in the place of what the setup announces. None: the names that a
    test reads and the program defines, but never one that the setup made, nor one that is called around another of the
    program's (`isclose(f(7), 49)`), so that a program cannot bring its own judge.
    """

    __test__ = False
    tests: Sequence[str]
    setup: str = ""
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Suite:
    """Tests in one of the three modes: cases for `stdio` and `calls`, code for `asserts`."""

    kind: Literal["stdio", "calls", "asserts"]
    cases: tuple[Case, ...] = ()
    code: TestCode | None = None
    wrapped: bool = False
    """Whether every expected value is a list of one, which may stand for what is in it (APPS)."""
    tolerance: float = TOLERANCE
    """How far a decimal number on standard output may be from the expected one; see `same_output`."""

    def jobs(self, program: str) -> list[Job]:
        """What to run: one job per case for `stdio`, one for all tests otherwise."""
        if self.kind == "stdio":
            return [Job("script", program, stdin=case.stdin) for case in self.cases]
        if self.code is not None:
            return [_asserts_job(program, self.code)]
        given = [[c.entry, encode(list(c.args)), encode(dict(c.kwargs))] for c in self.cases]
        return [Job("calls", program, calls=given)]

    def sizes(self) -> list[int]:
        """Bytes that a right program writes in each run: to standard output, or as the values of its calls."""
        if self.kind == "stdio":
            return [len(str(case.expected).encode()) for case in self.cases]
        return [sum(len(json.dumps(encode(case.expected))) for case in self.cases)] if self.kind == "calls" else []

    def report(self, results: Sequence[Result]) -> Report:
        """Which tests held, from the results of `jobs`."""
        if self.kind == "stdio":
            return _stdio_report(self, results)
        return (
            _asserts_report(self.code.tests, results[0]) if self.code is not None else _calls_report(self, results[0])
        )


def judge(sandbox: Runs, programs: Sequence[tuple[str, Suite]]) -> list[Report]:
    """One report for each program and its tests, in order; all of them go to the sandbox together."""
    jobs = [suite.jobs(program) for program, suite in programs]
    results = iter(sandbox.run([job for part in jobs for job in part]))
    return [suite.report([next(results) for _ in part]) for part, (_, suite) in zip(jobs, programs, strict=True)]


def stdio(sandbox: Runs, programs: Sequence[tuple[str, Sequence[Case]]]) -> list[Report]:
    """Programs that read standard input and write standard output. Trailing white space of a line does not count."""
    return judge(sandbox, [(code, Suite("stdio", tuple(cases))) for code, cases in programs])


def calls(sandbox: Runs, programs: Sequence[tuple[str, Sequence[Case]]]) -> list[Report]:
    """Programs that define functions (or a `Solution` class), judged by the values that their calls return."""
    return judge(sandbox, [(code, Suite("calls", tuple(cases))) for code, cases in programs])


def asserts(sandbox: Runs, programs: Sequence[tuple[str, TestCode]]) -> list[Report]:
    """Programs against test code that runs in a second jail and calls them through stand-ins."""
    return judge(sandbox, [(code, Suite("asserts", code=tests)) for code, tests in programs])


def _stdio_report(suite: Suite, results: Sequence[Result]) -> Report:
    cases = suite.cases
    passed = [
        r.status == "ok" and same_output(_text(r.stdout), str(c.expected), suite.tolerance)
        for c, r in zip(cases, results, strict=True)
    ]
    worst = next((r for r in results if r.status == "infra_error"), None)
    first = next((i for i, held in enumerate(passed) if not held), None)
    shown = results[first] if first is not None else results[0] if results else Result("protocol")
    evidence: dict[str, Any] = {"cpu_seconds": round(sum(r.cpu_seconds for r in results), 4)}
    if first is not None:
        evidence |= {
            "failed_test": first, "stdin": cases[first].stdin[:SHOWN], "expected": str(cases[first].expected)[:SHOWN],
            "stdout": _text(shown.stdout)[:SHOWN],
        }  # fmt: skip
    return Report(tuple(passed), worst.status if worst else shown.status, evidence | _words(worst or shown))


def lines(text: str) -> list[str]:
    """Lines without trailing white space, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def same_output(given: str, expected: str, tolerance: float = TOLERANCE) -> bool:
    """Whether an output is the expected one, line by line, without trailing white space and empty lines at the end.

    Where the expected text has a decimal number (a point or an exponent), a number of at most `tolerance` less or more
    is as good, relative to it, or absolute where it is below 1, but never one that differs in the first two digits.
    Whole numbers are exact.
    """
    ours, theirs = lines(given), lines(expected)
    return ours == theirs or (
        tolerance > 0
        and len(ours) == len(theirs)
        and all(_same_line(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))
    )


def _same_line(given: str, expected: str, tolerance: float) -> bool:
    if given == expected:
        return True
    ours, theirs = given.split(), expected.split()
    return len(ours) == len(theirs) and all(a == b or _near(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


def _near(given: str, expected: str, tolerance: float) -> bool:
    if max(len(given), len(expected)) > LONGEST_NUMBER or not any(c in expected for c in ".eE"):
        return False
    if not (DECIMAL.fullmatch(given) and DECIMAL.fullmatch(expected)):
        return False
    a, b = float(given), float(expected)
    return abs(a - b) <= tolerance * max(abs(b), 1.0) and (b == 0 or abs(a - b) <= 0.01 * abs(b))


def _calls_report(suite: Suite, result: Result) -> Report:
    cases = suite.cases
    answers, status = _answers(result, len(cases))
    values = [a[1] if isinstance(a, list) and len(a) == 2 and a[0] == "ok" else NOTHING for a in answers]
    passed = [_matches(value, case.expected) for value, case in zip(values, cases, strict=True)]
    if suite.wrapped:  # one way of writing for the whole row
        bare = [_matches(value, case.expected[0]) for value, case in zip(values, cases, strict=True)]
        passed = max(passed, bare, key=sum)
    evidence: dict[str, Any] = {"cpu_seconds": round(result.cpu_seconds, 4)}
    first = next((i for i, held in enumerate(passed) if not held), None)
    if first is not None:
        c = cases[first]
        evidence |= {
            "failed_test": first, "call": f"{c.entry}{tuple(c.args)!r}"[:SHOWN], "expected": repr(c.expected)[:SHOWN],
            "returned": json.dumps(answers[first])[:SHOWN],
        }  # fmt: skip
    return Report(tuple(passed), status, evidence | _words(result))


NOTHING = ["?", "no answer"]


def _answers(result: Result, n: int) -> tuple[list[Any], Status]:
    """The answers by call; a channel that says anything twice, or anything else, is worth nothing."""
    answers: list[Any] = [None] * n
    status: Status = result.status
    try:
        for line in result.channel.decode("ascii").splitlines():
            number, answer = json.loads(line)
            if type(number) is not int or not 0 <= number < n or answers[number] is not None:
                raise ValueError
            answers[number] = answer
    except (ValueError, TypeError, RecursionError):
        return [None] * n, "protocol" if status == "ok" else status
    if status == "ok" and None in answers:
        status = "protocol"  # it ended before it had answered
    return answers, status


def _matches(tree: Any, expected: Any) -> bool:
    try:
        return matches(tree, expected)
    except RecursionError:  # an answer nested as deep as this stack
        return False


def matches(tree: Any, expected: Any) -> bool:
    """Whether an answer's tree is the expected value: tuples and lists are alike (JSON has no tuples), floats within
    1e-9, True is not 1.

    The tree is compared, not decoded: the work is bounded by the expected value's size, whatever a program sends.
    """
    if expected is None or isinstance(expected, bool):
        return tree is expected
    if not isinstance(tree, list) or len(tree) < 2:
        return False
    tag, body = tree[0], tree[1]
    if isinstance(expected, (int, float)):
        return _same_number(tag, body, expected)
    if isinstance(expected, str):
        return tag == "s" and body == expected
    if isinstance(expected, (list, tuple, dict, set, frozenset)) and not (
        isinstance(body, list) and len(body) == len(expected)
    ):
        return False
    if isinstance(expected, (list, tuple)):
        return tag in ("l", "t") and all(matches(t, e) for t, e in zip(body, expected, strict=True))
    if isinstance(expected, dict):
        if tag != "d" or not all(isinstance(pair, list) and len(pair) == 2 for pair in body):
            return False
        by_key = {json.dumps(encode(key)): value for key, value in expected.items()}
        given = {json.dumps(key): value for key, value in body}
        if given.keys() != by_key.keys():  # JSON has no keys but text
            given = {json.dumps(_as_json_key(key)): value for key, value in body}
        return given.keys() == by_key.keys() and all(matches(given[k], by_key[k]) for k in by_key)
    if isinstance(expected, (set, frozenset)):
        return tag in ("S", "F") and {json.dumps(x) for x in body} == {json.dumps(encode(x)) for x in expected}
    return bool(tree == encode(expected))


def _as_json_key(tree: Any) -> Any:
    """A key as JSON would write it: 1 as "1"."""
    if tree is None or isinstance(tree, bool):
        return ["s", json.dumps(tree)]
    if isinstance(tree, list) and len(tree) == 2 and isinstance(tree[1], str) and len(tree[1]) <= LONGEST_NUMBER:
        try:
            return ["s", str(int(tree[1], 16))] if tree[0] == "i" else ["s", tree[1]] if tree[0] == "f" else tree
        except ValueError:
            return tree
    return tree


def _same_number(tag: Any, body: Any, expected: float) -> bool:
    if not isinstance(body, str) or (tag != "i" and (tag != "f" or len(body) > 40)):
        return False
    if tag == "i" and isinstance(expected, int):
        return body == f"{expected:x}"
    try:
        given = float(body) if tag == "f" else float(int(body[:400], 16))
        if math.isnan(expected):
            return tag == "f" and math.isnan(given)
        return math.isclose(given, expected, rel_tol=1e-9, abs_tol=1e-12)
    except (ValueError, OverflowError):
        return False


def _asserts_job(code: str, t: TestCode) -> Job:
    names, modules = names_taken(code, t.tests, t.setup)
    if t.names is not None:
        names, modules = list(t.names), sorted(set(modules).difference(t.names))
    setup = after_imports("\n".join(f"import {name}" for name in modules), t.setup)
    return Job("asserts", code, names=names, replace=t.names is not None, setup=setup, tests=list(t.tests))


def _asserts_report(tests: Sequence[str], result: Result) -> Report:
    held: list[bool] = [False] * len(tests)
    evidence: dict[str, Any] = {"cpu_seconds": round(result.cpu_seconds, 4)}
    if result.status == "ok":  # anything else means that the tests' jail did not finish
        said = json.loads(result.channel)
        held = [value is True for value in said["held"]]
        if said.get("cannot"):
            evidence["cannot"] = str(said["cannot"][0])
    first = next((i for i, value in enumerate(held) if not value), None)
    if first is not None:
        evidence |= {"failed_test": first, "test": tests[first][:SHOWN]}
    return Report(tuple(held), result.status, evidence | _words(result))


def _words(result: Result) -> dict[str, Any]:
    out: dict[str, Any] = {"status": result.status, "backend": result.backend}
    if result.status != "ok":
        if result.stderr:
            out["stderr"] = _text(result.stderr)[-SHOWN:]
        if result.detail:
            out["detail"] = result.detail
    return out


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
