"""What the names and values of a program refer to, resolved from its imports, scopes and assignments.

Nothing is run.
"""

from __future__ import annotations

import ast
import re

FUNCTIONS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
COMPOSED = (
    ast.BinOp,
    ast.JoinedStr,
    ast.FormattedValue,
    ast.List,
    ast.Tuple,
    ast.Subscript,
    ast.Slice,
    ast.UnaryOp,
    ast.IfExp,
)
IMPORTS = frozenset({"builtins.__import__", "importlib.import_module", "importlib.__import__"})
BUILT_BY = frozenset(
    {"chr", "bytes", "bytearray", "reversed", "str", "map", "list", "sorted", "ord", "int", "range", "zip"}
)
DECODERS = frozenset({"base64", "codecs", "binascii", "zlib", "builtins.bytes", "builtins.bytearray", "builtins.str"})


class Names:
    """A program with its imports, its scopes and each node's parent."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.modules: dict[str, set[str]] = {}
        self.values: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.modules.setdefault(name, set()).add(alias.name if alias.asname else name)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                for alias in node.names:
                    self.modules.setdefault(alias.asname or alias.name, set()).add(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.values.setdefault(target.id, []).append(node.value)
        self.locals: dict[ast.AST, set[str]] = {n: _bound(n) for n in ast.walk(tree) if isinstance(n, FUNCTIONS)}
        self.own = self._own_names()

    def origin(self, node: ast.AST) -> set[str]:
        """The qualified names that an expression may refer to, by the program's imports."""
        if isinstance(node, ast.Name):
            if node.id == "__builtins__":
                return {"builtins"}
            known = set(self.modules.get(node.id, ()))
            return known | {f"builtins.{node.id}"} if self._is_builtin(node) else known
        if isinstance(node, ast.Attribute):
            return {f"{base}.{node.attr}" for base in self.origin(node.value)}
        if isinstance(node, ast.Call) and self.origin(node.func) & IMPORTS and node.args:
            name = text_of(node.args[0])
            return {name} if name else set()
        return set()

    def _is_builtin(self, node: ast.Name) -> bool:
        """Whether a name may be the builtin one where it stands: no function around it binds it, nor the module before
        its first use."""
        if node.id in self.own:
            return False
        above: ast.AST | None = node
        while above is not None:
            if node.id in self.locals.get(above, ()):
                return False
            above = self.parent.get(above)
        return True

    def _own_names(self) -> set[str]:
        """Names that the module binds at its top, before anything uses them, and that nothing unbinds."""
        first_use: dict[str, int] = {}
        undone: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                first_use[node.id] = min(first_use.get(node.id, node.lineno), node.lineno)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
                undone.add(node.id)
            elif isinstance(node, ast.Global):
                undone |= set(node.names)
        own = set()
        for statement in self.tree.body:
            names: list[str] = []
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [statement.name]
            elif isinstance(statement, (ast.Import, ast.ImportFrom)):
                names = [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
            elif isinstance(statement, ast.Assign):
                names = [t.id for t in statement.targets if isinstance(t, ast.Name)]
            own |= {
                n
                for n in names
                if n not in undone and first_use.get(n, 1 << 60) >= statement.lineno and not _reads(statement, n)
            }
        return own

    def is_called(self, node: ast.AST) -> bool:
        parent = self.parent.get(node)
        return isinstance(parent, ast.Call) and parent.func is node

    def holds_text(self, node: ast.expr) -> bool:
        """Whether a value is made of words of the program's own, also by way of its variables.

        What a function makes of them is not known.
        """
        pending: list[ast.expr] = [node]
        seen: set[str] = set()
        while pending:
            part = pending.pop()
            text = part.value if isinstance(part, ast.Constant) else None
            if isinstance(text, bytes) or (isinstance(text, str) and re.search(r"[A-Za-z_]", text)):
                return True
            if isinstance(part, ast.Name) and part.id not in seen:
                seen.add(part.id)
                pending += self.values.get(part.id, ())
            elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
                pending += [part.func.value, *(part.args if isinstance(part.func.value, ast.Constant) else [])]
            elif isinstance(part, (*COMPOSED, ast.NamedExpr)):
                pending += [c for c in ast.iter_child_nodes(part) if isinstance(c, ast.expr)]
        return False

    def is_built(self, node: ast.expr) -> bool:
        """Whether a name is put together out of constants, which could have been written as it is."""
        return not isinstance(node, ast.Constant) and self._is_constant(node)

    def _is_constant(self, node: ast.expr) -> bool:
        """Whether nothing but constants goes into a value, also by way of its variables."""
        pending: list[ast.expr] = [node]
        seen: set[str] = set()
        while pending:
            part = pending.pop()
            if isinstance(part, ast.Name):
                values = self.values.get(part.id)
                if not values:
                    return False
                if part.id not in seen:
                    seen.add(part.id)
                    pending += values
            elif isinstance(part, (ast.ListComp, ast.GeneratorExp)):
                pending += [g.iter for g in part.generators]
            elif isinstance(part, ast.Call):
                made = isinstance(part.func, ast.Name) and part.func.id in BUILT_BY
                if isinstance(part.func, ast.Attribute):
                    made = True
                    if not self.origin(part.func.value) & DECODERS:
                        pending.append(part.func.value)
                if not made:
                    return False
                pending += [a for a in part.args if not (isinstance(a, ast.Name) and a.id in BUILT_BY)]
            elif isinstance(part, COMPOSED):
                pending += [c for c in ast.iter_child_nodes(part) if isinstance(c, ast.expr)]
            elif not isinstance(part, ast.Constant):
                return False
        return True


def text_of(node: ast.expr) -> str | None:
    """The text of a constant, else None."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _bound(scope: ast.AST) -> set[str]:
    """The names that a function or a comprehension binds itself."""
    names: set[str] = set()
    elsewhere: set[str] = set()
    pending = list(ast.iter_child_nodes(scope))
    if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
        pending = [scope.args, *scope.body]  # its decorators, defaults and annotations stand outside
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        if isinstance(node, FUNCTIONS):
            continue
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            elsewhere |= set(node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        pending += ast.iter_child_nodes(node)
    return names - elsewhere


def _reads(statement: ast.stmt, name: str) -> bool:
    """Whether a top-level assignment reads the name that it binds (`exec = exec`), or an import takes it from what it
    hides."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "builtins"
    return isinstance(statement, ast.Assign) and any(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(statement.value)
    )
