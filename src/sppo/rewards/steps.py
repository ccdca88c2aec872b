"""Scored steps: a response is split into steps, each step gets a score in [0, 1] or none, and the response gets their
mean or minimum.

    steps:check=chain                  the task's own checker: `check_steps(task, steps)` of tasks/chain.py
    steps:check=arithmetic             every equation between numbers that a step writes must hold
    steps:check=mine:checker           your own: f(task, steps) -> list[float | None], None for a step it cannot judge
    steps:model=models/prm             a process reward model (token classification; `separator` as it was trained with)
    …,split=lines,score=min            how to split: auto, lines, semicolons, sentences, paragraphs; what to pay: mean, min, last, product

The evidence holds each step's text, end (in characters) and score, ready for credit by step. A response in which no
step could be judged is `unparseable`. Usually a part of a mixture: `answer + 0.3 * steps:check=chain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RecipeError
from ..spec import resolve
from ..types import Rollout, Task, Verdict
from .segments import SEPARATORS, split_steps
from .user_reward import LIMIT, guarded

SCORES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "last": lambda scores: scores[-1],
    "product": math.prod,
}
Checker = Callable[[Task, Sequence[str]], Sequence[float | None]]


def build(
    check: str = "", model: str = "", split: str = "auto", score: str = "mean", separator: str = "\\n"
) -> StepReward:
    """The reward for `reward.use = "steps:…"`. Raises RecipeError (or ModelError) before anything is sampled."""
    if bool(check) == bool(model):
        raise RecipeError(
            "reward steps: say what scores a step: check=chain, check=arithmetic, check=mine:f, or model=FOLDER"
        )
    if split != "auto" and split not in SEPARATORS:
        raise RecipeError(f"reward steps: split={split} is not one of auto, {', '.join(SEPARATORS)}")
    if score not in SCORES:
        raise RecipeError(f"reward steps: score={score} is not one of {', '.join(SCORES)}")
    if model:
        return StepReward(_by_model(model, separator.replace("\\n", "\n")), f"steps:model={model}", split, score)
    room = "sppo.rewards" if check == "arithmetic" else "sppo.tasks"
    checker: Checker = resolve(check, room, "check_steps")
    reward = StepReward(
        lambda rows: [checker(task, steps) for task, steps in rows], f"steps:check={check}", split, score
    )
    reward.checker = checker
    return reward


def _by_model(name: str, separator: str) -> Callable[[Sequence[tuple[Task, Sequence[str]]]], list[Any]]:
    from ..models.loading import pick_device
    from ..models.process_reward import StepModel

    model, _ = StepModel.load(name, device=pick_device(), separator=separator)
    return lambda rows: model.scores([(task.text, steps) for task, steps in rows])


class StepReward:
    """Split, score, combine."""

    reference_free = True
    """It needs no reference answer, so the monitor `reference` skips it (audit/monitors.py)."""

    def __init__(
        self, scorer: Callable[[Sequence[tuple[Task, Sequence[str]]]], Sequence[Any]], name: str, split: str, score: str
    ) -> None:
        self.scorer, self.name, self.split, self.score = scorer, name, split, score
        self.checker: Checker | None = None
        """The function that scores steps, unless a model does; its code counts as the verifier's (audit/verifier.py).
        """

    @property
    def divisible(self) -> bool:
        """A model's scores differ in rounding by what else is in a micro-batch."""
        return self.checker is not None

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct (0.5 or more), wrong, unparseable (no step could be judged: 0), infra_error (too long for the model:
        masked)."""
        return guarded(self.name, LIMIT, rollouts, self._call)

    def _call(self, rollouts: Sequence[Rollout]) -> list[Verdict | str]:
        found = [split_steps(r.text, self.split) for r in rollouts]
        scored = self.scorer([(r.task, [step for step, _ in steps]) for r, steps in zip(rollouts, found, strict=True)])
        return [self._verdict(r, s, scores) for r, s, scores in zip(rollouts, found, scored, strict=True)]

    def _verdict(self, rollout: Rollout, steps: Sequence[tuple[str, int]], scores: Any) -> Verdict | str:
        if scores is None:
            why = f"{self.name}: the response is longer than the model reads"
            return Verdict(0.0, "infra_error", {"reason": why, "steps": [], "split": self.split})
        values = list(scores)
        wrong = next((v for v in values if v is not None and not (isinstance(v, (int, float)) and 0 <= v <= 1)), None)
        if len(values) != len(steps) or wrong is not None:
            what = f"the score {wrong!r}" if wrong is not None else f"{len(values)} scores"
            return (
                f"reward {self.name} returned {what} for the {len(steps)} steps of task {rollout.task.id}; "
                "one each is needed, in [0, 1] or None"
            )
        judged = [float(v) for v in values if v is not None]
        evidence: dict[str, Any] = {
            "steps": [{"text": step, "end": end, "score": v} for (step, end), v in zip(steps, values, strict=True)],
            "split": self.split,
            "measures": {"steps": float(len(steps)), "steps_judged": float(len(judged))},
        }
        if not judged:
            return Verdict(0.0, "unparseable", evidence | {"reason": "no step could be judged"})
        evidence["measures"]["step_mean"] = sum(judged) / len(judged)
        total = SCORES[self.score](judged)
        return Verdict(total, "correct" if total >= 0.5 else "wrong", evidence)

    def check(self, task: Task) -> str | None:
        return None

    def close(self) -> None:
        return None
