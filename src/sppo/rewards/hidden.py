"""What a program hides from static analysis: code that it makes from text, and branches outside functions. Nothing is run.

The analysers know calls by the names that a program gives: `exec(…)`, `subprocess.run(…)`. A program reaches the same in other
ways: through `builtins`, an alias, a decorator, `map`, a name put together from pieces, a module fetched while it runs. Where such an
object goes after that cannot be followed, so the finding is any use of it but a plain call that the analysers see.
"""

from __future__ import annotations

import ast
import copy
import doctest
import re
from collections.abc import Iterator
from typing import Any

EXECUTES = frozenset({
    "builtins.exec", "builtins.eval", "builtins.compile", "builtins.execfile", "ctypes.pythonapi", "ctypes.PyDLL", "ctypes.pydll",
    "gc.get_objects", "gc.get_referents", "gc.get_referrers", "pdb.run", "pdb.runeval", "pdb.Pdb", "typing.ForwardRef", "sys.meta_path",
    "sys.path_hooks", "sys.settrace", "sys.setprofile", "importlib.reload",
})  # fmt: skip
"""Objects that run a text, or lead to what does."""
TAKES_TEXT = frozenset({
    "timeit.timeit", "timeit.repeat", "timeit.Timer", "timeit.main", "cProfile.run", "cProfile.runctx", "profile.run", "profile.runctx",
    "trace.Trace", "doctest.run_docstring_examples",
})  # fmt: skip
"""Functions that run their argument where it is a text."""
MAKES_CODE = frozenset({"types.FunctionType", "types.LambdaType", "types.CodeType"})
"""Classes whose instances are code. A program may name them (`isinstance`), not call them."""
CODE_MODULES = frozenset({
    "runpy", "code", "codeop", "imp", "_imp", "marshal", "zipimport", "importlib.machinery", "importlib.abc", "importlib._bootstrap",
    "importlib._bootstrap_external", "_frozen_importlib", "_frozen_importlib_external", "_interpreters", "_xxsubinterpreters",
    "concurrent.interpreters", "dill", "cloudpickle", "bdb",
})  # fmt: skip
"""Modules that are there to run code from elsewhere."""
STARTS = frozenset({
    "os.system", "os.popen", "os.execv", "os.execve", "os.execl", "os.execlp", "os.execvp", "os.execvpe", "os.spawnv", "os.spawnl",
    "os.posix_spawn", "subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output", "subprocess.Popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pickle.loads", "pickle.load", "pickle.Unpickler", "pty.spawn",
})  # fmt: skip
"""What the analysers judge by its call: handed around as a value it is not judged."""
SEEN = frozenset({
    "sys", "math", "cmath", "functools", "itertools", "collections", "re", "string", "random", "time", "heapq", "bisect", "operator", "json",
    "datetime", "decimal", "fractions", "statistics", "typing", "copy", "array", "numbers", "textwrap", "unicodedata", "numpy",
})  # fmt: skip
"""Modules that `__import__` may fetch: an `import` of them is no finding either."""
INSIDES = frozenset({
    "__globals__", "__builtins__", "__subclasses__", "__self__", "__loader__", "__import__", "f_globals", "f_builtins", "gi_code", "cr_code",
    "ag_code", "co_code", "exec_module", "load_module", "create_module", "__build_class__",
})  # fmt: skip
"""Attributes that lead from any object to the builtins, to the code of functions, or through a loader."""
GUARDED = frozenset(
    {"builtins", "importlib", "importlib.util", "sys", "os", "subprocess", "types", "ctypes", "pickle", "gc", "inspect"}
)
"""Modules of which an attribute is taken by a name that can be read."""
BUILT_BY = frozenset(
    {"chr", "bytes", "bytearray", "reversed", "str", "map", "list", "sorted", "ord", "int", "range", "zip"}
)
DECODERS = frozenset({"base64", "codecs", "binascii", "zlib", "builtins.bytes", "builtins.bytearray", "builtins.str"})


def hidden(tree: ast.Module) -> list[dict[str, Any]]:
    """Findings as rewards/quality.py has them: EXEC (text that is run unseen), ALIAS (a call that is made unseen)."""
    try:
        found = {
            (line, rule): says for part in (tree, *_doctests(tree)) for line, rule, says in _Reach(part).findings()
        }
    except RecursionError:
        found = {(1, "EXEC"): "code that no analyser sees: it is nested too deeply to be followed"}
    return [{"rule": rule, "severity": "high", "line": line, "says": says} for (line, rule), says in found.items()]


def _doctests(tree: ast.Module) -> Iterator[ast.Module]:
    """The examples in docstrings, where the program runs them."""
    if not any(isinstance(n, (ast.Import, ast.ImportFrom)) and "doctest" in ast.unparse(n) for n in ast.walk(tree)):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            try:
                examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
                yield ast.parse("".join(e.source for e in examples))
            except (ValueError, SyntaxError):
                continue  # it would not run either


class _Reach:
    """One pass over a program with its imports, its scopes and each node's parent."""

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

    def findings(self) -> Iterator[tuple[int, str, str]]:
        """(line, rule, what is said) of everything that is hidden."""
        docstrings = {id(text) for n in ast.walk(self.tree) for text in _docstring(n)}
        for node in ast.walk(self.tree):
            says = None
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                says = self._imported(node)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                says = self._used(node)
            elif isinstance(node, ast.Attribute):
                says = self._attribute(node) or self._used(node)
            elif isinstance(node, ast.Call):
                says = self._called(node)
            elif isinstance(node, ast.Subscript):
                says = self._subscript(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                says = f"the name {node.value} as a text" if node.value in INSIDES else self._annotation(node)
            if says:
                yield getattr(node, "lineno", 1), "EXEC", f"code that no analyser sees: {says}"
            elif isinstance(node, (ast.Name, ast.Attribute)) and not self._is_called(node):
                for name in self.origin(node) & STARTS:
                    yield node.lineno, "ALIAS", f"{name} as a value: its calls are not seen"

    # -- what things are -----------------------------------------------------------------------------------------------

    def origin(self, node: ast.AST) -> set[str]:
        """The qualified names that an expression may stand for, as far as imports tell."""
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
        """Whether a name may be the builtin one where it stands: no function around it binds it, nor the module before its first use."""
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

    def _is_called(self, node: ast.AST) -> bool:
        parent = self.parent.get(node)
        return isinstance(parent, ast.Call) and parent.func is node

    # -- rules -----------------------------------------------------------------------------------------------------------

    def _imported(self, node: ast.Import | ast.ImportFrom) -> str | None:
        if isinstance(node, ast.ImportFrom) and node.level:
            return None
        for alias in node.names:
            name = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
            if name in EXECUTES or name in CODE_MODULES or name.rpartition(".")[0] in CODE_MODULES:
                return f"import of {name}"
            if alias.name == "*" and isinstance(node, ast.ImportFrom) and node.module in GUARDED:
                return f"everything of {node.module} without its names"
            if isinstance(node, ast.ImportFrom) and node.module == "importlib.util" and alias.name != "find_spec":
                return f"import of {name}"
        return None

    def _used(self, node: ast.Name | ast.Attribute) -> str | None:
        """A use of what executes, or of a module as a value, out of which anything may be taken later."""
        names, parent = self.origin(node), self.parent.get(node)
        called = self._is_called(node)
        for name in sorted(names):
            if (
                name in ("builtins.exec", "builtins.eval")
                and called
                and isinstance(node, ast.Name)
                and node.id == name[9:]
            ):
                continue  # the analysers see it; what `eval` is given is looked at by _called
            if name in EXECUTES or name in CODE_MODULES:
                return f"{name} is used"
            if name in IMPORTS and not called:
                return f"{name} as a value"
            if name == "builtins.getattr" and not called:
                return "getattr as a value"
            if name == "sys.modules" and not isinstance(parent, (ast.Subscript, ast.Compare)):
                return "sys.modules as a value"
            if (
                name in ("builtins", "importlib")
                and not isinstance(parent, ast.Attribute)
                and not _names_it(parent, node)
            ):
                return f"{name} as a value"
            if name.startswith("importlib.util.") and name != "importlib.util.find_spec":
                return f"{name} is used"
        return None

    def _attribute(self, node: ast.Attribute) -> str | None:
        own_class = (
            node.attr == "__subclasses__" and isinstance(node.value, ast.Name) and not self._is_builtin(node.value)
        )
        if node.attr in INSIDES and not own_class:
            return f"the attribute {node.attr}"
        if node.attr == "__code__":  # its counts and names may be read
            parent = self.parent.get(node)
            if not (isinstance(parent, ast.Attribute) and parent.attr.startswith("co_")):
                return "the code of a function"
        return None

    def _called(self, node: ast.Call) -> str | None:
        names = self.origin(node.func)
        first = node.args[0] if node.args else None
        if names & IMPORTS:
            return self._fetched(first)
        if names & MAKES_CODE:
            return f"{min(names & MAKES_CODE)} makes a function"
        if "builtins.eval" in names and first is not None and self._holds_text(first):
            return "eval of a text of the program's own"
        if names & TAKES_TEXT and any(self._holds_text(a) for a in (*node.args, *(k.value for k in node.keywords))):
            return f"{min(names & TAKES_TEXT)} of a text"
        if names & {"builtins.getattr", "builtins.setattr", "operator.attrgetter", "operator.methodcaller"}:
            by_name = "builtins" in min(names)
            base = node.args[0] if by_name and node.args else None
            keys = node.args[1:2] if by_name else node.args[: 1 if "operator.methodcaller" in names else None]
            return next((says for key in keys if (says := self._taken(base, key))), None)
        if isinstance(node.func, ast.Attribute) and not names:
            return self._method(node, node.func)
        return None

    def _method(self, node: ast.Call, function: ast.Attribute) -> str | None:
        """A method of something unknown that is called as the builtins are."""
        own = isinstance(function.value, ast.Name) and function.value.id in ("self", "cls", "re", "regex")
        if own or not node.args:
            return None
        if function.attr == "exec" or (function.attr == "compile" and len(node.args) >= 3):
            return f"a method {function.attr} of something unknown"
        if (
            function.attr == "eval"
            and isinstance(function.value, (ast.Call, ast.Subscript, ast.Attribute))
            and self._holds_text(node.args[0])
        ):
            return "a method eval of something unknown"
        if function.attr in ("get", "pop", "__getitem__", "setdefault") and self._is_namespace(function.value):
            return self._taken(None, node.args[0], namespace=True)
        return None

    def _fetched(self, name: ast.expr | None) -> str | None:
        """What `__import__` and `import_module` fetch."""
        text = text_of(name) if name is not None else None
        if text is None:
            return "a module whose name the program makes"
        return None if text.partition(".")[0] in SEEN else f"a module fetched without import: {text}"

    def _taken(self, base: ast.expr | None, key: ast.expr, *, namespace: bool = False) -> str | None:
        """An attribute, or an entry of a namespace, by a name that is given as a value."""
        text = text_of(key)
        owners = self.origin(base) if base is not None else set()
        if text is not None:
            last = text.rpartition(".")[2]
            if last in INSIDES or last == "__code__" or last in ("exec", "compile", "__import__"):
                return f"{text} by its name"
            hit = {f"{owner}.{text}" for owner in owners} & (EXECUTES | STARTS | CODE_MODULES | {"sys.modules"})
            return f"{min(hit)} by its name" if hit else None
        if self._is_built(key):
            return "a name put together from pieces"
        if namespace or owners & GUARDED or any(o.startswith("builtins.") for o in owners):
            return "a name that is not written in the program"
        return None

    def _subscript(self, node: ast.Subscript) -> str | None:
        if "sys.modules" in self.origin(node.value):
            return self._fetched(node.slice)
        return self._taken(None, node.slice, namespace=True) if self._is_namespace(node.value) else None

    def _is_namespace(self, node: ast.expr) -> bool:
        """Whether it is a dictionary of names: globals(), vars(…), something's __dict__."""
        if isinstance(node, ast.Name):
            return any(self._is_namespace(v) for v in self.values.get(node.id, ()) if not isinstance(v, ast.Name))
        if isinstance(node, ast.Call):
            return bool(self.origin(node.func) & {"builtins.globals", "builtins.locals", "builtins.vars"})
        return isinstance(node, ast.Attribute) and node.attr == "__dict__" and bool(self.origin(node.value))

    def _annotation(self, node: ast.Constant) -> str | None:
        """A text as an annotation that would call something: `get_type_hints` evaluates it."""
        parent = self.parent.get(node)
        if not (isinstance(parent, (ast.arg, ast.AnnAssign)) and parent.annotation is node):
            returns = isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) and parent.returns is node
            if not returns:
                return None
        try:
            tree = ast.parse(str(node.value), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        return "an annotation that calls" if any(isinstance(n, ast.Call) for n in ast.walk(tree)) else None

    def _holds_text(self, node: ast.expr) -> bool:
        """Whether a value is made of words of the program's own, also by way of its variables. What a function makes of them is not known."""
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

    def _is_built(self, node: ast.expr) -> bool:
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
FUNCTIONS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
IMPORTS = frozenset({"builtins.__import__", "importlib.import_module", "importlib.__import__"})


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
    """Whether a top-level assignment reads the name that it binds (`exec = exec`), or an import takes it from what it hides."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "builtins"
    return isinstance(statement, ast.Assign) and any(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(statement.value)
    )


def _names_it(parent: ast.AST | None, node: ast.AST) -> bool:
    """Whether a module is only the first argument of getattr and the like, which look at the name themselves."""
    return (
        isinstance(parent, ast.Call)
        and isinstance(parent.func, ast.Name)
        and parent.func.id in ("getattr", "hasattr", "setattr")
        and bool(parent.args)
        and parent.args[0] is node
    )


def _docstring(node: ast.AST) -> Iterator[ast.expr]:
    """The text that documents a module, a class or a function."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            yield first.value


# -- branches outside functions ----------------------------------------------------------------------------------------


def outside_functions(tree: ast.Module) -> tuple[str, list[int]]:
    """A program whose functions are the branches that analysers count in functions only, and the line where each began.

    The code of the module and of each class, and every expression with conditions inside conditions, becomes a function.
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


BRANCHES = (ast.If, ast.For, ast.While, ast.Try, ast.Match, ast.With)
FEW, MANY = 4, 40


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
