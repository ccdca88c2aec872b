"""Importance ratios between two policies over whole responses, kept in log space.

With the per-token log-ratio d_t = log π_θ(y_t) − log π_anchor(y_t) and ℓ = Σ_t d_t over the response's own T tokens
(the EOS that the model chose included, padding not):

    sequence    ℓ            joint probability ratio; unbiased; its variance grows like e^{σ²T} − 1
    geometric   ℓ / T        GSPO, arXiv 2507.18071 eq. 7
    family      ℓ / T^κ      κ = 0 joint, κ = 1 geometric, κ = ½ a scale free of length
    token       d_t          each token's own ratio (arXiv 2604.08865's released code; PPO, arXiv 1707.06347)
    geometric-token          the value ℓ / T at every token, with the gradient of d_t: GSPO-token, arXiv 2507.18071 eq. 14,
                             sg[ℓ/T] + d_t − sg[d_t]; the gradient of `geometric` where all tokens of a response have one advantage

Sums run in float32 at least. Nothing here exponentiates: that is the surrogate's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

KAPPA = {"sequence": 0.0, "geometric": 1.0, "geometric-token": 1.0}


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def log_ratio(
    logp_BT: Tensor, anchor_logp_BT: Tensor, mask_BT: Tensor, ratio: str = "sequence", kappa: float = 0.5
) -> Tensor:
    """Log importance ratios: [B] for the sequence forms, [B, T] for `token` and `geometric-token` (0 where masked).

    Args:
        logp_BT: log-probabilities under the policy being trained, with gradient.
        anchor_logp_BT: the same tokens under the anchor (behaviour or reference policy), without gradient.
        mask_BT: 1 for the response's own tokens, 0 for padding; what lies under 0 may be anything, NaN included.
        ratio: `sequence`, `geometric`, `token`, `geometric-token` or `family`.
        kappa: the family's exponent.

    Raises:
        ValueError: shapes differ, or the ratio is unknown.
    """
    if not logp_BT.shape == anchor_logp_BT.shape == mask_BT.shape or logp_BT.dim() != 2:
        raise ValueError(f"need three [B, T] tensors, got {logp_BT.shape}, {anchor_logp_BT.shape}, {mask_BT.shape}")
    inside_BT = mask_BT.bool()
    difference_BT = wide(logp_BT) - wide(anchor_logp_BT)
    difference_BT = torch.where(inside_BT, difference_BT, torch.zeros_like(difference_BT))
    if ratio == "token":
        return difference_BT
    if ratio != "family" and ratio not in KAPPA:
        raise ValueError(f"unknown ratio {ratio!r}: sequence, geometric, token, geometric-token or family")
    exponent = KAPPA.get(ratio, kappa)
    length_B = inside_BT.sum(1).clamp(min=1).to(difference_BT.dtype)
    ratio_B = difference_BT.sum(1) / length_B**exponent
    if ratio == "geometric-token":
        whole_BT = ratio_B.detach()[:, None] + (difference_BT - difference_BT.detach())
        return torch.where(inside_BT, whole_BT, torch.zeros_like(whole_BT))
    return ratio_B
