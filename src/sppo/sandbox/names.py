"""Which names assertions take from a program: what they read and it defines, but never what would make it its own judge."""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Literal


def free_names(tests: Sequence[str], setup: str) -> tuple[set[str], set[str]]:
    """(names that only a program can bring, standard modules to import) of what tests read and neither they nor the setup make.

    A function of the row alone, so that no program decides what is taken from it.
    """
    free = _read_by(tests).difference(_made_by(setup), *map(_made_by, tests))
    modules = {n for n in free if n in sys.stdlib_module_names}
    builtin = free & set(dir(builtins))
    rest = free - modules - builtin
    return (rest or builtin), modules  # a builtin is the program's to redefine only if nothing else is asked for


LONGEST = 100_000
STARRED = (
    "bisect", "collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "math", "operator", "random",
    "re", "statistics", "string", "typing",
)  # fmt: skip
"""Modules whose names a setup may take with a star."""


def _made_by(setup: str) -> set[str]:
    """Every name that a setup binds at its top level, however it does so."""
    made: set[str] = set()
    pending: list[ast.AST] = [_tree(setup)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            made.add(node.name)
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and node.module in STARRED:
                made |= set(dir(importlib.import_module(node.module)))
        pending += ast.iter_child_nodes(node)
    return made


def ambiguous(tests: Sequence[str], setup: str) -> str | None:
    """The name that tests call around what another one returns, so that a program which brings both would judge itself; or None.

    A class inside the arguments is no answer that could be judged: `area(Square(2))` is not ambiguous.
    """
    free, _ = free_names(tests, setup)
    around = _around(tests, free)
    return min(around, default=None)


def names_taken(code: str, tests: Sequence[str], setup: str) -> tuple[list[str], list[str]]:
    """(names that come from the program, modules to import for the tests: the real ones, not the program's)."""
    free, modules = free_names(tests, setup)
    defined = set(_bound(code))
    return sorted((free & defined) - _around(tests, free)), sorted(modules)


def parsed(code: str) -> ast.Module | None:
    """The syntax tree, None for what is no Python (in the jail it fails with its own message) or too long to be anybody's answer."""
    if len(code) > LONGEST:  # parsing an f-string takes quadratic time
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's `1if` is not the trainer's to warn about
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _tree(code: str) -> ast.Module:
    return parsed(code) or ast.Module([], [])


def _read_by(tests: Sequence[str]) -> set[str]:
    """Names that test code reads and does not make itself."""
    read: set[str] = set()
    for test in tests:
        nodes = list(ast.walk(_tree(test)))
        own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        read |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - own
    return read


def _around(tests: Sequence[str], names: set[str]) -> set[str]:
    """Those names that a test calls (or calls a method of) with what another of them returned inside the arguments, directly or by a variable."""
    found: set[str] = set()
    for test in tests:
        nodes = list(ast.walk(_tree(test)))
        answers = {n.id for n in nodes if isinstance(n, ast.Name) and n.id in names and not n.id[:1].isupper()}
        holds: dict[str, set[str]] = {name: {name} for name in answers}  # variable or name: whose answers it may hold
        for _ in range(3):
            for node in nodes:
                if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For)):
                    source = node.iter if isinstance(node, ast.For) else node.value
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    inside = set().union(*(holds.get(n, set()) for n in _loaded(source)))
                    for target in (t for each in targets for t in ast.walk(each) if isinstance(t, ast.Name)):
                        holds[target.id] = holds.get(target.id, set()) | inside
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            root: ast.expr = node.func
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in names:
                inner = set().union(
                    *(holds.get(n, set()) for part in (*node.args, *node.keywords) for n in _loaded(part))
                )
                if inner - {root.id}:
                    found.add(root.id)
    return found


def _loaded(node: ast.AST | None) -> set[str]:
    """Names that an expression reads."""
    return set() if node is None else {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _bound(code: str) -> dict[str, Literal["defined", "module"]]:
    """Names that a program binds at its top level, as far as its syntax tree shows: plain imports of modules, and the rest."""
    names: dict[str, Literal["defined", "module"]] = {}
    pending: list[ast.stmt] = list(_tree(code).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = "defined"
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id: "defined" for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.Import):
            names |= {alias.name: "module" for alias in node.names if alias.asname is None}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: "defined" for alias in node.names}
        elif isinstance(node, (ast.If, ast.Try, ast.For, ast.While, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                pending += getattr(node, part, [])
    return names
