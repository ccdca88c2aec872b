"""Which names assertions take from a program: what they read and it defines, but never what would make it its own judge."""

from __future__ import annotations

import ast
import builtins
import sys
import warnings
from collections.abc import Sequence
from typing import Literal


def names_taken(code: str, tests: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names that come from the program, modules to import for the tests: the real ones, not the program's)."""
    read, defined = _read_by(tests), _bound(code)
    candidates = {n for n in read if defined.get(n) == "defined"}
    candidates -= _around(tests, candidates)
    if len(candidates) > 1:  # a builtin is not the program's to redefine, unless it is all that is asked for
        candidates -= set(dir(builtins))
    modules = sorted(n for n in read if defined.get(n) == "module" and n in sys.stdlib_module_names)
    return sorted(candidates), modules


def parsed(code: str) -> ast.Module | None:
    """The syntax tree, None for what is no Python (in the jail it fails with its own message)."""
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
    """Those names that a test calls with another of them inside the arguments."""
    found: set[str] = set()
    for test in tests:
        for node in ast.walk(_tree(test)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                inner = (n for part in (*node.args, *node.keywords) for n in ast.walk(part))
                if any(isinstance(n, ast.Name) and n.id in names - {node.func.id} for n in inner):
                    found.add(node.func.id)
    return found


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
