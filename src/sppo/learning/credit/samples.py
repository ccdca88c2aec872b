"""Baselines made of the step's own rewards: the peers without a critic."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...models.critic import Critic
from ...models.policy import Policy
from ...objective.advantage import group_mean, leave_one_out_mean
from ...recipe.config import Config
from ..batch import Batch
from .protocol import Found, scaled


def build(config: Config, policy: Policy, critic: Critic | None) -> Samples:
    """`objective.baseline` = batch, others, group or greedy."""
    return Samples(config)


class Samples:
    """Baselines of the step's own rewards: peers without a critic."""

    critic: Critic | None = None
    charges_tokens = False

    def __init__(self, config: Config) -> None:
        self.baseline, self.scale = config.objective.baseline, config.objective.scale

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """R less the mean of others, of the group, or the greedy response's reward."""
        keep_B = batch.keep_B
        if self.baseline == "batch":
            baseline_B = leave_one_out_mean(reward_B, keep_B)
        elif self.baseline == "others":
            baseline_B = leave_one_out_mean(reward_B, keep_B, batch.group_B)
        elif self.baseline == "group":
            baseline_B = group_mean(reward_B, keep_B, batch.group_B)
        else:
            assert batch.greedy_B is not None
            baseline_B = batch.greedy_B
        return scaled(reward_B - baseline_B, reward_B, batch, self.scale), None, {}

    def learn(self, batch: Batch, rows: Tensor, lr: float) -> None:
        """There is nothing to train."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
