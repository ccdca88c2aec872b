"""A row's tests, in whichever of the published layouts it has them, as suites for the sandbox (code.py lists the
layouts)."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..sandbox import Case, Suite, TestCode
from ..sandbox.inside.codec import Opaque, encode
from ..sandbox.names import (
    LONGEST,
    LONGEST_TESTS,
    after_imports,
    ambiguous,
    bound,
    free_names,
    own_judge,
    parsed,
    undefined,
)
from ..sandbox.verdict import lines
from ..types import Task
from .base import TEST_COLUMNS

TYPES = "`test_setup_code` must be text, `test_imports` a list of texts"
PRELUDE = """from typing import *
from bisect import *
from collections import *
from copy import copy, deepcopy
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import *
from heapq import *
from io import StringIO
from itertools import *
from math import *
from operator import *
from random import *
from statistics import mean, median
from string import *
from sys import maxsize, setrecursionlimit, stdin
from builtins import *
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, random, re, statistics, string, sys, time
try: from sortedcontainers import SortedDict, SortedList, SortedSet
except ImportError: pass
class ListNode:
    def __init__(self, val=0, next=None): self.val, self.next = val, next
class TreeNode:
    def __init__(self, val=0, left=None, right=None): self.val, self.left, self.right = val, left, right
class Node:
    def __init__(self, val=0, *links, **named):
        self.val, self.next, self.random, self.left, self.right, self.children, self.neighbors = val, None, None, None, None, [], []
        if links and isinstance(links[0], list): self.children = self.neighbors = links[0]
        elif links: self.next, self.random = (*links, None)[:2]
        for name in named: setattr(self, name, named[name])
def list_node(values):
    root = None
    for value in reversed(values or []): root = ListNode(value, root)
    return root
def is_same_list(a, b):
    while a and b and a.val == b.val: a, b = a.next, b.next
    return not a and not b
def tree_node(values):
    if not values: return None
    nodes = [None if v is None else TreeNode(v) for v in values]
    children = iter(nodes[1:])
    for node in nodes:
        if node: node.left, node.right = next(children, None), next(children, None)
    return nodes[0]
def is_same_tree(a, b):
    if not a or not b: return not a and not b
    return a.val == b.val and is_same_tree(a.left, b.left) and is_same_tree(a.right, b.right)
"""
"""The names that LeetCode's judge provides to every program."""


def column_of(task: Task) -> str:
    """The column that holds a row's visible tests; empty where there is none."""
    return next((name for name in TEST_COLUMNS if task.columns.get(name) not in (None, "", [], {})), "")


def suites_of(task: Task) -> tuple[Suite, Suite | None] | str:
    """The visible and the hidden tests of a row, or why there are none that can be run."""
    column = column_of(task)
    if not column:
        return f"the row has no tests (a column {', '.join(f'`{c}`' for c in TEST_COLUMNS)})"
    entry = task.columns.get("entry_point")
    if entry is not None and entry_name(entry) is None:
        return f"column `entry_point`: {entry!r} is not the name of a function"
    visible = suite_in(task, column)
    if isinstance(visible, str):
        return f"column `{column}`: {visible}"
    if task.columns.get("hidden_tests") in (None, "", [], {}):
        return visible, None
    hidden = suite_in(task, "hidden_tests")
    return f"column `hidden_tests`: {hidden}" if isinstance(hidden, str) else (visible, hidden)


def suite_in(task: Task, column: str) -> Suite | str:
    """The suite of a column, if everything in it can be sent to the jail and checks something."""
    try:
        suite = _suite(task, column)
        if isinstance(suite, Suite):
            for case in suite.cases:
                encode([list(case.args), dict(case.kwargs), case.expected])
                case.stdin.encode()
    except (Opaque, UnicodeEncodeError) as error:
        return f"a test's input cannot be handed over: {error}"
    return suite


def entry_name(value: Any) -> str | None:
    """The name that is asked for: `f`, or `Solution.f` for a method of a fresh object (also written `Solution().f`);
    None for no name."""
    if not isinstance(value, str):
        return None
    name = value.strip().replace("().", ".", 1)
    return name if name.count(".") <= 1 and all(part.isidentifier() for part in name.split(".")) else None


def _livecodebench_name(metadata: Any) -> str | None:
    """The function that a row of LiveCodeBench asks for: `func_name` of its metadata, which is JSON text."""
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError):
            return None
    return entry_name(metadata.get("func_name")) if isinstance(metadata, Mapping) else None


def _suite(task: Task, column: str) -> Suite | str:
    value = task.columns[column]
    entry = entry_name(task.columns.get("entry_point")) or _livecodebench_name(task.columns.get("metadata"))
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return "is JSON text that does not parse"
    if isinstance(value, str):
        return _test_code(task, value, entry)
    if isinstance(value, Mapping):
        name = entry_name(value["fn_name"]) if value.get("fn_name") else entry
        return (
            f"`fn_name`: {value['fn_name']!r} is not the name of a function"
            if value.get("fn_name") and not name
            else _columns(value, name)
        )
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or not value:
        return "holds no tests"
    if all(isinstance(test, str) for test in value):
        setup = _setup(task)
        stricter = task.columns.get("test")
        if column == "test_list" and isinstance(stricter, str) and stricter.strip():  # MBPP+
            return _test_code(task, stricter, entry, value)
        return TYPES if setup is None else _asserts(task, list(value), setup, entry)
    if not all(isinstance(test, Mapping) for test in value):
        return "tests must be all text (assertions) or all objects"
    return _rows(value, entry)


def _asserts(task: Task, tests: list[str], setup: str, entry: Any) -> Suite | str:
    """Test code as a suite, unless the row's text alone shows that it cannot judge."""
    if parsed(setup, LONGEST_TESTS) is None:
        return "the setup code (`test_imports`, `test_setup_code`) is not Python"
    names = None if entry is None else [entry.partition(".")[0]]
    for i, test in enumerate(tests):
        if parsed(test, LONGEST_TESTS) is None:
            return f"test {i} is not Python"
    if "Solution" in (free_names(tests, setup)[0] if names is None else names):  # tests of LeetCode's use its names too
        setup = after_imports(PRELUDE, setup)
    judge = ambiguous(tests, setup) if names is None else None
    if judge is not None:
        return (
            f"the tests call `{judge}` on what another name of the program's returns, so that a program could bring its own judge; "
            "name the function that is asked for in `entry_point`, or define the other in `test_setup_code`"
        )
    missing = undefined(tests, setup, names) if names is not None else None
    if missing is not None:
        return f"the tests use `{missing}`, which neither they nor the row's setup define (`test_setup_code`, `test_imports`)"
    return own_judge(tests, setup, names) or Suite("asserts", code=TestCode(tests, setup, names))


def _setup(task: Task) -> str | None:
    """The code before a row's tests: its imports and setup; None where these have another type."""
    imports, code = task.columns.get("test_imports") or [], task.columns.get("test_setup_code") or ""
    imports = [imports] if isinstance(imports, str) else imports
    if not isinstance(code, str) or not isinstance(imports, Sequence) or not all(isinstance(x, str) for x in imports):
        return None
    return "\n".join([*imports, code])


def _test_code(task: Task, code: str, entry: Any, listed: Sequence[str] = ()) -> Suite | str:
    """A `test` column of code, preceded by the assertions that the row also lists."""
    if parsed(code, LONGEST_TESTS) is None:
        return "the test code is not Python"
    checks = defines(code, "check", LONGEST_TESTS)
    if checks and entry is None:
        return "test code that defines `check` needs an `entry_point`, the name of the function it checks"
    setup = _setup(task)
    if setup is None:
        return TYPES
    if is_program(task.text):  # helpers of a code prompt; the entry itself is replaced
        setup = f"{task.text}\n{setup}"
    asked = "" if entry is None else entry.replace(".", "().", 1)
    if checks:
        code = f"{code}\ncheck({asked})"
    elif defines(code, "TestCases", LONGEST_TESTS) and not any(word in code for word in ("unittest.main", "Runner")):
        code = f"{code}\nunittest.main(argv=['tests'], exit=False)"  # BigCodeBench
    return _asserts(task, [*listed, code], setup, entry)


def _columns(value: Mapping[str, Any], entry: Any) -> Suite | str:
    inputs, outputs = value.get("inputs", value.get("input")), value.get("outputs", value.get("output"))
    if (
        not isinstance(inputs, Sequence)
        or not isinstance(outputs, Sequence)
        or len(inputs) != len(outputs)
        or not inputs
    ):
        return "needs `inputs` and `outputs` of one length"
    if not entry:
        if any(x is None for x in (*inputs, *outputs)):
            return "null is not standard input or output"
        pairs = zip(inputs, outputs, strict=True)
        return _that_can_fail(Suite("stdio", tuple(Case(_joined(o), stdin=_joined(i)) for i, o in pairs)))
    cases = []
    for given, expected in zip(inputs, outputs, strict=True):
        if isinstance(given, str):
            try:
                given, expected = _from_lines(given, expected)
            except (ValueError, RecursionError):
                return f"an input of {entry} is not JSON, one argument per line"
        if not isinstance(given, Sequence) or isinstance(given, str):
            return f"an input of {entry} is not a list of arguments"
        cases.append(Case(expected, entry=str(entry), args=[_whole_keys(x) for x in given]))
    wrapped = all(isinstance(case.expected, list) and len(case.expected) == 1 for case in cases)
    return _that_can_fail(Suite("calls", tuple(cases), wrapped=wrapped))


def _from_lines(given: str, expected: Any) -> tuple[list[Any], Any]:
    """Arguments and value in LeetCode's way: one argument per line, as JSON. Raises ValueError, RecursionError."""
    args = [json.loads(line) for line in given.splitlines() if line.strip()]
    return args, json.loads(expected) if isinstance(expected, str) else expected


def _whole_keys(value: Any) -> Any:
    """An argument whose keys are all whole numbers, as JSON cannot write them (APPS)."""
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(k, str) and k.isascii() and k.lstrip("-").isdigit() for k in value)
    ):
        return {int(k): v for k, v in value.items()} if all(len(k) < 20 for k in value) else value
    return value


def _that_can_fail(suite: Suite) -> Suite | str:
    """The suite, unless a program that does nothing gives every expected answer."""
    if suite.kind == "stdio" and not any(lines(str(case.expected)) for case in suite.cases):
        return "every expected output is empty, so that no program can fail it that prints nothing"
    if suite.kind == "calls" and all(
        case.expected is None or (suite.wrapped and case.expected == [None]) for case in suite.cases
    ):
        return "every expected value is null, so that no program can fail it that returns nothing"
    return suite


def _rows(tests: Sequence[Mapping[str, Any]], entry: Any) -> Suite | str:
    cases = []
    kinds = set()
    for i, test in enumerate(tests):
        expected = next((test[k] for k in ("expected", "output", "expected_output", "stdout") if k in test), ...)
        if expected is ...:
            return f"test {i} has no `expected` (or `output`)"
        named = test.get("entry") or test.get("fn_name")
        name = entry_name(named) if named else entry
        if "args" in test or "kwargs" in test:
            if not name:
                return f"test {i} has `args`, but the row has no `entry_point` to call"
            if not isinstance(test.get("args") or [], (list, tuple)) or not isinstance(
                test.get("kwargs") or {}, Mapping
            ):
                return f"test {i}: `args` must be a list and `kwargs` an object"
            kinds.add("calls")
            cases.append(Case(expected, entry=str(name), args=list(test.get("args") or ()), kwargs=dict(test.get("kwargs") or {})))  # fmt: skip
            continue
        given = next((test[k] for k in ("input", "stdin") if k in test), "")
        if given is None or expected is None:
            return f"test {i}: null is not standard input or output"
        if test.get("testtype") == "functional":  # LiveCodeBench
            if not name:
                return f"test {i} is functional, but the row has no `entry_point` to call"
            try:
                args, expected = _from_lines(_joined(given), expected)
            except (ValueError, RecursionError):
                return f"test {i}: an input of {name} is not JSON, one argument per line"
            kinds.add("calls")
            cases.append(Case(expected, entry=str(name), args=args))
        else:
            kinds.add("stdio")
            cases.append(Case(_joined(expected), stdin=_joined(given)))
    if len(kinds) != 1:
        return "mixes calls with standard input"
    return _that_can_fail(Suite("calls" if "calls" in kinds else "stdio", tuple(cases)))


def _joined(value: Any) -> str:
    """Text, or a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def is_program(text: str) -> bool:
    """Whether a text is Python that imports or defines something (one word is Python too)."""
    tree = parsed(text)
    return tree is not None and any(
        isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign))
        for n in tree.body
    )


def defines(code: str, name: str, longest: int = LONGEST) -> bool:
    """Whether a program defines a function or a class of this name at its top level."""
    tree = parsed(code, longest)
    return tree is not None and any(
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name
        for node in tree.body
    )


def binds(code: str, name: str) -> bool:
    """Whether a program makes something of this name at its top level, in whichever way but an import."""
    return defines(code, name) or bound(code).get(name) == "defined"
