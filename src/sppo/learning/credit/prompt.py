"""Credit against V(x), what the critic predicts from the prompt alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...models.critic import Critic
from ...models.policy import Policy
from ...objective.advantage import centred_advantage, critic_advantage, strata
from ...recipe.config import Config
from ..batch import Batch, Share
from .optimal_baseline import OptimalBaseline
from .protocol import Found, scaled
from .trained import TrainedCritic


def build(config: Config, policy: Policy, critic: Critic) -> PromptCritic:
    """`objective.baseline` = critic or centred."""
    return PromptCritic(config, policy, critic)


class PromptCritic(TrainedCritic):
    """R − b(x), with b from V(x) = σ(c(x)): V(x) itself, or V(x) plus the batch's mean residual (centred); with `objective.optimal_baseline`,
    moved from the best prediction to the baseline of least variance."""

    def __init__(self, config: Config, policy: Policy, critic: Critic) -> None:
        super().__init__(config, policy, critic)
        self.optimal = OptimalBaseline(policy, config.objective)

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """See the protocol."""
        o = self.config.objective
        logit_B = self.model.logits([r.task for r in batch.rollouts], self.config.training.micro_budget)
        value_B = logit_B.sigmoid()
        metrics: dict[str, Any] = {}
        if o.optimal_baseline:  # what it turns into a baseline is a chance of success
            chance_B = batch.correct_B - self._less(batch.correct_B, logit_B, batch)
            advantage_B = reward_B - self.optimal.baseline(chance_B)
            metrics["critic/shift"] = self.optimal.shift
            self.optimal.learn(batch, chance_B, reward_B)
        else:
            advantage_B = self._less(self.left(batch, reward_B, value_B, o.baseline_weight), logit_B, batch)
        metrics |= self.quality(batch, value_B)
        return scaled(advantage_B, reward_B, batch, o.scale), value_B, metrics

    def _less(self, paid_B: Tensor, logit_B: Tensor, batch: Batch) -> Tensor:
        """What was paid, less the predicted chance."""
        o, keep_B = self.config.objective, batch.graded_B
        if o.baseline == "centred":
            stratum_B = strata([r.task.difficulty for r in batch.rollouts], keep_B, batch.group_B)
            return centred_advantage(paid_B, logit_B, keep_B, stratum_B)
        return critic_advantage(paid_B, logit_B, o.baseline_weight)

    def learn(self, batch: Batch, rows: Tensor, lr: float) -> tuple[float, float]:
        """Binary cross-entropy of V(x) against the correctness of the responses (never a shaped reward)."""
        prompts = [self.model.prompt_ids(batch.rollouts[i].task) for i in rows.tolist()]
        target_b = batch.correct_B[rows]
        length_b = torch.tensor([len(p) for p in prompts])
        total = 0.0
        budget, packed = self.config.training.micro_budget, self.model.packs
        parts = Share.of(torch.arange(len(rows)), length_b, budget, packed, self.model.mesh)
        for n, part in enumerate(parts, 1):
            logit = self.model.prompt_logits([prompts[i] for i in part.tolist()])
            target = target_b[part].to(logit.device)
            loss = functional.binary_cross_entropy_with_logits(logit, target, reduction="sum") / len(rows)
            self.optimiser.backward(loss, last=n == len(parts))
            total += float(loss.detach())
        return self.model.mesh.sum(total), self.optimiser.step(lr, self.config.training.max_grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """Moments, masters, and what was measured."""
        return super().state_dict() | {"optimal": self.optimal.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        super().load_state_dict(state)
        if (optimal := state.get("optimal", state.get("odds"))) is not None:  # else of a version that knew none
            self.optimal.load_state_dict(optimal)
