"""What every credit with a critic shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.critic import Critic
from ...models.policy import Policy
from ...objective.diagnostics import critic_quality, explained_variance
from ...recipe.config import Config
from ..batch import Batch
from ..earned import Earned
from ..optimizer import MasterAdamW

EV_MEMORY = 0.9
"""Decay of the running explained variance."""


class TrainedCritic:
    """The optimiser, the running sums and the quality metrics of a critic, in checkpoints too."""

    charges_tokens = False

    def __init__(self, config: Config, policy: Policy, critic: Critic) -> None:
        t = config.training
        self.critic: Critic | None = critic
        self.model, self.policy, self.config = critic, policy, config
        critic.reads_out(linear=config.objective.value_loss == "squared")
        self.optimiser = MasterAdamW(
            critic.parameters(),
            betas=t.betas,
            weight_decay=t.weight_decay,
            offload=t.offload,
            mesh=critic.mesh,
            of=critic,
        )
        self.running_ev: float | None = None
        self.earned = Earned()

    def left(self, batch: Batch, reward_B: Tensor, value_B: Tensor, weight: float = 1.0) -> Tensor:
        """Rewards less (`weight` times) what such chances of success earned beyond V in earlier batches: what V is a baseline of. Then this batch
        is learnt from. [B] × 2 → [B]; the rewards themselves where nothing shapes them (earned.py)."""
        left_B = reward_B - weight * self.earned.beyond(value_B)
        known_B = batch.graded_B & reward_B.isfinite()
        self.earned.learn(batch.correct_B[known_B], reward_B[known_B], torch.ones(int(known_B.sum())))
        return left_B

    def quality(self, batch: Batch, value_B: Tensor) -> dict[str, Any]:
        """How good the predictions were, made before these rewards were seen."""
        correct_b, value_b = batch.correct_B[batch.graded_B], value_B[batch.graded_B]
        metrics: dict[str, Any] = critic_quality(correct_b, value_b)
        metrics["critic/value_mean"] = float(value_b.mean()) if len(value_b) else None
        ev = explained_variance(correct_b, value_b)
        if ev is not None:
            previous = ev if self.running_ev is None else self.running_ev
            self.running_ev = EV_MEMORY * previous + (1 - EV_MEMORY) * ev
        metrics["critic/running_ev"] = self.running_ev
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Moments, masters, and what was measured."""
        return {"optimiser": self.optimiser.state_dict(), "running_ev": self.running_ev, "earned": self.earned.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.running_ev = state["running_ev"]
        self.earned.sums = list(state.get("earned", self.earned.sums))  # of a version that knew none
