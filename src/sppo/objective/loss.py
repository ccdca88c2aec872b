"""The whole policy loss of one micro-batch, as a pure function of tensors.

    loss = −Σ_elements count·correction·surrogate / denominator + β·KL

The denominators are of the whole minibatch, over all micro-batches: splitting a minibatch does not change its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sections import PER_TOKEN, ObjectiveSection
from .kl import sequence_kl
from .ratio import log_ratio
from .surrogate import cispo, geometric_mean, normalised_sum, plain, response_means, soft_gate, surrogate


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
    the engine's distribution to the learner's (None where they are not corrected). Elements are [b], or [b, T] for token ratios."""

    value: Tensor
    log_ratio: Tensor
    clipped: Tensor
    element_mask: Tensor
    correction: Tensor | None


def denominator(objective: ObjectiveSection, sequences: float, tokens: float, max_tokens: int) -> float:
    """What a minibatch's sum is divided by: its unmasked sequences, its tokens, or a constant (`objective.average`)."""
    if objective.ratio not in PER_TOKEN:
        return sequences
    constant = sequences * max_tokens
    return {"auto": tokens, "tokens": tokens, "responses": sequences, "constant": constant}[objective.average]


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
    log_r = log_ratio(x.logp_bT, anchor_bT, mask_bT, o.ratio, o.kappa)
    if o.ratio in PER_TOKEN and advantage.dim() == 1:
        advantage = advantage[:, None]
    if o.surrogate == "clip":
        value, clipped = surrogate(log_r, advantage, o.clip, o.dual_clip or None)
    elif o.surrogate == "gmpo":
        value, clipped = geometric_mean(log_r, mask_bT, advantage, o.clip)
    elif o.surrogate == "sapo":
        value, clipped = soft_gate(log_r, advantage, o.gate_temperature)
    else:
        logp = log_ratio(x.logp_bT, torch.zeros_like(x.logp_bT), mask_bT, o.ratio, o.kappa)
        value, clipped = cispo(log_r, logp, advantage, o.clip) if o.surrogate == "cispo" else plain(logp, advantage)
    element_mask = mask_bT if o.ratio in PER_TOKEN else torch.ones_like(log_r, dtype=torch.bool)
    if x.count_bT is not None:  # what responses share counts once
        element_mask, value = x.count_bT > 0, value * x.count_bT
    correction = None
    if o.engine_correction:
        correction = log_ratio(x.old_bT, x.behaviour_bT, mask_bT, o.ratio, o.kappa)
        correction = correction.clamp(max=math.log(o.engine_correction))
        value = value * correction.exp()
    if o.average == "responses":
        value = response_means(value, mask_bT)
    loss = -normalised_sum(value, element_mask, divisor)
    if o.kl > 0 and o.kl_form != "reward":
        assert x.reference_bT is not None
        kl_b = sequence_kl(x.logp_bT, x.reference_bT, mask_bT, o.kl_form)
        if x.weight_b is not None:
            kl_b = kl_b * x.weight_b
        loss = loss + o.kl * kl_b.sum() / sequences
    return Loss(loss, log_r, clipped, element_mask, correction)
