"""The user's own modules: `mine:reward` is `mine.py` of the current folder, and no library finds anything there.

A file that happens to be called like an optional dependency of some library (`pynvml.py`, `trio.py`) must not run because that library looks for
it: the current folder is never on `sys.path`. A module that a spec names is loaded by its file under the name `sppo.own.mine`. What such a module
imports, at once or later from inside a function, is looked for in the standard library, then in the folder, then among what is installed. Its
modules have names that no library asks for, and that worker processes can import (unpickling, `spawn`).
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

PREFIX = f"{__name__}."

__path__: list[str] = []  # what makes this module a package, whose modules are the files of the current folder
_decided: dict[str, bool] = {}


def load(module: str) -> ModuleType:
    """The module of that (dotted) name: of the current folder if it is there, else an installed one. Raises whatever importing it raises."""
    _stand_here()
    return importlib.import_module(PREFIX + module if _in_folder(module.partition(".")[0]) else module)


def _stand_here() -> None:
    """Look into the folder that is the current one now; modules of another are forgotten."""
    try:
        here = [os.getcwd()]
    except OSError:  # it was removed
        here = []
    if here != __path__:
        for name in [name for name in sys.modules if name.startswith(PREFIX)]:
            del sys.modules[name]
        __path__[:] = here
    _decided.clear()
    importlib.invalidate_caches()  # a file written a moment ago counts


def _in_folder(top: str) -> bool:
    """Whether a top-level name is a module of the folder. A mere folder is one only where nothing else has that name (`datasets/` holds data), and
    a package that is installed from this very folder is the installed one."""
    if top not in _decided:
        found = PathFinder.find_spec(PREFIX + top, __path__)
        try:
            installed = importlib.util.find_spec(top) if found is not None else None
        except ValueError:  # a module without a spec, such as __main__
            installed = None
        _decided[top] = found is not None and (
            installed is None or (found.has_location and not _same_file(found.origin, installed.origin))
        )
    return _decided[top]


def _same_file(one: str | None, other: str | None) -> bool:
    try:
        return one is not None and other is not None and os.path.samefile(one, other)
    except OSError:  # "built-in", "frozen"
        return False


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,  # noqa: A002 - as the builtin has it
    locals: Mapping[str, Any] | None = None,  # noqa: A002
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """What `import` means in a module of the folder; see `__import__`."""
    top = name.partition(".")[0]
    if level or top in sys.stdlib_module_names or not _in_folder(top):
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    found = builtins.__import__(PREFIX + name, globals, locals, fromlist or (), 0)
    return found if fromlist else sys.modules[PREFIX + top]


class _Loader(SourceFileLoader):
    """Runs a source file whose `import` statements are `_import`, wherever in it they stand."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds `sppo.own.…`, and nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(PREFIX):
            return None
        found = PathFinder.find_spec(name, path, target)
        if found is not None and isinstance(found.loader, SourceFileLoader):
            found.loader = _Loader(name, found.loader.path)
        return found


_stand_here()  # a worker process imports `sppo.own.mine` without having asked for it by `load`
sys.meta_path.insert(0, _Finder())
