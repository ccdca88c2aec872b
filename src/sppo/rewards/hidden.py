"""Code that a program hides from static analysis, such as code made from text. Nothing is run.

Analysers recognise calls by name: `exec(…)`, `subprocess.run(…)`. A program can reach the same functions in other ways:
through `builtins`, an alias, a decorator, `map`, a name assembled from pieces, a module fetched at run time. Such an
object cannot be followed further, so every use of it is a finding, except a plain call that the analysers see.
"""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterator
from typing import Any

from .names import IMPORTS, Names, text_of

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
"""Functions whose calls the analysers judge; passed around as values they escape."""
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


class _Reach(Names):
    """The rules, in one pass over a program."""

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
            elif isinstance(node, (ast.Name, ast.Attribute)) and not self.is_called(node):
                for name in self.origin(node) & STARTS:
                    yield node.lineno, "ALIAS", f"{name} as a value: its calls are not seen"

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
        called = self.is_called(node)
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
        if "builtins.eval" in names and first is not None and self.holds_text(first):
            return "eval of a text of the program's own"
        if names & TAKES_TEXT and any(self.holds_text(a) for a in (*node.args, *(k.value for k in node.keywords))):
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
            and self.holds_text(node.args[0])
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
        if self.is_built(key):
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
