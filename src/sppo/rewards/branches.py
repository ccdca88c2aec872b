"""Branches outside functions, made into functions, because analysers count branches in functions only."""

from __future__ import annotations

import ast
import copy

BRANCHES = (ast.If, ast.For, ast.While, ast.Try, ast.Match, ast.With)
FEW, MANY = 4, 40


def outside_functions(tree: ast.Module) -> tuple[str, list[int]]:
    """A program whose functions are the branches that analysers count in functions only, and the line where each began.

    The code of the module and of each class, and every expression with conditions inside conditions, becomes a
    function.
    """
    made: list[tuple[int, list[ast.stmt]]] = []
    inner = {child for n in ast.walk(tree) if isinstance(n, ast.IfExp) for child in (n.body, n.orelse)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            made.append((getattr(node, "lineno", 1), [_Bare().visit(copy.deepcopy(s)) for s in node.body]))
        elif isinstance(node, ast.IfExp) and node not in inner:
            made.append((node.lineno, _branches(node)))
    source, lines = "", []
    for line, body in made:
        if sum(isinstance(n, BRANCHES) for s in body for n in ast.walk(s)) <= FEW and len(body) <= MANY:
            continue
        function = ast.parse("def made(): pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        function.body = body
        text = ast.unparse(function) + "\n"
        source += text
        lines += [line] * text.count("\n")
    return source, lines


class _Bare(ast.NodeTransformer):
    """Leaves out what has a place of its own, or none in a function."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Global)
        ):
            return ast.Pass()
        return super().generic_visit(node)


def _branches(node: ast.expr) -> list[ast.stmt]:
    """`a if t else b` as statements, all the way down; without recursion, for chains are long."""
    nested: list[ast.stmt] = []
    pending: list[tuple[ast.expr, list[ast.stmt]]] = [(node, nested)]
    while pending:
        here, into = pending.pop()
        if isinstance(here, ast.IfExp):
            branch = ast.If(here.test, [], [])
            into.append(branch)
            pending += [(here.body, branch.body), (here.orelse, into)]
        else:
            into.append(ast.Return(here))
    return nested
