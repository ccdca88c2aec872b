"""The worker's side of `verifiers.py`. It imports no torch unless the reward does: a verifier starts within seconds."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..audit.verifier import verifier_sha256
from ..errors import RecipeError, RewardError, UserError
from ..files import first_line
from ..rewards.base import Reward, divisible
from ..rewards.combine import MixedReward
from ..rewards.loading import load_reward
from ..types import Rollout, Task
from .versions import versions


class Verifier:
    """What a verifier worker holds: the reward, made as the driver makes it."""

    def __init__(
        self, given: str | bytes, limit: float, task: Task, folder: Path, variables: Mapping[str, str], path: Sequence[str], threads: int
    ) -> None:  # fmt: skip
        """`given` is `reward.use`, or a pickled reward; `task` one of the run's problems, `folder` the driver's, `path` its `sys.path`,
        `variables` those of its environment that count where the worker has none of that name."""
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        if folder.is_dir():
            os.chdir(folder)
        self.reward: Reward
        self.refused: UserError | None = None
        try:
            self.reward = load_reward(given, limit) if isinstance(given, str) else _unpickled(given, path)
            if "torch" in sys.modules:  # a reward model's, which the others do without
                sys.modules["torch"].set_num_threads(threads)
            self.reward.check(task)
        except UserError as why:
            self.refused = why

    def facts(self) -> dict[str, Any]:
        """What the driver needs to know; `refused` says why nothing can be judged here."""
        found: dict[str, Any] = {"versions": versions(), "refused": self.refused}
        if self.refused is None:
            found |= {"sha256": verifier_sha256(self.reward), "divisible": divisible(self.reward)}
        return found

    def progress(self) -> None:
        """It is there."""

    def judge(self, rollouts: Sequence[Rollout], fade: float) -> bytes:
        """The verdicts, pickled. Raises what the reward raises."""
        if isinstance(self.reward, MixedReward):
            self.reward.fade = fade
        verdicts = self.reward.judge(rollouts)
        from ray import cloudpickle

        try:
            found: bytes = cloudpickle.dumps(verdicts)
        except Exception as error:
            raise RewardError(f"the evidence of a verdict cannot be sent to the run: {first_line(error)}") from error
        return found


def _unpickled(given: bytes, path: Sequence[str]) -> Reward:
    """A reward that was given in Python. Raises RecipeError where it cannot be made here."""
    sys.path += [place for place in path if place not in sys.path]
    try:
        found: Reward = pickle.loads(given)
    except Exception as error:
        raise RecipeError(
            f"the reward given in Python cannot be made in another process ({type(error).__name__}: {error}): set reward.workers = 0"
        ) from None
    return found
