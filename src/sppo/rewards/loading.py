"""How `reward.use` becomes a reward: by name (`math:limit=2`), as a mixture, or as the user's own `module:object`.

The user's own is a class with `judge(rollouts) -> list[Verdict]`, or a callable with the signature that other trainers
use: `f(prompts, completions, **columns) -> list[float | None]` (None: could not be graded).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import RecipeError, RewardError, SandboxUnavailable
from ..spec import GIVEN, call, call_own, is_import, parse_spec, resolve
from ..types import Rollout, Task, Verdict
from .base import TEST_COLUMNS, Reward
from .combine import MixedReward, Part, is_mixture, parse_mixture
from .user_reward import LIMIT, CallableReward, UserJudge


class Elsewhere:
    """Stands for a reward that this machine cannot run, and another one may."""

    def __init__(self, why: SandboxUnavailable) -> None:
        self.why = why

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Raises SandboxUnavailable."""
        raise self.why

    def check(self, task: Task) -> str | None:
        """Raises SandboxUnavailable."""
        raise self.why

    def close(self) -> None:
        return None


def load_reward(use: str | Callable[..., Any] | Reward, limit: float = LIMIT, *, elsewhere: bool = False) -> Reward:
    """The reward that `reward.use` names, or that a Python user passes (a callable or an object with `judge`).

    `limit`: seconds that one call of a user's own may take. Raises RecipeError, also for one that is a part of a sum
    only; and SandboxUnavailable, unless it is to judge `elsewhere`: then `Elsewhere` stands for what needs a jail.
    """
    reward = _load(use, limit, elsewhere)
    if getattr(reward, "beside", False):
        raise RecipeError(
            f"reward {use!r} is about what another part says is right: write answer + {use} (or math, code)"
        )
    return reward


def _load(use: str | Callable[..., Any] | Reward, limit: float, elsewhere: bool) -> Reward:
    if not isinstance(use, str):
        return _adapt(use, getattr(use, "__name__", type(use).__name__), limit)
    if use == GIVEN:
        raise RecipeError(
            "this run's reward was given in Python; continue it there: SPPOConfig(resume_from_checkpoint=True)"
        )
    if is_mixture(use):
        parts = [Part(spec, _load(spec, limit, elsewhere), role, weight) for role, weight, spec in parse_mixture(use)]
        for i, part in enumerate(parts):
            if getattr(part.reward, "beside", False) and (i == 0 or part.role != "+"):
                raise RecipeError(
                    f"reward {use!r}: {part.name} is added to a part that says what is right: write answer + {part.name}"
                )
        return MixedReward(parts)
    if is_import(use, "sppo.rewards"):
        return _own(use, limit)
    spec = parse_spec(use)
    try:
        return call(resolve(spec.name, "sppo.rewards", "build"), f"reward {spec.name}", *spec.words, **spec.options)
    except SandboxUnavailable as why:
        if not elsewhere:
            raise
        return Elsewhere(why)


def _own(use: str, limit: float) -> Reward:
    """`package.module:object` with options: those of a class, or of a function that takes no completions, make the
    reward; those of a function that judges completions are given to it with each call."""
    spec = parse_spec(use, "sppo.rewards")
    found = resolve(spec.name, "sppo.rewards", "build")
    if not callable(found) and (spec.words or spec.options):
        raise RecipeError(
            f"reward {spec.name} is a {type(found).__name__} already made, which takes no options ({use!r})"
        )
    if not inspect.isclass(found) and (hasattr(found, "judge") or _judges(found)):
        if spec.words:
            raise RecipeError(f"reward {use!r}: {spec.words[0]!r} has no name: write options as key=value")
        return _adapt(found, spec.name, limit, spec.options)
    return _adapt(call_own(found, f"reward {spec.name}", *spec.words, **spec.options), use, limit)


def _judges(function: Any) -> bool:
    """Whether a callable is a reward itself, and not something that makes one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.kind is p.VAR_KEYWORD or p.name in ("completions", "prompts") for p in parameters)


def fitting_reward(task: Task) -> str:
    """The reward that a row looks made for, where none is named: by its tests, its family, or its answer."""
    if "gym" in task.columns:
        return "gym"
    return "code" if any(task.columns.get(name) not in (None, "", [], {}) for name in TEST_COLUMNS) else "answer"


def _adapt(reward: Any, name: str, limit: float, options: Mapping[str, Any] | None = None) -> Reward:
    if hasattr(reward, "judge"):
        if options:
            raise RecipeError(f"reward {name} is an object already made, which takes no options ({', '.join(options)})")
        return UserJudge(reward, name, limit)
    if callable(reward):
        return CallableReward(reward, name, limit, options or {})
    raise RewardError(f"reward {name} is neither callable nor has a judge(rollouts) method")
