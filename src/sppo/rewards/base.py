"""The reward's socket, and how a recipe's `reward.use` becomes one.

A reward is a class with `judge(rollouts) -> list[Verdict]`, or any callable with the signature that users of other
trainers already have: `f(prompts, completions, **columns) -> list[float | None]` (None: could not be graded).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..errors import RecipeError, RewardError
from ..spec import call, is_import, parse_spec, resolve
from ..tasks.base import GIVEN
from ..types import OUTCOMES, Rollout, Task, Verdict


class Reward(Protocol):
    """Judges responses; `check` says what is wrong with a task before anything is sampled for it."""

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict for each rollout, in order."""

    def check(self, task: Task) -> str | None:
        """Why this task can never be graded, or None."""

    def close(self) -> None:
        """End what the reward started (worker processes); it may be used again."""


def load_reward(use: str | Callable[..., Any] | Reward) -> Reward:
    """The reward that `reward.use` names, or that a Python user passes (a callable or an object with `judge`)."""
    if not isinstance(use, str):
        return _adapt(use, getattr(use, "__name__", type(use).__name__))
    if use == GIVEN:
        raise RecipeError(
            "this run's reward was given in Python; go on with it there: SPPOConfig(resume_from_checkpoint=True)"
        )
    from .combine import MixedReward, Part, is_mixture, parse_mixture

    if is_mixture(use):
        return MixedReward([Part(spec, load_reward(spec), role, weight) for role, weight, spec in parse_mixture(use)])
    if is_import(use, "sppo.rewards"):
        found = resolve(use, "sppo.rewards", "build")
        return _adapt(found() if inspect.isclass(found) else found, use)
    spec = parse_spec(use)
    return call(resolve(spec.name, "sppo.rewards", "build"), f"reward {spec.name}", *spec.words, **spec.options)


def _adapt(reward: Any, name: str) -> Reward:
    if hasattr(reward, "judge"):
        return _UserJudge(reward, name)
    if callable(reward):
        return CallableReward(reward, name)
    raise RewardError(f"reward {name} is neither callable nor has a judge(rollouts) method")


class CallableReward:
    """A user's `f(prompts, completions, **columns)`: checked at every call, because a silent 0 is the worst answer.

    Prompts and completions are given as the user's rows gave them: text for text prompts, chat messages for chat prompts.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        parameters = inspect.signature(function).parameters.values()
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Raises RewardError naming the reward and the mend when it raises or returns what it may not."""
        if not rollouts:
            return []
        columns = {key for r in rollouts for key in r.task.columns} - {"prompts", "completions", "prompt", "completion"}
        chosen = columns if self.takes_any else columns & self.takes
        arguments: dict[str, Any] = {key: [r.task.columns.get(key) for r in rollouts] for key in sorted(chosen)}
        if self.takes_any or "completion_ids" in self.takes:
            arguments["completion_ids"] = [list(r.response_ids) for r in rollouts]
        prompts = [r.task.prompt for r in rollouts]
        completions = [
            r.text if isinstance(r.task.prompt, str) else [{"role": "assistant", "content": r.text}] for r in rollouts
        ]
        try:
            scores = self.function(prompts=prompts, completions=completions, **arguments)
        except Exception as error:
            raise RewardError(
                f"reward {self.name} raised {type(error).__name__}: {error} (called with {len(rollouts)} completions "
                f"and columns {sorted(chosen)}); a sample that cannot be graded should get None"
            ) from error
        if not isinstance(scores, (list, tuple)):
            scores = getattr(scores, "tolist", lambda: scores)()
        if not isinstance(scores, (list, tuple)) or len(scores) != len(rollouts):
            got = f"{len(scores)} scores" if isinstance(scores, (list, tuple)) else type(scores).__name__
            raise RewardError(
                f"reward {self.name} returned {got} for {len(rollouts)} completions; it must return one each, in order"
            )
        return [self._verdict(score, r) for score, r in zip(scores, rollouts, strict=True)]

    def _verdict(self, score: Any, rollout: Rollout) -> Verdict:
        if score is None:
            return Verdict(0.0, "infra_error", {"reason": f"{self.name} returned None"})
        try:
            value = float(score)
        except (TypeError, ValueError):
            raise RewardError(
                f"reward {self.name} returned {score!r} for task {rollout.task.id}; scores are numbers in [0, 1]"
            ) from None
        if math.isnan(value) or not 0.0 <= value <= 1.0:
            raise RewardError(
                f"reward {self.name} returned {value} for task {rollout.task.id}; scores must lie in [0, 1], None means ungradable"
            )
        return Verdict(value, "correct" if value >= 0.5 else "wrong", {"reward": self.name})

    def check(self, task: Task) -> str | None:
        return None

    def close(self) -> None:
        return None


class _UserJudge:
    """A user's object with `judge`: the count and the types are checked."""

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.name = inner, name

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        try:
            verdicts = list(self.inner.judge(rollouts))
        except Exception as error:
            raise RewardError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        if len(verdicts) != len(rollouts) or not all(isinstance(v, Verdict) for v in verdicts):
            raise RewardError(
                f"reward {self.name} must return one Verdict for each of {len(rollouts)} rollouts, got {len(verdicts)} objects"
            )
        for verdict, rollout in zip(verdicts, rollouts, strict=True):
            if not verdict.masked and not (0.0 <= verdict.score <= 1.0 and 0.0 <= verdict.correct <= 1.0):
                raise RewardError(
                    f"reward {self.name} scored task {rollout.task.id} {verdict.score}; scores must lie in [0, 1]"
                )
            if verdict.outcome not in OUTCOMES:
                raise RewardError(
                    f"reward {self.name} gave task {rollout.task.id} the outcome {verdict.outcome!r}; known: {', '.join(OUTCOMES)}"
                )
        return [
            replace(v, score=float(v.score), correctness=float(v.correct)) for v in verdicts
        ]  # plain numbers, not NumPy's

    def check(self, task: Task) -> str | None:
        check = getattr(self.inner, "check", None)
        return None if check is None else check(task)

    def close(self) -> None:
        getattr(self.inner, "close", lambda: None)()
