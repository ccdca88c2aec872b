"""The reward's socket, and how a recipe's `reward.use` becomes one.

A reward is a class with `judge(rollouts) -> list[Verdict]`, or any callable with the signature that users of other
trainers already have: `f(prompts, completions, **columns) -> list[float | None]` (None: could not be graded).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..errors import RecipeError, RewardError
from ..spec import call, call_own, is_import, nearest, parse_spec, resolve
from ..tasks.base import GIVEN
from ..types import OUTCOMES, Rollout, Task, Verdict
from .user_reward import LIMIT, Fault, guarded

TEST_COLUMNS = ("tests", "test_list", "test", "input_output")
"""Where rows keep their tests, in the order in which they are looked at."""
GIVEN_TO_ALL = ("prompts", "completions", "completion_ids")
"""What a callable is given of the responses, by these names."""


class Reward(Protocol):
    """Judges responses; `check` says what is wrong with a task before anything is sampled for it."""

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict for each rollout, in order."""

    def check(self, task: Task) -> str | None:
        """Why this task can never be graded, or None."""

    def close(self) -> None:
        """End what the reward started (worker processes); it may be used again."""


def load_reward(use: str | Callable[..., Any] | Reward, limit: float = LIMIT) -> Reward:
    """The reward that `reward.use` names, or that a Python user passes (a callable or an object with `judge`).

    `limit`: seconds that one call of a user's own may take. Raises RecipeError, also for one that is a part of a sum only.
    """
    reward = _load(use, limit)
    if getattr(reward, "beside", False):
        raise RecipeError(
            f"reward {use!r} is about what another part says is right: write answer + {use} (or math, code)"
        )
    return reward


def _load(use: str | Callable[..., Any] | Reward, limit: float) -> Reward:
    if not isinstance(use, str):
        return _adapt(use, getattr(use, "__name__", type(use).__name__), limit)
    if use == GIVEN:
        raise RecipeError(
            "this run's reward was given in Python; go on with it there: SPPOConfig(resume_from_checkpoint=True)"
        )
    from .combine import MixedReward, Part, is_mixture, parse_mixture

    if is_mixture(use):
        parts = [Part(spec, _load(spec, limit), role, weight) for role, weight, spec in parse_mixture(use)]
        for i, part in enumerate(parts):
            if getattr(part.reward, "beside", False) and (i == 0 or part.role != "+"):
                raise RecipeError(
                    f"reward {use!r}: {part.name} is added to a part that says what is right: write answer + {part.name}"
                )
        return MixedReward(parts)
    if is_import(use, "sppo.rewards"):
        return _own(use, limit)
    spec = parse_spec(use)
    return call(resolve(spec.name, "sppo.rewards", "build"), f"reward {spec.name}", *spec.words, **spec.options)


def _own(use: str, limit: float) -> Reward:
    """`package.module:object` with options: those of a class, or of a function that takes no completions, make the reward; those of a function that
    judges completions are given to it with each call."""
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
        return _UserJudge(reward, name, limit)
    if callable(reward):
        return CallableReward(reward, name, limit, options or {})
    raise RewardError(f"reward {name} is neither callable nor has a judge(rollouts) method")


class CallableReward:
    """A user's `f(prompts, completions, **columns)`: checked at every call, because a silent 0 is the worst answer.

    Prompts and completions are given as the user's rows gave them: text for text prompts, chat messages for chat prompts. `options` go with each
    call, before columns of the same name.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, limit: float = LIMIT, options: Mapping[str, Any] | None = None
    ) -> None:
        """Raises RecipeError for an option that the function does not take."""
        self.function, self.name, self.limit, self.options = function, name, limit, dict(options or {})
        parameters = inspect.signature(function).parameters.values()
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}
        for key in self.options:
            if key in GIVEN_TO_ALL or not (self.takes_any or key in self.takes):
                known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in GIVEN_TO_ALL]
                raise RecipeError(f"reward {name} has no option {key!r}: {nearest(key, known)}")

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Raises RewardError naming the reward and the mend when it raises, hangs or returns what it may not (see guard.py)."""
        return guarded(self.name, self.limit, rollouts, self._call)

    def _call(self, rollouts: Sequence[Rollout]) -> list[Verdict | str]:
        columns = {key for r in rollouts for key in r.task.columns} - {
            *GIVEN_TO_ALL,
            "prompt",
            "completion",
            *self.options,
        }
        chosen = columns if self.takes_any else columns & self.takes
        arguments: dict[str, Any] = {key: [r.task.columns.get(key) for r in rollouts] for key in sorted(chosen)}
        if self.takes_any or "completion_ids" in self.takes:
            arguments["completion_ids"] = [list(r.response_ids) for r in rollouts]
        prompts = [r.task.prompt for r in rollouts]
        completions = [
            r.text if isinstance(r.task.prompt, str) else [{"role": "assistant", "content": r.text}] for r in rollouts
        ]
        arguments |= {"prompts": prompts, "completions": completions, **self.options}
        if not self.takes_any:
            arguments = {key: value for key, value in arguments.items() if key in self.takes}
        scores = self.function(**arguments)
        if not isinstance(scores, (list, tuple)):
            scores = getattr(scores, "tolist", lambda: scores)()
        if not isinstance(scores, (list, tuple)) or len(scores) != len(rollouts):
            got = f"{len(scores)} scores" if isinstance(scores, (list, tuple)) else type(scores).__name__
            raise Fault(
                f"reward {self.name} returned {got} for {len(rollouts)} completions; it must return one each, in order"
            )
        return [self._verdict(score, r) for score, r in zip(scores, rollouts, strict=True)]

    def _verdict(self, score: Any, rollout: Rollout) -> Verdict | str:
        if score is None:
            return Verdict(0.0, "infra_error", {"reason": f"{self.name} returned None"})
        try:
            value = float(score)
        except (TypeError, ValueError):
            return f"reward {self.name} returned {score!r} for task {rollout.task.id}; scores are numbers in [0, 1]"
        if math.isnan(value) or not 0.0 <= value <= 1.0:
            return f"reward {self.name} returned {value} for task {rollout.task.id}; scores must lie in [0, 1], None means ungradable"
        return Verdict(value, "correct" if value >= 0.5 else "wrong", {"reward": self.name})

    def check(self, task: Task) -> str | None:
        return None

    def close(self) -> None:
        return None


class _UserJudge:
    """A user's object with `judge`: the count and the types are checked."""

    def __init__(self, inner: Any, name: str, limit: float) -> None:
        self.inner, self.name, self.limit = inner, name, limit

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Raises RewardError as `CallableReward` does."""
        return guarded(self.name, self.limit, rollouts, self._call)

    def _call(self, rollouts: Sequence[Rollout]) -> list[Verdict | str]:
        verdicts = list(self.inner.judge(rollouts))
        if len(verdicts) != len(rollouts) or not all(isinstance(v, Verdict) for v in verdicts):
            raise Fault(
                f"reward {self.name} must return one Verdict for each of {len(rollouts)} rollouts, got {len(verdicts)} objects"
            )
        return [self._checked(v, r) for v, r in zip(verdicts, rollouts, strict=True)]

    def _checked(self, verdict: Verdict, rollout: Rollout) -> Verdict | str:
        if verdict.outcome not in OUTCOMES:
            return f"reward {self.name} gave task {rollout.task.id} the outcome {verdict.outcome!r}; known: {', '.join(OUTCOMES)}"
        if not verdict.masked and not (0.0 <= verdict.score <= 1.0 and 0.0 <= verdict.correct <= 1.0):
            return f"reward {self.name} scored task {rollout.task.id} {verdict.score}; scores must lie in [0, 1]"
        return replace(
            verdict, score=float(verdict.score), correctness=float(verdict.correct)
        )  # plain numbers, not NumPy's

    def check(self, task: Task) -> str | None:
        check = getattr(self.inner, "check", None)
        return None if check is None else check(task)

    def close(self) -> None:
        getattr(self.inner, "close", lambda: None)()
