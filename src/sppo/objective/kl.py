"""KL estimators between policy and reference over whole responses, and what each one's gradient really is.

With ℓ_ref = Σ_t (log π_θ(y_t) − log π_ref(y_t)) and y ~ π_θ (arXiv 2512.21852, 2510.01555; Schulman's k1, k2, k3):

    name           value                     as a reward term (detached)        as a loss term: expected gradient
    k1             ℓ_ref                     exact: ∇KL(π_θ‖π_ref)              0  (E[∇ log π] = 0): useless, so not offered
    k2             ½ ℓ_ref²                  biased                             exact: ∇KL(π_θ‖π_ref), on policy
    k3             e^{−ℓ_ref} − 1 + ℓ_ref    biased                             ∇KL(π_ref‖π_θ): the *other* direction

A recipe's `kl_form` is therefore `reward` (k1, detached, inside the reward), `k2` or `k3`. The KL inside the reward
shapes the advantage only: it never reaches the critic's target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ratio import log_ratio


def sequence_kl(logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor, form: str) -> Tensor:
    """The estimator `k1`, `k2` or `k3` for each response. [B, T] × 3 → [B]. Raises ValueError for another form."""
    total_B = log_ratio(logp_BT, ref_logp_BT, mask_BT, "sequence")
    if form == "k1":
        return total_B
    if form == "k2":
        return 0.5 * total_B.square()
    if form == "k3":
        return torch.expm1((-total_B).clamp(max=60.0)) + total_B
    raise ValueError(f"unknown KL estimator {form!r}: k1, k2 or k3")


def kl_in_reward(reward_B: Tensor, logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor, weight: float) -> Tensor:
    """R − β·k1 for the *sampling* policy's log-probabilities, detached. [B] → [B]."""
    return reward_B - weight * sequence_kl(logp_BT.detach(), ref_logp_BT, mask_BT, "k1")
