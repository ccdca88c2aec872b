"""Where a response's credit comes from: its reward less a baseline. One file per kind of knowledge that a baseline has.

    prompt.py    V(x), a prediction from the prompt alone                critic, centred
    token.py     a value for every token, and GAE                        token-critic
    hybrid.py    V(x), and what the steps written so far tell            hybrid
    samples.py   other rewards of the same step, no critic               batch, others, group, greedy

`advantage` is asked before `learn` has seen the batch's rewards: no baseline ever contains its sample's own reward (except
`group` and whitening, which are the peers' own habit and scale the gradient).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ...models.critic import Critic
from ...objective.advantage import GROUP_EPSILON, gae, group_deviation, whitened
from ..batch import Batch

Found = tuple[Tensor, Tensor | None, dict[str, Any]]
"""Advantages, [B] or [B, T]; the predicted values V(x), [B], where there is a critic; metrics."""


class Credit(Protocol):
    """What the learner asks for advantages, and teaches with each minibatch."""

    critic: Critic | None
    charges_tokens: bool
    """Whether a KL in the reward is charged to each token, as `batch.cost_BT` has it; else `reward_B` is less the response's."""

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """Advantages from everything known before this batch; values for masked rollouts are undefined."""

    def learn(self, batch: Batch, rows: Tensor, lr: float) -> tuple[float, float] | None:
        """Train on some rows of the batch that `advantage` saw last; loss and gradient norm, or None where there is nothing to train."""

    def state_dict(self) -> dict[str, Any]:
        """All but the critic's weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""


def scaled(advantage: Tensor, reward_B: Tensor, batch: Batch, scale: str) -> Tensor:
    """`objective.scale`: nothing, the deviation of each group's rewards, or whitening over the batch."""
    keep = batch.keep_B if advantage.dim() == 1 else batch.keep_B[:, None] & batch.mask_BT
    if scale == "group":
        deviation_B = group_deviation(reward_B, batch.keep_B, batch.group_B) + GROUP_EPSILON
        return advantage / (deviation_B if advantage.dim() == 1 else deviation_B[:, None])
    return whitened(advantage, keep) if scale == "batch" else advantage


def charged(advantage_BT: Tensor, batch: Batch, decay: float = 1.0) -> Tensor:
    """Advantages less what the KL in the reward charges from each token on, where it charges tokens: Σ_k λ^(k−t)·β·k1_k. [B, T] → [B, T].

    λ is 1 where no value predicts these charges: a smaller one would forgive a token what follows more than some 1/(1 − λ) tokens later, and
    so the expected gradient is that of β·KL(π‖π_ref).
    """
    if batch.cost_BT is None:
        return advantage_BT
    return advantage_BT - gae(batch.cost_BT, torch.zeros_like(batch.cost_BT), batch.mask_BT, decay)
