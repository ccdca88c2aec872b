"""Right answers reached by wrong steps, which a reward for answers alone pays.

A checker says of each written step whether it holds (1; of a graded score, 0.5 or more), does not (0), or cannot be
judged (None): the task's own where its file in `tasks/` has one (chain), else the one that the reward names
(`steps:check=…`), else whether the equations that the text writes hold (rewards/arithmetic.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..rewards.arithmetic import check_steps as arithmetic
from ..rewards.base import TEST_COLUMNS, Reward
from ..rewards.combine import MixedReward
from ..rewards.segments import split_steps
from ..rewards.steps import Checker, StepReward
from ..spec import modules_in, offers, parse_spec, resolve
from ..types import Rollout, Task

NAME = "right_by_wrong_steps"


def step_checker(tasks: str, example: Task, reward: Reward) -> Checker | None:
    """The checker for a task's steps, by the task's spec, one of its problems and its reward; None for programs and
    episodes without one."""
    name = parse_spec(tasks).name
    if name in modules_in("sppo.tasks") and offers(f"sppo.tasks.{name}", "check_steps"):
        checker: Checker = resolve(name, "sppo.tasks", "check_steps")
        return checker
    for part in [p.reward for p in reward.parts] if isinstance(reward, MixedReward) else [reward]:
        if isinstance(part, StepReward) and part.checker is not None:
            return part.checker
    if "start" in example.columns or any(column in example.columns for column in TEST_COLUMNS):
        return None
    return arithmetic


def step_quality(rollouts: Sequence[Rollout], checker: Checker) -> dict[str, float]:
    """Of the right answers whose steps could be judged, the share with a wrong step; empty where no steps could be
    judged.

    `steps_judged_share`: the share of right answers whose steps could be judged.
    """
    right = [r for r in rollouts if r.verdict and not r.verdict.masked and r.verdict.correct >= 0.5]
    judged = []
    for r in right:
        scores = [s for s in checker(r.task, [step for step, _ in split_steps(r.text)]) if s is not None]
        if scores:
            judged.append(min(scores) < 0.5)
    if not judged:
        return {}
    return {NAME: sum(judged) / len(judged), "steps_judged_share": len(judged) / len(right)}
