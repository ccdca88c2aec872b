"""Which names assertions take from a program: what they read and it defines, but never what would make it its own
judge."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

from .inside.codec import PREDICATES

LONGEST = 100_000
"""Characters of the longest program that counts as an answer."""
LONGEST_TESTS = 20_000_000
STARRED = (
    "bisect", "builtins", "collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "math", "operator", "random",
    "re", "statistics", "string", "typing",
)  # fmt: skip
"""Modules whose names a setup may take with a star."""
EVALUATE = ("eval", "exec", "compile", "__import__", "import_module", "loads", "load", "system", "popen", "run_path")
"""Functions that may run what they are given, but for those of the modules `HARMLESS`."""
HARMLESS = ("json", "ast", "re", "tomllib")
JUDGES = ("assert", "check", "expect", "verify")
"""Words in the names of functions that judge their arguments."""
KEPT = 512
"""Rows whose names are cached."""


def free_names(tests: Sequence[str], setup: str) -> tuple[set[str], set[str]]:
    """(names that only a program can bring, standard modules to import) of what tests read and neither they nor the
    setup make.

    A function of the row alone, so that no program decides what is taken from it.
    """
    return _free_names(tuple(tests), setup)


@functools.lru_cache(maxsize=KEPT)
def _free_names(tests: tuple[str, ...], setup: str) -> tuple[set[str], set[str]]:
    free = _read_by(tests).difference(_made_by(setup), *map(_made_by, tests))
    modules = {n for n in free if n in sys.stdlib_module_names}
    builtin = free & set(dir(builtins))
    rest = free - modules - builtin
    return (rest or builtin), modules  # a builtin is the program's to redefine only if nothing else is asked for


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
        made |= _binds(node)
        pending += ast.iter_child_nodes(node)
    return made


def _binds(node: ast.AST) -> set[str]:
    """Names that one node binds."""
    if isinstance(node, ast.Name):
        return set() if isinstance(node.ctx, ast.Load) else {node.id}
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.arg):
        return {node.arg}
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        return {node.name} if node.name else set()
    made = set()
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        made = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and node.module in STARRED:
            made |= set(dir(importlib.import_module(node.module)))
    return made


def undefined(
    tests: Sequence[str], setup: str = "", names: Sequence[str] = (), modules: Collection[str] = sys.stdlib_module_names
) -> str | None:
    """A name that code reads although nothing defines it: not it, not the setup, not `names`, not the `modules` that
    are there."""
    nodes = [node for text in (setup, *tests) for node in ast.walk(_tree(text))]
    if any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" and n.module not in STARRED for n in nodes):
        return None
    made = set(names).union(dir(builtins), modules, ("__name__", "__file__", "__doc__"), *map(_binds, nodes))
    read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return None if {"exec", "globals", "locals", "setattr"} & read else min(read - made, default=None)


def ambiguous(tests: Sequence[str], setup: str) -> str | None:
    """The name that tests call around what another one returns, so that a program which brings both would judge itself;
    or None.

    An object inside the arguments is no answer that could be judged (`area(Square(2)) == 4`), unless what is called
    around it decides alone: `same(F(7), 49)`.
    """
    return min(_around(tuple(tests), setup), default=None)


def own_judge(tests: Sequence[str], setup: str, names: Sequence[str] | None) -> str | None:
    """How a program could decide by itself whether these tests hold, or what they ask of its objects that these do not
    reveal; or None.

    `names`: those that are taken from the program; None: those that only it can bring.
    """
    free = free_names(tests, setup)[0] if names is None else set(names)
    trees = [list(ast.walk(_tree(test))) for test in tests]
    functions = {  # written like a class, and yet what it returns is compared with a value
        part.func.id
        for nodes in trees for node in nodes for pair in _pairs(node) for part in pair
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in free and _is_class(part.func.id)
    }  # fmt: skip
    for nodes in trees:
        holds = _holds(nodes, free)
        assigned: dict[str, list[ast.expr]] = {}
        for node in nodes:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name) and isinstance(node, ast.Assign):
                    assigned.setdefault(target.id, []).append(node.value)
        answers = {name for name, sources in holds.items() if any(not _is_class(s) for s in sources)}
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                base = next((b.id for b in node.bases if isinstance(b, ast.Name) and b.id in free), None)
                if base is not None:
                    return (
                        f"a test derives a class from the program's `{base}`, which does not travel between the jails"
                    )
            if isinstance(node, ast.Call) and _last(node.func) in EVALUATE and _root(node.func) not in (*HARMLESS, *holds) and any(
                n in holds for part in node.args for n in _loaded(part)
            ):  # fmt: skip
                return f"a test evaluates what the program returns (`{_last(node.func)}`), so that a program could do anything there"
            if isinstance(node, ast.Name) and node.id == "mock_open":
                return "a test replaces `open`, which does not travel between the jails"
            for pair in _pairs(node):
                if all(_made(part, assigned, free) for part in pair):
                    return "a test compares or combines objects of the program's own class, which the program itself would decide"
                left, right = (set().union(*(holds.get(n, set()) for n in _loaded(part))) for part in pair)
                if left and right and left != right and not isinstance(node, ast.BinOp):
                    return (
                        f"a test compares what `{min(left)}` gives with `{min(right)}`, and a program brings both; "
                        "name the function that is asked for in `entry_point`, or define the other in `test_setup_code`"
                    )
        for part in _verdicts(nodes):
            method = part.func if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) else None
            root = _root(method.value) if method is not None else None
            if method is not None and (root in functions or (root in answers and method.attr not in PREDICATES)):
                return (
                    f"a test takes the word of a method (`{method.attr}`) of what the program returns, so that a program could "
                    "bring its own judge; compare what it returns with a value"
                )
    return None


def names_taken(code: str, tests: Sequence[str], setup: str) -> tuple[list[str], list[str]]:
    """(names that come from the program, modules to import for the tests: the real ones, not the program's)."""
    free, modules = free_names(tests, setup)
    defined = set(bound(code))
    return sorted((free & defined) - _around(tuple(tests), setup)), sorted(modules)


def parsed(code: str, longest: int = LONGEST) -> ast.Module | None:
    """The syntax tree, None for anything but Python (in the jail it fails with its own message) or too long to be an
    answer."""
    if len(code) > longest:  # parsing an f-string takes quadratic time
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's `1if` must not print a warning in the trainer
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def after_imports(imports: str, code: str) -> str:
    """Code with imports put before it; what it imports from `__future__` stays in front of them."""
    tree = parsed(code, LONGEST_TESTS) if "__future__" in code else None
    future = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"] if tree else []
    lines = code.split("\n")
    for node in future:  # `pass` in their place, so that lines keep their numbers
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        lines[first] = f"{lines[first][: node.col_offset]}pass{lines[last][node.end_col_offset :]}"
        lines[first + 1 : last + 1] = [""] * (last - first)
    return "\n".join([*map(ast.unparse, future), *([imports] if imports else []), *lines])


def _tree(code: str) -> ast.Module:
    return parsed(code, LONGEST_TESTS) or ast.Module([], [])


def _read_by(tests: Sequence[str]) -> set[str]:
    """Names that test code reads and does not make itself."""
    read: set[str] = set()
    for test in tests:
        nodes = list(ast.walk(_tree(test)))
        own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        read |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - own
    return read


def _is_class(name: str) -> bool:
    return name[:1].isupper()


def _holds(nodes: Sequence[ast.AST], names: set[str]) -> dict[str, set[str]]:
    """Whose answers a name or variable may hold: for each of `names` that is read, and each variable that is assigned
    from one."""
    holds = {n.id: {n.id} for n in nodes if isinstance(n, ast.Name) and n.id in names}
    for _ in range(3):
        for node in nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For, ast.comprehension)):
                source = node.iter if isinstance(node, (ast.For, ast.comprehension)) else node.value
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                inside = set().union(*(holds.get(n, set()) for n in _loaded(source)))
                for target in (t for each in targets for t in ast.walk(each) if isinstance(t, ast.Name) and inside):
                    holds[target.id] = holds.get(target.id, set()) | inside
    return holds


@functools.lru_cache(maxsize=KEPT)
def _around(tests: tuple[str, ...], setup: str) -> set[str]:
    """Those free names that a test calls (or calls a method of) with what another of them returned inside the
    arguments, directly or by a variable.

    Where that other is a class, only if the call alone decides and is given something else besides (`same(F(7), 49)`).
    """
    names, _ = free_names(tests, setup)
    found: set[str] = set()
    for test in tests:
        nodes = list(ast.walk(_tree(test)))
        holds = _holds(nodes, names)
        decides = {id(part) for part in _verdicts(nodes)}
        for node in nodes:
            root = _root(node.func) if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and root in names:
                parts = (*node.args, *node.keywords)
                inner = set().union(*(holds.get(n, set()) for part in parts for n in _loaded(part))) - {root}
                judges = (id(node) in decides and len(parts) > 1) or _last(node.func).startswith(JUDGES)
                as_module = isinstance(node.func, ast.Attribute) and not _is_class(str(root))
                if any(not _is_class(name) for name in inner) or (inner and (judges or as_module)):
                    found.add(str(root))
    return found


def _verdicts(nodes: Sequence[ast.AST]) -> Iterator[ast.expr]:
    """Expressions whose truth alone decides a test: of assertions, of conditions, and of `assertTrue`; below `not`,
    `and`, `all`, `== True`."""
    pending: list[ast.expr] = []
    for node in nodes:
        if isinstance(node, (ast.Assert, ast.If)):
            pending.append(node.test)
        elif isinstance(node, ast.Call) and _last(node.func) in ("assertTrue", "assertFalse", "assert_") and node.args:
            pending.append(node.args[0])
    while pending:
        part = pending.pop()
        if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not):
            pending.append(part.operand)
        elif isinstance(part, ast.BoolOp):
            pending += part.values
        elif isinstance(part, ast.Compare) and len(part.comparators) == 1 and _is_bool(part.comparators[0]):
            pending.append(part.left)
        elif isinstance(part, ast.Compare) and len(part.comparators) == 1 and _is_bool(part.left):
            pending.append(part.comparators[0])
        elif isinstance(part, (ast.GeneratorExp, ast.ListComp)):
            pending.append(part.elt)
        elif isinstance(part, (ast.List, ast.Tuple)):
            pending += part.elts
        elif (
            isinstance(part, ast.Call)
            and _last(part.func) in ("all", "any", "bool")
            and isinstance(part.func, ast.Name)
        ):
            pending += part.args
        else:
            yield part


def _is_bool(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _pairs(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """The values that are compared or combined, two by two."""
    if isinstance(node, ast.Compare):
        values = [node.left, *node.comparators]
        return [
            (a, b)
            for a, b, how in zip(values, values[1:], node.ops, strict=False)
            if not isinstance(how, (ast.Is, ast.IsNot))
        ]
    if isinstance(node, ast.BinOp):
        return [(node.left, node.right)]
    if isinstance(node, ast.Call) and len(node.args) >= 2 and _last(node.func) in ("assertEqual", "assertNotEqual"):
        return [(node.args[0], node.args[1])]
    return []


def _made(value: ast.expr, assigned: Mapping[str, list[ast.expr]], free: set[str]) -> bool:
    """Whether a value is an object of a class of the program's: `P(1, 2)`, or a variable that was assigned nothing
    else."""
    values = assigned.get(value.id, []) if isinstance(value, ast.Name) else [value]
    return bool(values) and all(
        isinstance(v, ast.Call) and isinstance(v.func, ast.Name) and v.func.id in free and _is_class(v.func.id)
        for v in values
    )


def _root(node: ast.expr) -> str | None:
    """The name that a chain of attributes, calls and items begins with."""
    while not isinstance(node, ast.Name):
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return None
    return node.id


def _last(node: ast.expr) -> str:
    """The last name of a dotted one."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _loaded(node: ast.AST | None) -> set[str]:
    """Names that an expression reads."""
    return set() if node is None else {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def bound(code: str) -> dict[str, Literal["defined", "module"]]:
    """Names that a program binds at its top level, as far as its syntax tree shows: by importing (`module`), or
    otherwise."""
    names: dict[str, Literal["defined", "module"]] = {}
    pending: list[ast.stmt] = list((parsed(code) or ast.Module([], [])).body)
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
            names |= {alias.asname or alias.name: "module" for alias in node.names}
        elif isinstance(node, (ast.If, ast.Try, ast.For, ast.While, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                pending += getattr(node, part, [])
    return names
