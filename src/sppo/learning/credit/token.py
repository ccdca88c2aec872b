"""Credit of PPO: a value for the state before every token, and generalised advantages (arXiv 1506.02438)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...models.critic import Critic
from ...models.policy import Policy
from ...objective.advantage import gae
from ...objective.value import squared_error
from ...recipe.config import Config
from ..batch import Batch, Share
from .protocol import Found, charged, scaled
from .trained import TrainedCritic


def build(config: Config, policy: Policy, critic: Critic) -> TokenCritic:
    """`objective.baseline` = token-critic."""
    return TokenCritic(config, policy, critic)


class TokenCritic(TrainedCritic):
    """PPO's: a value for the state before every token, generalised advantages, and λ-returns as the critic's target.

    With `objective.value_loss = "squared"`, PPO's own, the value is the critic's read-out, and any number: its target is the return of all that
    is paid, a KL in the reward included, token by token. With "cross-entropy" it is σ of that, a chance, as the prompt critic's, and so are its
    targets: what shapes the reward stays out of them, and the KL has no value to be compared with (`charged`).
    """

    charges_tokens = True

    def __init__(self, config: Config, policy: Policy, critic: Critic) -> None:
        super().__init__(config, policy, critic)
        self.target_BT: Tensor | None = None
        self.value_BT: Tensor | None = None  # before the step's updates
        critic.reads_tokens_of(policy)

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """See the protocol; advantages are [B, T]."""
        decay, mask_BT = self.config.objective.gae_lambda, batch.mask_BT
        value_BT = self.values(batch)
        linear = self.model.linear
        advantage_BT = charged(gae(reward_B, value_BT, mask_BT, decay), batch, decay if linear else 1.0)
        target_BT = (advantage_BT if linear else gae(batch.correct_B, value_BT, mask_BT, decay)) + value_BT
        self.target_BT, self.value_BT = target_BT if linear else target_BT.clamp(0, 1), value_BT
        value_B = value_BT[:, 0]  # before the first token: of the prompt alone
        metrics = self.quality(batch, value_B)
        return scaled(advantage_BT, reward_B, batch, self.config.objective.scale), value_B, metrics

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """What is predicted before each token, [B, T]."""
        value_BT = torch.zeros_like(batch.behaviour_logp_BT)
        for part in self._parts(batch, torch.arange(len(batch))):
            logit = self._logits(batch, part)
            value_BT[part, : logit.size(1)] = self.model.value(logit).to(value_BT.dtype).cpu()
        return self.model.mesh.sum(value_BT)

    def learn(self, batch: Batch, rows: Tensor, lr: float) -> tuple[float, float]:
        """Cross-entropy or squared error of every token's value against its λ-return, the mean over tokens."""
        assert self.target_BT is not None
        assert self.value_BT is not None
        tokens, total = int(batch.response_len_B[rows].sum()), 0.0
        parts = self._parts(batch, rows)
        for n, part in enumerate(parts, 1):
            logit = self._logits(batch, part)
            width = logit.size(1)
            target, old = (x[part, :width].to(logit.device) for x in (self.target_BT, self.value_BT))
            if self.model.linear:
                loss_bT = squared_error(logit, target, old, self.config.objective.value_clip)
            else:
                loss_bT = functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
            loss = torch.where(batch.mask_BT[part, :width].to(logit.device), loss_bT, 0.0).sum() / max(tokens, 1)
            self.optimiser.backward(loss, last=n == len(parts))
            total += float(loss.detach())
        return self.model.mesh.sum(total), self.optimiser.step(lr, self.config.training.max_grad_norm)

    def _parts(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        budget, packed = self.config.training.micro_budget, self.model.packs
        return Share.of(rows, batch.length_B, budget, packed, self.model.mesh)

    def _logits(self, batch: Batch, part: Tensor) -> Tensor:
        return self.model(*batch.rows(part))
