"""Sequence-level advantages: Â(x, y) = R(x, y) − b(x), one number for the whole response.

The critic's value V(x) = σ(c(x)) reads the prompt only, and is computed *before* the critic trains on these rewards
(arXiv 2604.08865). No baseline here ever contains the sample's own reward: that would scale the gradient by 1 − 1/N.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .ratio import wide


def critic_advantage(reward_B: Tensor, critic_logit_B: Tensor, weight: float = 1.0) -> Tensor:
    """R − weight·σ(c(x)), without gradient. Shapes [B], [B] → [B]."""
    return (wide(reward_B) - weight * torch.sigmoid(wide(critic_logit_B))).detach()


def group_sums(x_B: Tensor, mask_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the unmasked values of each sample's group, itself included. [B] × 3 → [B], [B]."""
    keep_B = mask_B.bool()
    x_B = torch.where(keep_B, wide(x_B), torch.zeros_like(wide(x_B)))
    groups = int(group_B.max()) + 1 if len(group_B) else 0
    sum_G = x_B.new_zeros(groups).index_add_(0, group_B, x_B)
    count_G = x_B.new_zeros(groups).index_add_(0, group_B, keep_B.to(x_B.dtype))
    return sum_G[group_B], count_G[group_B]


def leave_one_out_mean(reward_B: Tensor, mask_B: Tensor, group_B: Tensor | None = None) -> Tensor:
    """The mean of the *other* unmasked rewards, of the batch or of each sample's group (RLOO, arXiv 2402.14740 eq. 6). → [B].

    A sample without others gets 0 as its baseline.
    """
    reward_B, keep_B = wide(reward_B), mask_B.bool()
    group_B = torch.zeros(len(reward_B), dtype=torch.long, device=reward_B.device) if group_B is None else group_B
    sum_B, count_B = group_sums(reward_B, keep_B, group_B)
    own_B = torch.where(keep_B, reward_B, torch.zeros_like(reward_B))
    return (sum_B - own_B) / (count_B - keep_B.to(count_B.dtype)).clamp(min=1)


def group_mean(reward_B: Tensor, mask_B: Tensor, group_B: Tensor) -> Tensor:
    """The mean of each sample's group, the sample itself included (GRPO, arXiv 2402.03300): scales the gradient by 1 − 1/N."""
    sum_B, count_B = group_sums(reward_B, mask_B, group_B)
    return sum_B / count_B.clamp(min=1)


def overlong_penalty(length_B: Tensor, max_tokens: int, share: float) -> Tensor:
    """What DAPO's soft over-long punishment takes from a score (arXiv 2503.14476 eq. 13), for lengths in tokens. [B] → [B], in [0, ½].

        ½ · clip( (length − (max_tokens − cache)) / cache, 0, 1 ),   cache = share·max_tokens

    The paper's scores are 1 and −1, and its penalty takes 1 at most: half of what is between them. Scores here are 1 and 0. The group's mean and
    deviation make the same advantages of both.
    """
    cache = share * max_tokens
    return ((wide(length_B) - (max_tokens - cache)) / cache).clamp(0, 1) / 2


STRATUM = 16
"""Problems of one difficulty are a stratum of their own where a step has at least so many of them."""


def strata(difficulty_B: Sequence[float | None], mask_B: Tensor, group_B: Tensor) -> Tensor:
    """A number for each sample: that of its difficulty, or 0 for all whose difficulty few unmasked problems of this step have, or nobody
    knows. `group_B` numbers the problems. → [B]."""
    known = zip(difficulty_B, group_B.tolist(), mask_B.tolist(), strict=True)
    number = Counter(d for d, _ in dict.fromkeys((d, g) for d, g, kept in known if kept))
    common: dict[float | None, int] = {
        d: k for k, d in enumerate((d for d in number if d is not None and number[d] >= STRATUM), 1)
    }
    return torch.tensor([common.get(d, 0) for d in difficulty_B])


def centred_advantage(reward_B: Tensor, critic_logit_B: Tensor, mask_B: Tensor, stratum_B: Tensor) -> Tensor:
    """R − V(x) less its mean over the *other* samples of the stratum, without gradient: what the critic missed there. [B] × 4 → [B].

    A critic lags where the success rate moves, or problems of a new kind come in: V is then wrong by about as much for all of them. The
    others' rewards and values do not know this response, so the gradient stays unbiased.
    """
    rest_B = critic_advantage(reward_B, critic_logit_B)
    return rest_B - leave_one_out_mean(rest_B, mask_B, stratum_B)


def shifted(chance_B: Tensor, shift: float) -> Tensor:
    """Chances of success with their odds times e^shift; what lies outside [0, 1] counts as 0 or 1. [B] → [B]."""
    chance_B, factor = wide(chance_B).clamp(0, 1), math.exp(shift)
    return chance_B * factor / (chance_B * factor + 1 - chance_B)


GROUP_EPSILON = 1e-4
"""What GRPO adds to a group's deviation (TRL's number)."""


def group_deviation(reward_B: Tensor, mask_B: Tensor, group_B: Tensor) -> Tensor:
    """The sample standard deviation (N − 1) of each sample's group; 0 for a group of one. [B] × 3 → [B]."""
    centred_B = wide(reward_B) - group_mean(reward_B, mask_B, group_B)
    sum_B, count_B = group_sums(centred_B.square(), mask_B, group_B)
    return (sum_B / (count_B - 1).clamp(min=1)).sqrt()


def whitened(advantage: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over everything unmasked (PPO's habit). Same shapes, [B] or [B, T]; 0 where masked."""
    kept = wide(advantage)[mask.bool()]
    if len(kept) < 2:
        return torch.where(mask.bool(), wide(advantage), torch.zeros_like(wide(advantage)))
    out = (wide(advantage) - kept.mean()) / (kept.std() + 1e-8)
    return torch.where(mask.bool(), out, torch.zeros_like(out))


def gae(reward: Tensor, value_BT: Tensor, mask_BT: Tensor, decay: float) -> Tensor:
    """Generalised advantages, undiscounted (arXiv 1506.02438 eq. 16, γ = 1).

    Args:
        reward: [B], earned by the response's last token; or [B, T], by each token.
        value_BT: [B, T], V of the state before each token; what lies beyond a response may be anything.
        mask_BT: True on the response's own tokens.
        decay: λ.

    Returns:
        [B, T], without gradient; 0 beyond a response. With a constant V and a reward at the end the first token's is λ^(T−1) times
        the last one's; with V = 0 and λ = 1 each token's is the sum of the rewards from it on.
    """
    inside_BT = mask_BT.bool()
    value_BT = torch.where(inside_BT, wide(value_BT), torch.zeros_like(wide(value_BT))).detach()
    length_B = inside_BT.sum(1)
    following_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], 1)
    delta_BT = torch.where(inside_BT, following_BT - value_BT, torch.zeros_like(value_BT))
    rows = torch.arange(len(reward), device=value_BT.device)
    some_B = length_B > 0
    if reward.dim() == 2:
        delta_BT = torch.where(inside_BT, delta_BT + wide(reward), delta_BT)
    else:
        delta_BT[rows[some_B], length_B[some_B] - 1] += wide(reward)[some_B]
    out_BT, running_B = torch.zeros_like(delta_BT), torch.zeros_like(delta_BT[:, 0])
    for t in reversed(range(delta_BT.size(1))):
        running_B = delta_BT[:, t] + decay * running_B
        out_BT[:, t] = running_B
    return torch.where(inside_BT, out_BT, torch.zeros_like(out_BT))
