"""A row's tests, in whichever of the published layouts it has them, as suites for the sandbox (code.py lists the layouts)."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..sandbox import Case, Suite, TestCode
from ..sandbox.inside.codec import Opaque, encode
from ..sandbox.names import ambiguous, parsed
from ..types import Task
from .base import TEST_COLUMNS


def suites_of(task: Task) -> tuple[Suite, Suite | None] | str:
    """The visible and the hidden tests of a row, or why there are none that can be run."""
    column = next((name for name in TEST_COLUMNS if task.columns.get(name) not in (None, "", [], {})), None)
    if column is None:
        return f"the row has no tests (a column {', '.join(f'`{c}`' for c in TEST_COLUMNS)})"
    entry = task.columns.get("entry_point")
    if entry is not None and not (isinstance(entry, str) and all(part.isidentifier() for part in entry.split("."))):
        return f"column `entry_point`: {entry!r} is not the name of a function"
    visible = suite_in(task, column)
    if isinstance(visible, str):
        return f"column `{column}`: {visible}"
    if task.columns.get("hidden_tests") in (None, "", [], {}):
        return visible, None
    hidden = suite_in(task, "hidden_tests")
    return f"column `hidden_tests`: {hidden}" if isinstance(hidden, str) else (visible, hidden)


def suite_in(task: Task, column: str) -> Suite | str:
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
            if not _checks(tree, parsed(setup)):
                return f"test {i} checks nothing (it runs no `assert`): {test[:40]!r}"
        judge = ambiguous(value, setup) if entry is None else None
        if judge is not None:
            return (
                f"the tests call `{judge}` on what another name of the program's returns, so that a program could bring its own judge; "
                "name the function that is asked for in `entry_point`, or define the other in `test_setup_code`"
            )
        return Suite("asserts", code=TestCode(list(value), setup, None if entry is None else [entry.partition(".")[0]]))
    if not all(isinstance(test, Mapping) for test in value):
        return "tests must be all text (assertions) or all objects"
    return _rows(value, entry)


def _judges(node: ast.AST) -> bool:
    """Whether a piece of test code can fail a program on purpose: an assertion, a raise, a call of an `assert…` function."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name.startswith("assert")
    return isinstance(node, (ast.Assert, ast.Raise))


def _checks(test: ast.Module, setup: ast.Module | None) -> bool:
    """Whether running a test judges anything: by itself, or by calling what it or the setup defines and what does."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    judges = {
        node.name for tree in (test, setup) if tree is not None for node in tree.body
        if isinstance(node, definitions) and any(map(_judges, ast.walk(node)))
    }  # fmt: skip
    runs = [node for statement in test.body if not isinstance(statement, definitions) for node in ast.walk(statement)]
    return any(_judges(n) or (isinstance(n, ast.Name) and n.id in judges) for n in runs)


def _test_code(task: Task, code: str, entry: Any) -> Suite | str:
    if not isinstance(entry, str):
        return "test code needs an `entry_point`, the name of the function it checks"
    tree = parsed(code)
    if tree is None:
        return "the test code is not Python"
    if not any(map(_judges, ast.walk(tree))):
        return "the test code checks nothing (it has no `assert`)"
    if not defines(code, "check") and not _checks(tree, None):
        return "the test code defines no `check(candidate)` and runs no `assert` of its own"
    setup = (
        f"{task.text}\n" if defines(task.text, entry) else ""
    )  # helpers of a code prompt; the entry itself is replaced
    call = f"check({entry})" if defines(code, "check") else ""
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


def defines(code: str, name: str) -> bool:
    """Whether a program defines a function or a class of this name at its top level."""
    tree = parsed(code)
    return tree is not None and any(
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name
        for node in tree.body
    )
