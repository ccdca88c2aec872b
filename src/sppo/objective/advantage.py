"""Sequence-level advantages: Â(x, y) = R(x, y) − b(x), one number for the whole response.

The critic's value V(x) = σ(c(x)) reads the prompt only, and is computed *before* the critic trains on these rewards
(arXiv 2604.08865). No baseline here ever contains the sample's own reward: that would scale the gradient by 1 − 1/N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ratio import wide


def critic_advantage(reward_B: Tensor, critic_logit_B: Tensor) -> Tensor:
    """R − σ(c(x)), without gradient. Shapes [B], [B] → [B]."""
    return (wide(reward_B) - torch.sigmoid(wide(critic_logit_B))).detach()


def leave_one_out_mean(reward_B: Tensor, mask_B: Tensor) -> Tensor:
    """The mean of the *other* unmasked rewards (RLOO over a batch, arXiv 2402.14740 eq. 6). [B], [B] → [B].

    A sample without others gets 0 as its baseline.
    """
    reward_B, keep_B = wide(reward_B), mask_B.bool()
    kept_B = torch.where(keep_B, reward_B, torch.zeros_like(reward_B))
    others_B = keep_B.sum() - keep_B.long()
    return (kept_B.sum() - kept_B) / others_B.clamp(min=1)


def gated_advantage(
    reward_B: Tensor, critic_logit_B: Tensor, mask_B: Tensor, explained_variance: float | None
) -> Tensor:
    """R − V(x) where the critic has been explaining variance, else R − leave-one-out mean (arXiv 2604.19485).

    `explained_variance` must come from *earlier* batches: a gate that looks at these rewards is biased. None means
    that nothing is known yet, and the mean is used.
    """
    if explained_variance is not None and explained_variance > 0:
        return critic_advantage(reward_B, critic_logit_B)
    return (wide(reward_B) - leave_one_out_mean(reward_B, mask_B)).detach()
