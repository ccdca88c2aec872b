"""The clipped surrogate, decided in log space.

    L = E[ min( r·Â, clip(r, 1−ε_lo, 1+ε_hi)·Â ) ],   r = exp(ℓ)                     (PPO, arXiv 1707.06347 eq. 7;
                                                                                       SPPO, arXiv 2604.08865)
with the dual clip for Â < 0 (arXiv 1912.09729 eq. 5):   max( L, c·Â ).

Clipping happens iff Â > 0 and ℓ > log(1+ε_hi), or Â < 0 and ℓ < log(1−ε_lo); the dual clip iff Â < 0 and ℓ > log c.
So the only ratios that are exponentiated are bounded by max(1+ε_hi, c), and a response of 8,192 tokens whose joint
ratio is e^200 is simply a clipped one. A clipped element contributes its bound, and no gradient. Without a dual clip
ratios of negative advantages have no bound; past e^30 they grow linearly in ℓ (`bounded_exp`).

This module is for maximising: the learner minimises the negative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CEILING = 30.0
"""From here on e^x goes on as its tangent. Squares of gradients are summed in float32, which overflow past e^44: an update would be skipped."""


def bounded_exp(x: Tensor, less: float = 0.0) -> Tensor:
    """e^x, less 0 or 1; beyond CEILING the tangent there: e^C·(1 + x − C). Any shape.

    Value and slope are finite and continuous, and the slope is positive everywhere. A clamp in its place has no slope beyond: what should
    be pushed back most gets no gradient, or what another summand leaves (k3 = e^−ℓ − 1 + ℓ then pushes away from the reference).
    """
    held = x.clamp(max=CEILING)
    within = torch.expm1(held) if less else held.exp()
    return torch.where(x > CEILING, math.exp(CEILING) * (1 + x - CEILING) - less, within)


def surrogate(
    log_ratio: Tensor, advantage: Tensor, clip: tuple[float, float] | None = (0.2, 0.2), dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """Element-wise surrogate and which elements were clipped.

    Args:
        log_ratio: [B] or [B, T], with gradient.
        advantage: broadcastable to it (a [B, 1] advantage for token ratios), without gradient.
        clip: (ε_lo, ε_hi), or None for the plain importance-weighted objective.
        dual_clip: bound c > 1 on the ratio where the advantage is negative, or None.

    Returns:
        value: the objective's summands, same shape as `log_ratio`; clipped: bool, same shape.
    """
    advantage = advantage.to(log_ratio.dtype).expand_as(log_ratio)
    positive, negative = advantage > 0, advantage < 0
    bound = torch.ones_like(log_ratio)
    clipped = torch.zeros_like(log_ratio, dtype=torch.bool)
    if clip is not None:
        low, high = clip
        above = positive & (log_ratio > math.log1p(high))
        below = negative & (log_ratio < _log_low(low))
        bound = torch.where(above, 1 + high, torch.where(below, 1 - low, bound))
        clipped = above | below
    if dual_clip is not None:
        runaway = negative & (log_ratio > math.log(dual_clip))
        bound = torch.where(runaway, dual_clip, bound)
        clipped = clipped | runaway
    # Where clipped, the exponent is replaced before exp: the unused branch of a `where` still sends NaN gradients.
    # Without a dual clip, Â < 0 leaves large ratios unbounded, and they are what must be pushed back most.
    safe = torch.where(clipped, torch.zeros_like(log_ratio), log_ratio)
    return torch.where(clipped, bound, bounded_exp(safe)) * advantage, clipped


def cispo(log_ratio: Tensor, logp: Tensor, advantage: Tensor, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """sg(clip(r, 1−ε_lo, 1+ε_hi))·Â·log π: the weight is clipped, and no element loses its gradient (arXiv 2506.13585 eq. 4, 5).

    Shapes and results as `surrogate`; `logp` is what the ratio was made of.
    """
    low, high = clip
    log_ratio = log_ratio.detach()
    held = log_ratio.clamp(min=_log_low(low), max=math.log1p(high))
    return held.exp() * advantage.to(logp.dtype) * logp, held != log_ratio


def geometric_mean(
    log_ratio_BT: Tensor, mask_BT: Tensor, advantage: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The geometric mean of a response's token ratios, each clipped by itself, times Â: GMPO, arXiv 2507.20673.

        value = Â · exp( 1/T · Σ_t held_t ),   held_t = min(d_t, log(1+ε_hi)) if Â > 0,   max(d_t, log(1−ε_lo)) if Â < 0

    The paper's range is (e^−0.4, e^0.4): a mean in log space bears a wider one than a sum of ratios. A clipped token has no gradient, the others of its
    response do. (The paper writes |min(ρÂ, clip(ρ)Â)| under the root, with Â's sign before it: the same numbers for one Â a response.)

    Args:
        log_ratio_BT: token ratios, [B, T], with gradient; mask_BT: True on the response's own tokens.
        advantage: [B, 1], or [B, T], whose mean over the response it is then.

    Returns:
        value: [B, T], the response's number at each of its tokens: its mean over them is the summand; clipped: bool, [B, T].
    """
    advantage = advantage.to(log_ratio_BT.dtype).expand_as(log_ratio_BT)
    low, high = clip
    above = (advantage > 0) & (log_ratio_BT > math.log1p(high))
    below = (advantage < 0) & (log_ratio_BT < _log_low(low))
    held_BT = torch.where(above, math.log1p(high), torch.where(below, _log_low(low), log_ratio_BT))
    held_BT = torch.where(mask_BT, held_BT, torch.zeros_like(held_BT))
    mean_B1 = response_means(held_BT, mask_BT).sum(1, keepdim=True)
    return bounded_exp(mean_B1) * advantage, above | below


def soft_gate(log_ratio: Tensor, advantage: Tensor, temperature: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """A sigmoid of the ratio in place of the clip: SAPO, arXiv 2511.20347.

        value = Â · 4/τ · σ(τ·(r − 1)),   τ = τ_pos if Â > 0, else τ_neg

    The gradient is that of r·Â times 4·p·(1 − p), p = σ(τ·(r − 1)): 1 on policy, and fading with distance on both sides, the faster the larger τ.

    Args:
        log_ratio: [B] or [B, T], with gradient.
        advantage: broadcastable to it, without gradient.
        temperature: (τ_pos, τ_neg), both above 0; the paper's are 1 and 1.05.

    Returns:
        As `surrogate`; nothing is ever clipped.
    """
    advantage = advantage.to(log_ratio.dtype).expand_as(log_ratio)
    positive, negative = (log_ratio.new_tensor(t) for t in temperature)
    tau = torch.where(advantage > 0, positive, negative)
    gate = torch.sigmoid(tau * torch.expm1(log_ratio.clamp(max=CEILING)))
    return 4 / tau * gate * advantage, torch.zeros_like(log_ratio, dtype=torch.bool)


def plain(logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Â·log π: REINFORCE's, without a ratio (Williams 1992). Nothing is ever clipped."""
    value = advantage.to(logp.dtype) * logp
    return value, torch.zeros_like(value, dtype=torch.bool)


def _log_low(low: float) -> float:
    """log(1 − ε_lo); −∞ where there is no lower bound (ε_lo = 1)."""
    return math.log1p(-low) if low < 1 else -math.inf


def response_means(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Each element divided by its response's number of tokens, so that a sum over elements is a sum of responses' means. [B, T]."""
    return value_BT / mask_BT.sum(1, keepdim=True).clamp(min=1).to(value_BT.dtype)


def normalised_sum(value: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """Σ value·mask / denominator, with masked elements absent rather than multiplied by 0 (so NaN there is harmless).

    The denominator is the *global* count over all micro-batches and ranks (sequences for sequence ratios, tokens for
    token ratios), so that splitting a batch does not change its gradient. An all-masked batch gives an exact 0 that
    still back-propagates.
    """
    kept = torch.where(mask.bool(), value, torch.zeros_like(value))
    return kept.sum() / max(float(denominator), 1.0)
