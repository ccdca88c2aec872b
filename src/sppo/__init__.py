"""sppo: sequence-level proximal policy optimisation for language models that reason.

The names below are the public API; everything loads lazily, so that `import sppo` and `sppo --help` are instant.
"""

from __future__ import annotations

import sys
from itertools import pairwise


def _leave_current_folder() -> None:
    """Python started with `-m sppo…` looks for modules in the current folder first: libraries would find their optional imports there (own.py)."""
    by_name = any(
        flag[:1] == "-" and flag[-1:] == "m" and name.split(".")[0] == __name__
        for flag, name in pairwise(sys.orig_argv)
    )
    if by_name and sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
        del sys.path[0]


_leave_current_folder()  # before anything else is imported

import importlib  # noqa: E402
from typing import Any  # noqa: E402

from .threads import settle as _settle  # noqa: E402

_settle()  # before PyTorch is loaded, wherever a user comes in

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "recipe.config",
    "Rollout": "types",
    "SPPOConfig": "trainer",
    "SPPOTrainer": "trainer",
    "Task": "types",
    "Verdict": "types",
}
__all__ = ["Config", "Rollout", "SPPOConfig", "SPPOTrainer", "Task", "Verdict", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sppo' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names, which nothing has loaded yet, beside what every module has."""
    return sorted({*globals(), *__all__})
