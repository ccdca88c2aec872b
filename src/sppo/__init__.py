"""sppo: sequence-level proximal policy optimisation for language models that reason.

The names below are the public API; everything loads lazily, so that `import sppo` and `sppo --help` are instant.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "config",
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
