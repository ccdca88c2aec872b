"""The whole policy loss of one micro-batch, as a pure function of tensors.

    loss = −Σ_elements correction·surrogate / denominator + β·KL − w·entropy

The denominators are of the whole minibatch, over all micro-batches: splitting a minibatch does not change its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipe.objective import PER_TOKEN, ObjectiveSection
from .kl import estimator, weighted_k3
from .ratio import log_ratio, wide
from .surrogate import cispo, geometric_mean, normalised_sum, plain, response_means, soft_gate, surrogate

ENTROPY_CAP = 2.0
"""The most that a token's importance weight can be in the entropy bonus."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A micro-batch's responses under every policy that the loss compares. [b, T] each; what lies beyond a response may be anything.

    `logp_bT` carries the gradient. `behaviour_bT` is of the distribution that was sampled from, `reference_bT` of the frozen start,
    where the loss reads it. `weight_b` undoes how a curriculum chose the prompts. `entropy_bT` is of the distribution that each token
    could have been drawn from, without gradient, where the loss reads it.
    """

    logp_bT: Tensor
    old_bT: Tensor
    behaviour_bT: Tensor
    mask_bT: Tensor
    reference_bT: Tensor | None = None
    weight_b: Tensor | None = None
    entropy_bT: Tensor | None = None


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
    if objective.ratio not in PER_TOKEN:
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
    whole = {"token": "sequence", "geometric-token": "geometric"}.get(o.ratio, o.ratio)
    kind = "token" if o.engine_correction_level == "token" else whole
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
        if correction.dim() == 2 and o.ratio not in PER_TOKEN:
            fixed_bT = logp_bT.detach()  # the ratio stays what it is, and each token's part of its gradient is weighted
            logp_bT = fixed_bT + correction.exp() * (logp_bT - fixed_bT)
    log_r = log_ratio(logp_bT, anchor_bT, mask_bT, o.ratio, o.kappa)
    if o.ratio in PER_TOKEN and advantage.dim() == 1:
        advantage = advantage[:, None]
    if o.surrogate == "clip":
        value, clipped = surrogate(log_r, advantage, o.clip, o.dual_clip or None)
    elif o.surrogate == "gmpo":
        value, clipped = geometric_mean(log_r, mask_bT, advantage, o.clip)
    elif o.surrogate == "sapo":
        value, clipped = soft_gate(log_r, advantage, o.gate_temperature)
    else:
        logp = log_ratio(logp_bT, torch.zeros_like(logp_bT), mask_bT, o.ratio, o.kappa)
        value, clipped = cispo(log_r, logp, advantage, o.clip) if o.surrogate == "cispo" else plain(logp, advantage)
    element_mask = mask_bT if o.ratio in PER_TOKEN else torch.ones_like(log_r, dtype=torch.bool)
    if correction is not None and (correction.dim() == 1 or o.ratio in PER_TOKEN):
        weight = correction.exp()
        value = value * (weight[:, None] if value.dim() > weight.dim() else weight)
    if o.average == "responses":
        value = response_means(value, mask_bT)
    loss = -normalised_sum(value, element_mask, divisor)
    if o.kl > 0 and o.kl_form != "reward":
        assert x.reference_bT is not None
        level = "token" if o.kl_of_tokens else "sequence"
        d = log_ratio(x.logp_bT, x.reference_bT, mask_bT, level)
        weight = log_ratio(x.logp_bT, x.old_bT, mask_bT, level)
        kl = weighted_k3(d, weight) if o.kl_form == "k3-weighted" else estimator(d, o.kl_form)
        if o.kl_of_tokens:
            loss = loss + o.kl * token_mean(kl, x, o, element_mask, divisor)
        else:
            loss = loss + o.kl * (kl if x.weight_b is None else kl * x.weight_b).sum() / sequences
    if o.entropy_bonus > 0:
        loss = loss - o.entropy_bonus * token_mean(entropy_bonus(x), x, o, element_mask, divisor)
    if correction is not None and correction.dim() == 2:
        correction = correction[mask_bT]
    return Loss(loss, log_r, clipped, element_mask, correction)


def token_mean(term_bT: Tensor, x: Scored, objective: ObjectiveSection, element_mask: Tensor, divisor: float) -> Tensor:
    """Terms of tokens, averaged as the loss is, so that a weight of theirs means the same beside any ratio's surrogate. [b, T] → scalar.

    Ratios of tokens (elements are [b, T]): over tokens, over responses of token means, or by a constant (`objective.average`). Ratios of whole
    responses: a response's sum over T^κ, as its log ratio is, and then over responses.
    """
    o = objective
    if x.weight_b is not None:
        term_bT = term_bT * x.weight_b[:, None]
    kind = o.ratio if element_mask.dim() == 1 else "token"
    value = log_ratio(term_bT, torch.zeros_like(term_bT), x.mask_bT, kind, o.kappa)
    if o.average == "responses":
        value = response_means(value, x.mask_bT)
    return normalised_sum(value, element_mask, divisor)


def entropy_bonus(x: Scored) -> Tensor:
    """H_t of each token's distribution, with its gradient by the score function (PPO's bonus, arXiv 1707.06347 eq. 9). [b, T], 0 beyond.

        ∇H_t = −E_{v~π}[(log π(v) + H_t) ∇ log π(v)]

    one draw of which is the token that was sampled; the exact entropy in it is the control variate that makes the factor's mean 0. A token
    drawn from μ counts π(v)/μ(v), detached and at most ENTROPY_CAP, so that later updates, and tokens that a cut made likelier, have the same
    expectation; what a cut never draws is missing from it. It is each state's own entropy along the responses sampled, as in PPO: that a
    token leads to states of more entropy is not credited to it.
    """
    assert x.entropy_bT is not None
    logp_bT, entropy_bT = wide(x.logp_bT), wide(x.entropy_bT).detach()
    now_bT = logp_bT.detach()
    weight_bT = (now_bT - wide(x.behaviour_bT)).clamp(max=math.log(ENTROPY_CAP)).exp()
    nothing = torch.zeros_like(now_bT)
    factor_bT = torch.where(x.mask_bT, weight_bT * (now_bT + entropy_bT), nothing)
    return torch.where(x.mask_bT, entropy_bT, nothing) - factor_bT * torch.where(x.mask_bT, logp_bT - now_bT, nothing)
