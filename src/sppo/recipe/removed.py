"""Keys, algorithms and values of earlier versions: each is refused in a sentence that says what to use now.

The resolved recipe of an older run holds every key of its version. A removed key at a neutral value, one that asks for
what happens now anyway, is dropped, so that such a run resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TREES = "trees of responses were removed: leave it out, and set rollout.samples for several responses per prompt"
_STEPS = "reads the scores of a steps reward: leave phi out, and name one in reward.use (+ 0 * steps:check=…,split=…)"

KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "rollout.kind": (("samples",), f"rollout.kind: {_TREES}"),
    "rollout.branch": ((2,), f"rollout.branch: {_TREES}"),
    "rollout.entropy": ((0.5,), f"rollout.entropy: {_TREES}"),
    "rollout.budget": ((None,), f"rollout.budget: {_TREES}"),
    "rollout.leaves": ((16,), f"rollout.leaves: {_TREES}"),
    "objective.phi": (("steps", "segments"), f"objective.phi was removed: baseline = 'hybrid' always {_STEPS}"),
    "objective.ev_gate": (
        (False,),
        "objective.ev_gate was removed: leave it out, or set baseline = 'batch' for the mean of the other rewards",
    ),
    "objective.half_life": (
        (1.0,),
        "objective.half_life was removed with baseline = 'beta': leave it out, and use 'critic' or 'centred'",
    ),
    "task.environment": (("single_turn",), "'task.environment' has a new name: 'environment.use'"),
    "objective.stakes": ((False,), "'objective.stakes' has a new name: 'objective.optimal_baseline'"),
}  # fmt: skip
"""Removed keys: their neutral values, and the sentence for any other value."""

VALUES: dict[tuple[str, str], str] = {
    ("objective.algorithm", "sppo-tree"): (
        "objective.algorithm = 'sppo-tree' was removed: use 'sppo', or 'sppo-hybrid' for credit by step"
    ),
    ("objective.algorithm", "sppo-beta"): (
        "objective.algorithm = 'sppo-beta' was removed: use 'sppo' or 'sppo-optimal'"
    ),
    ("objective.algorithm", "sppo-stakes"): (
        "objective.algorithm = 'sppo-stakes' has a new name: 'sppo-optimal'"
    ),
    ("objective.baseline", "beta"): "objective.baseline = 'beta' was removed: use 'critic' or 'centred'",
}  # fmt: skip
"""Removed values of keys that remain, with their sentence."""


def is_neutral(key: str, value: Any, recipe: Mapping[str, Any]) -> bool:
    """Whether a removed key at this value changes nothing; `recipe` holds the other keys by their dotted names."""
    if key not in KEYS:
        return False
    hybrid = recipe.get("objective.baseline") == "hybrid" or recipe.get("objective.algorithm") == "sppo-hybrid"
    if key == "objective.phi" and hybrid:
        return bool(value == "steps")
    return value in KEYS[key][0]


def refusal(recipe: Mapping[str, Any]) -> str | None:
    """The sentence for the first removed key or value of a recipe by dotted names, or None."""
    for (key, value), sentence in VALUES.items():
        if recipe.get(key) == value:
            return sentence
    for key, (_, sentence) in KEYS.items():
        if key in recipe and not is_neutral(key, recipe[key], recipe):
            return sentence
    return None


def without_removed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree of sections without its removed keys."""
    gone = [dotted.partition(".") for dotted in KEYS]
    return {
        name: {k: v for k, v in section.items() if (name, ".", k) not in gone}
        if isinstance(section, Mapping)
        else section
        for name, section in tree.items()
    }
