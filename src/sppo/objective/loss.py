"""The whole policy loss of one micro-batch, as a pure function of tensors.

    loss = −Σ_elements count·correction·surrogate / denominator + β·KL

The denominators are of the whole minibatch, over all micro-batches: splitting a minibatch does not change its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sections import ObjectiveSection
from .kl import sequence_kl
from .ratio import log_ratio
from .surrogate import cispo, normalised_sum, plain, response_means, surrogate


@dataclass(frozen=True, slots=True)
class Scored:
    """A micro-batch's responses under every policy that the loss compares. [b, T] each; what lies beyond a response may be anything.

    `logp_bT` carries the gradient. `behaviour_bT` is of the distribution that was sampled from, `reference_bT` of the frozen start,
    where the loss reads it. `count_bT` is how often a token counts (0 beyond a response; below 1 where responses share it), `weight_b`
    what undoes how a curriculum chose the prompts.
    """

    logp_bT: Tensor
    old_bT: Tensor
    behaviour_bT: Tensor
    mask_bT: Tensor
    count_bT: Tensor | None = None
    reference_bT: Tensor | None = None
    weight_b: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss, with gradient, and what it was made of: log ratios, which elements were clipped, which ones count, and the log weights from
    the engine's distribution to the learner's, of all responses or counted tokens in one row (None where they are not corrected). Elements are
    [b], or [b, T] for token ratios."""

    value: Tensor
    log_ratio: Tensor
    clipped: Tensor
    element_mask: Tensor
    correction: Tensor | None


def denominator(objective: ObjectiveSection, sequences: float, tokens: float, max_tokens: int) -> float:
    """What a minibatch's sum is divided by: its unmasked sequences, its tokens, or a constant (`objective.average`)."""
    if objective.ratio != "token":
        return sequences
    constant = sequences * max_tokens
    return {"auto": tokens, "tokens": tokens, "responses": sequences, "constant": constant}[objective.average]


def mismatch(old_bT: Tensor, behaviour_bT: Tensor, mask_bT: Tensor, objective: ObjectiveSection) -> Tensor:
    """Log importance weights from the distribution that was sampled from to the learner's, without a cap: [b, T], or [b] for whole responses.

    A response's weight is of the kind of the ratio (ratio.py), and the joint one where ratios are of tokens.
    """
    o = objective
    if o.engine_correction_level == "auto":
        raise ValueError("what 'auto' stands for depends on the whole recipe: Config.settled")
    kind = "token" if o.engine_correction_level == "token" else "sequence" if o.ratio == "token" else o.ratio
    return log_ratio(old_bT, behaviour_bT, mask_bT, kind, o.kappa)


def capped(log_weight: Tensor, objective: ObjectiveSection) -> Tensor:
    """Log weights with what is above the cap cut to it (truncated importance sampling, Ionides 2008; Yao et al. 2025), or −∞ (masked: IcePop,
    arXiv 2510.18855; Seq-MIS, Liu et al. 2025). Same shape.

    What is masked stays in the denominator: the mean over all that was sampled is the estimator of those papers' objective, E[1(w ≤ C)·w·f]. A
    mean over the rest would be larger by 1/P(w ≤ C), the more, the worse engine and learner agree.
    """
    most = math.log(objective.engine_correction)
    if objective.engine_correction_beyond == "truncate":
        return log_weight.clamp(max=most)
    return torch.where(log_weight > most, -torch.inf, log_weight)


def policy_loss(x: Scored, advantage: Tensor, objective: ObjectiveSection, *, sequences: float, divisor: float) -> Loss:
    """The loss of one micro-batch.

    Args:
        x: the responses.
        advantage: [b], or [b, T] where every token has its own.
        objective: the recipe's.
        sequences: unmasked sequences of the minibatch, what a KL term is averaged over.
        divisor: see `denominator`.
    """
    o, mask_bT = objective, x.mask_bT
    anchor_bT = x.old_bT
    if o.anchor == "reference":
        assert x.reference_bT is not None
        anchor_bT = x.reference_bT
    logp_bT, correction = x.logp_bT, None
    if o.engine_correction:
        correction = capped(mismatch(x.old_bT, x.behaviour_bT, mask_bT, o), o)
        if correction.dim() == 2 and o.ratio != "token":
            fixed_bT = logp_bT.detach()  # the ratio stays what it is, and each token's part of its gradient is weighted
            logp_bT = fixed_bT + correction.exp() * (logp_bT - fixed_bT)
    log_r = log_ratio(logp_bT, anchor_bT, mask_bT, o.ratio, o.kappa)
    if o.ratio == "token" and advantage.dim() == 1:
        advantage = advantage[:, None]
    if o.surrogate == "clip":
        value, clipped = surrogate(log_r, advantage, o.clip, o.dual_clip or None)
    else:
        logp = log_ratio(logp_bT, torch.zeros_like(logp_bT), mask_bT, o.ratio, o.kappa)
        value, clipped = cispo(log_r, logp, advantage, o.clip) if o.surrogate == "cispo" else plain(logp, advantage)
    element_mask = mask_bT if o.ratio == "token" else torch.ones_like(log_r, dtype=torch.bool)
    if x.count_bT is not None:  # what responses share counts once
        element_mask, value = x.count_bT > 0, value * x.count_bT
    if correction is not None and (correction.dim() == 1 or o.ratio == "token"):
        weight = correction.exp()
        value = value * (weight[:, None] if value.dim() > weight.dim() else weight)
    if o.average == "responses":
        value = response_means(value, mask_bT)
    loss = -normalised_sum(value, element_mask, divisor)
    if o.kl > 0 and o.kl_form != "reward":
        assert x.reference_bT is not None
        kl_b = sequence_kl(x.logp_bT, x.reference_bT, mask_bT, o.kl_form)
        if x.weight_b is not None:
            kl_b = kl_b * x.weight_b
        loss = loss + o.kl * kl_b.sum() / sequences
    if correction is not None and correction.dim() == 2:
        correction = correction[mask_bT if x.count_bT is None else x.count_bT > 0]
    return Loss(loss, log_r, clipped, element_mask, correction)
