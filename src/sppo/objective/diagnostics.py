"""What tells a healthy run from a sick one. Pure functions; `None` where a number cannot be measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ratio import wide


def effective_sample_size(log_weight_B: Tensor) -> float:
    """Kish's ESS as a share of the batch: (Σw)² / (N·Σw²), computed without overflow. [B] → (0, 1]; 0 where every weight is 0."""
    if log_weight_B.numel() == 0:
        return float("nan")
    log_weight_B = wide(log_weight_B.detach())
    if bool((log_weight_B == -torch.inf).all()):
        return 0.0
    log_share = 2 * torch.logsumexp(log_weight_B, 0) - torch.logsumexp(2 * log_weight_B, 0)
    return math.exp(float(log_share)) / log_weight_B.numel()


def explained_variance(reward_B: Tensor, value_B: Tensor) -> float | None:
    """1 − Var(R − V) / Var(R); 0 for a constant V, negative for a harmful one. None when all rewards are equal."""
    if reward_B.numel() < 2:
        return None
    variance = wide(reward_B).var()
    if float(variance) == 0.0:
        return None
    return float(1 - (wide(reward_B) - wide(value_B)).var() / variance)


def explained_variance_ceiling(reward_BN: Tensor) -> float | None:
    """The explained variance of a perfect critic, V(x) = P(solved | x): Var(p) / Var(R). [prompts, N ≥ 2] → share.

    Rewards are noisy, so no prompt-only critic reaches 1. Two rewards of one prompt share nothing but p, so the mean
    over pairs of Cov(r_a, r_b) estimates Var(p) without bias: the between-prompt variance of the one-way ANOVA. Every
    reward has the same spread, so the total is Var(p) + E[p(1−p)].
    """
    reward_BN = wide(reward_BN)
    prompts, samples = reward_BN.shape
    if samples < 2 or prompts < 2:
        return None
    within = float(reward_BN.var(1).mean())
    between = max(float(reward_BN.mean(1).var()) - within / samples, 0.0)
    return between / (between + within) if between + within > 0 else None


def brier(reward_B: Tensor, value_B: Tensor) -> float | None:
    """Mean squared error of the predicted probability (Brier 1950)."""
    return float((wide(reward_B) - wide(value_B)).square().mean()) if reward_B.numel() else None


def expected_calibration_error(reward_B: Tensor, value_B: Tensor, bins: int = 10) -> float | None:
    """Σ_bins share·|mean predicted − mean observed| over equal-width bins (arXiv 1706.04599 eq. 3)."""
    if reward_B.numel() == 0:
        return None
    reward_B, value_B = wide(reward_B), wide(value_B)
    bin_B = (value_B * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=value_B.dtype, device=value_B.device).index_add_(0, bin_B, value_B - reward_B)
    return float(gap.abs().sum() / reward_B.numel())


def auc(reward_B: Tensor, value_B: Tensor, threshold: float = 0.5) -> float | None:
    """P(V of a solved prompt > V of an unsolved one), ties half (Mann–Whitney). None when one class is absent."""
    solved_B = reward_B > threshold
    positives = int(solved_B.sum())
    negatives = solved_B.numel() - positives
    if positives == 0 or negatives == 0:
        return None
    _, group_B, count_G = torch.unique(wide(value_B), return_inverse=True, return_counts=True)
    mean_rank_G = count_G.cumsum(0) - (count_G - 1) / 2
    rank_sum = float(mean_rank_G[group_B][solved_B].double().sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def critic_quality(reward_B: Tensor, value_B: Tensor) -> dict[str, float | None]:
    """Explained variance, Brier, ECE and AUC of predictions made before the critic saw these rewards."""
    return {
        "critic/explained_variance": explained_variance(reward_B, value_B),
        "critic/brier": brier(reward_B, value_B),
        "critic/ece": expected_calibration_error(reward_B, value_B),
        "critic/auc": auc(reward_B, value_B),
    }
