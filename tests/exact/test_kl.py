"""Every row of the KL table in `objective/kl.py` against enumeration, and the sign of each form's gradient."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.objective.advantage import gae
from sppo.objective.kl import estimator, kl_cost, weighted_k3
from sppo.objective.loss import Scored, policy_loss
from sppo.objective.ratio import log_ratio
from sppo.objective.surrogate import CEILING, bounded_exp, surrogate
from sppo.recipe.objective import ObjectiveSection

from .tabular import (
    INDEX,
    MASK_ST,
    PREFIXES,
    RESPONSES,
    gradient,
    logps,
    parameters,
    probabilities,
    rewards,
    scores,
    total,
)

TOLERANCE = 1e-10


def reverse_kl(theta, reference):
    """KL(π_θ ‖ π_ref)."""
    logp, ref = total(logps(theta)), total(logps(reference))
    return (logp.exp() * (logp - ref)).sum()


def forward_kl(theta, reference):
    """KL(π_ref ‖ π_θ)."""
    logp, ref = total(logps(theta)), total(logps(reference))
    return (ref.exp() * (ref - logp)).sum()


def over_fixed_prefixes(theta, reference, direction, weight_S=None, sampled=None):
    """Σ_s d(s)·KL at the prefix s, with d(s), the chance that π_θ (or `sampled`) writes it, held; times the mean of a response's `weight_S`
    given s."""
    share_S = probabilities(theta if sampled is None else sampled).detach() * (1.0 if weight_S is None else weight_S)
    d_P = torch.zeros(len(PREFIXES), dtype=theta.dtype)
    for s, y in enumerate(RESPONSES):
        for t in range(len(y)):
            d_P[INDEX[y[:t]]] += share_S[s]
    logp, ref = torch.log_softmax(theta, -1), torch.log_softmax(reference, -1)
    kl_P = ((logp.exp() * (logp - ref)) if direction == "reverse" else (ref.exp() * (ref - logp))).sum(-1)
    return (d_P * kl_P).sum()


def expected_gradient(theta, reference, sampled=None, **objective):
    """E over samples, of π_θ or another policy, of ∇ of the KL term in the learner's own loss; responses (and their tokens) are summed."""
    count = len(RESPONSES)
    old_S = logps(theta if sampled is None else sampled).detach()
    x = Scored(
        logps(theta), old_S, old_S, MASK_ST, reference_bT=logps(reference).detach(),
        weight_b=count * probabilities(theta if sampled is None else sampled).detach(),
    )  # fmt: skip
    o = ObjectiveSection(kl=1.0, engine_correction=0, **objective)
    zero = torch.zeros(count, dtype=theta.dtype)
    return gradient(policy_loss(x, zero, o, sequences=count, divisor=count).value, theta)


def gap(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "objective",
    [
        {"ratio": "sequence"},
        {"ratio": "geometric"},
        {"ratio": "token", "kl_level": "sequence"},
        {"ratio": "token", "kl_level": "sequence", "average": "responses"},
    ],
)
def test_the_table_of_whole_responses(seed, objective):
    theta, reference = parameters(seed).requires_grad_(), parameters(seed + 30)
    reverse, forward = gradient(reverse_kl(theta, reference), theta), gradient(forward_kl(theta, reference), theta)
    k1_S = estimator(log_ratio(logps(theta), logps(reference).detach(), MASK_ST, "sequence"), "k1")
    k1 = gradient((probabilities(theta).detach() * k1_S).sum(), theta)
    assert float(k1.abs().max()) < TOLERANCE  # zero: useless
    for form in ("k2", "k3-weighted"):
        assert gap(expected_gradient(theta, reference, kl_form=form, **objective), reverse) < TOLERANCE
    k3 = expected_gradient(theta, reference, kl_form="k3", **objective)
    assert gap(k3, forward) < TOLERANCE
    assert gap(k3, reverse) > 1e-3  # the other direction, really


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "objective",
    [
        {"ratio": "token", "average": "constant"},
        {"ratio": "token", "average": "tokens", "kl_level": "token"},
        {"ratio": "sequence", "kl_level": "token"},
    ],
)
def test_the_table_of_tokens(seed, objective):
    theta, reference = parameters(seed).requires_grad_(), parameters(seed + 30)
    forms = (("k2", "reverse", reverse_kl), ("k3-weighted", "reverse", reverse_kl), ("k3", "forward", forward_kl))
    for form, direction, whole in forms:
        found = expected_gradient(theta, reference, kl_form=form, **objective)
        assert gap(found, gradient(over_fixed_prefixes(theta, reference, direction), theta)) < TOLERANCE
        assert (
            gap(found, gradient(whole(theta, reference), theta)) > 1e-3
        )  # what a token does to later prefixes is not in it


@pytest.mark.parametrize(
    "objective", [{"ratio": "token", "average": "responses"}, {"ratio": "geometric", "kl_level": "token"}]
)
def test_a_responses_mean_is_no_kls_gradient(objective):
    """GRPO's own: 1/T is known at the end only, and depends on the token. Zero in expectation at π_θ = π_ref all the same."""
    theta, reference = parameters(0).requires_grad_(), parameters(30)
    inverse_S = 1 / MASK_ST.sum(1).double()
    for form, direction in (("k2", "reverse"), ("k3", "forward")):
        found = expected_gradient(theta, reference, kl_form=form, **objective)
        for weight_S in (None, inverse_S):
            assert gap(found, gradient(over_fixed_prefixes(theta, reference, direction, weight_S), theta)) > 1e-3
        assert float(expected_gradient(theta, theta.detach(), kl_form=form, **objective).abs().max()) == 0.0


def test_auto_is_the_level_of_the_ratio():
    theta, reference = parameters(0).requires_grad_(), parameters(30)
    for ratio, level in (("token", "token"), ("sequence", "sequence"), ("geometric", "sequence")):
        auto, named = (
            expected_gradient(theta, reference, kl_form="k2", ratio=ratio, kl_level=x) for x in ("auto", level)
        )
        other = expected_gradient(
            theta, reference, kl_form="k2", ratio=ratio, kl_level={"token": "sequence", "sequence": "token"}[level]
        )
        assert torch.equal(auto, named)
        assert gap(auto, other) > 1e-3


@pytest.mark.parametrize(("form", "level"), [("k2", "sequence"), ("k3", "sequence"), ("k2", "token"), ("k3", "token")])
def test_off_policy_they_are_not_exact(form, level):
    theta, reference, old = parameters(0).requires_grad_(), parameters(30), parameters(0) + 0.3 * parameters(50)
    on, off = (
        expected_gradient(theta, reference, s, kl_form=form, ratio="sequence", kl_level=level) for s in (None, old)
    )
    assert gap(on, off) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_what_the_ratio_weighs_is_exact_off_policy_too(seed):
    """Of whole responses; of tokens, over the prefixes that the policy that sampled writes."""
    theta, reference, old = parameters(seed).requires_grad_(), parameters(seed + 30), parameters(seed + 60)
    whole, tokens = (
        expected_gradient(theta, reference, old, kl_form="k3-weighted", ratio="sequence", kl_level=level)
        for level in ("sequence", "token")
    )
    assert gap(whole, gradient(reverse_kl(theta, reference), theta)) < TOLERANCE
    assert gap(tokens, gradient(over_fixed_prefixes(theta, reference, "reverse", sampled=old), theta)) < TOLERANCE


def test_the_weighted_gradient_is_that_of_the_product():
    x, w = torch.linspace(-9, 9, 37, dtype=torch.float64), torch.linspace(3, -5, 37, dtype=torch.float64)
    logp = torch.zeros_like(x).requires_grad_()
    product = (logp + w).exp() * (torch.expm1(-logp - x) + logp + x)
    found = weighted_k3(logp + x, logp + w)
    assert torch.allclose(found, product, rtol=1e-12)
    slopes = [torch.autograd.grad(y.sum(), logp)[0] for y in (found, product)]
    assert torch.allclose(*slopes, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["k1", "k3"])
def test_k1_and_k3_estimate_the_value_of_the_reverse_kl(form):
    """Of whole responses, and as sums over tokens."""
    theta, reference = parameters(0), parameters(30)
    for kl_S in (
        estimator(log_ratio(logps(theta), logps(reference), MASK_ST, "sequence"), form),
        estimator(log_ratio(logps(theta), logps(reference), MASK_ST, "token"), form).sum(1),
    ):
        expected = (probabilities(theta) * kl_S).sum()
        assert float((expected - reverse_kl(theta, reference)).abs()) < TOLERANCE


@pytest.mark.parametrize("seed", range(5))
def test_kl_in_the_reward_is_exact(seed):
    theta, reference, reward_S, beta = parameters(seed).requires_grad_(), parameters(seed + 30), rewards(seed), 0.3
    truth = gradient((probabilities(theta) * reward_S).sum() - beta * reverse_kl(theta, reference), theta)
    cost_ST = kl_cost(logps(theta), logps(reference), MASK_ST, beta)
    assert not cost_ST.requires_grad
    shaped_S = reward_S - cost_ST.sum(1)
    value, _ = surrogate(log_ratio(logps(theta), logps(theta).detach(), MASK_ST), shaped_S - 0.2, clip=None)
    found = gradient((probabilities(theta).detach() * value).sum(), theta)
    assert gap(found, truth) < TOLERANCE


@pytest.mark.parametrize("seed", range(5))
def test_each_token_charged_with_what_follows_is_exact_too_and_a_discount_is_not(seed):
    """Token ratios; the reward less V(x) for all tokens, the KL from each token on."""
    theta, reference, reward_S, beta = parameters(seed).requires_grad_(), parameters(seed + 30), rewards(seed), 0.3
    truth = gradient((probabilities(theta) * reward_S).sum() - beta * reverse_kl(theta, reference), theta)
    cost_ST = kl_cost(logps(theta), logps(reference), MASK_ST, beta)

    def found(charge_ST):
        log_r = log_ratio(logps(theta), logps(theta).detach(), MASK_ST, "token")
        value, _ = surrogate(log_r, reward_S[:, None] - 0.2 - charge_ST, clip=None)
        return gradient((probabilities(theta).detach() * torch.where(MASK_ST, value, 0.0).sum(1)).sum(), theta)

    assert gap(found(gae(cost_ST, torch.zeros_like(cost_ST), MASK_ST, 1.0)), truth) < TOLERANCE
    assert (
        gap(found(cost_ST.sum(1, keepdim=True).expand_as(cost_ST)), truth) < TOLERANCE
    )  # of the whole response: noisier
    assert gap(found(gae(cost_ST, torch.zeros_like(cost_ST), MASK_ST, 0.5)), truth) > 1e-3
    assert gap(found(cost_ST), truth) > 1e-3  # of its own alone


@pytest.mark.parametrize("seed", range(5))
def test_charging_what_follows_varies_less(seed):
    theta, reference = parameters(seed), parameters(seed + 30)
    cost_ST, score_STP, p_S = kl_cost(logps(theta), logps(reference), MASK_ST, 1.0), scores(theta), probabilities(theta)
    follows_ST = gae(cost_ST, torch.zeros_like(cost_ST), MASK_ST, 1.0)
    spread = []
    for charge_ST in (follows_ST, cost_ST.sum(1, keepdim=True)):
        each_SP = (charge_ST[..., None] * score_STP).sum(1)
        mean_P = (p_S[:, None] * each_SP).sum(0)
        spread.append(float((p_S[:, None] * (each_SP - mean_P).square()).sum()))
    assert spread[0] < spread[1]


@pytest.mark.parametrize("form", ["k2", "k3"])
def test_as_rewards_the_others_are_biased(form):
    theta, reference = parameters(0).requires_grad_(), parameters(30)
    reward_S = estimator(log_ratio(logps(theta), logps(reference), MASK_ST, "sequence"), form).detach()
    found = gradient((probabilities(theta).detach() * reward_S * total(logps(theta))).sum(), theta)
    for truth in (reverse_kl, forward_kl):
        assert gap(found, gradient(truth(theta, reference), theta)) > 1e-3


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="k4"):
        estimator(log_ratio(logps(parameters(0)), logps(parameters(1)), MASK_ST, "sequence"), "k4")


# -- the sign, far from the reference ------------------------------------------------------------------------------------

FAR = sorted(
    {*(float(x) for x in range(-200, 201, 5)), -1.0, 1.0, -0.01, 0.01, -1e-4, 1e-4, -59.9, -60.1, -29.9, -30.1, -88.8}
)


def one_response(log_ratio_to_ref, tokens, dtype):
    """One response whose ℓ_ref is spread evenly over its tokens; its log-probabilities are leaves."""
    logp_bT = torch.full((1, tokens), -1.0, dtype=dtype, requires_grad=True)
    held = logp_bT.detach()
    mask = torch.ones(1, tokens, dtype=torch.bool)
    return logp_bT, Scored(logp_bT, held, held, mask, reference_bT=held - log_ratio_to_ref / tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("form", ["k2", "k3", "k3-weighted"])
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_the_kl_in_the_loss_pulls_towards_the_reference_wherever_the_policy_is(dtype, tokens, form, level, ratio):
    """Minimising moves log π against the gradient, so its sign must be that of ℓ_ref. 1 − e^{−x} for k3, x for the others."""
    o = ObjectiveSection(kl=1.0, kl_form=form, kl_level=level, ratio=ratio, engine_correction=0)
    for l_ref in FAR:
        logp_bT, x = one_response(l_ref, tokens, dtype)
        loss = policy_loss(x, torch.zeros(1, dtype=dtype), o, sequences=1, divisor=1).value
        assert math.isfinite(float(loss.detach()))
        assert float(loss.detach()) >= 0
        (found,) = torch.autograd.grad(loss, logp_bT)
        assert math.isfinite(float(found.square().sum()))  # a gradient's norm is finite too, in float32
        assert torch.equal(found.sign(), torch.full_like(found, math.copysign(1, l_ref) if l_ref else 0.0)), l_ref
        at = l_ref if level == "sequence" else l_ref / tokens
        true = -math.expm1(min(-at, CEILING)) if form == "k3" else at
        assert found.flatten().tolist() == pytest.approx(
            [true] * tokens, rel=1e-5 if dtype == torch.float32 else 1e-12, abs=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kl_in_the_reward_pulls_towards_the_reference_wherever_the_policy_is(dtype):
    for ratio in ("sequence", "token"):
        o = ObjectiveSection(kl=0.1, kl_form="reward", ratio=ratio, engine_correction=0)
        for l_ref in FAR:
            logp_bT, x = one_response(l_ref, 4, dtype)
            cost_bT = kl_cost(x.old_bT, x.reference_bT, x.mask_bT, 0.1)
            advantage = (
                -cost_bT.sum(1) if ratio == "sequence" else -gae(cost_bT, torch.zeros_like(cost_bT), x.mask_bT, 1.0)
            )
            (found,) = torch.autograd.grad(policy_loss(x, advantage, o, sequences=1, divisor=1).value, logp_bT)
            assert torch.equal(found.sign(), torch.full_like(found, math.copysign(1, l_ref) if l_ref else 0.0)), l_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_without_a_dual_clip_a_bad_response_is_pushed_back_however_large_its_ratio(dtype, ratio):
    o = ObjectiveSection(ratio=ratio, dual_clip=0, engine_correction=0)
    before = 0.0
    for log_r in (0.0, 1.0, 20.0, 29.0, 31.0, 59.0, 61.0, 200.0):
        logp_bT = torch.full((1, 1), -1.0, dtype=dtype, requires_grad=True)
        old = logp_bT.detach() - log_r
        x = Scored(logp_bT, old, old, torch.ones(1, 1, dtype=torch.bool))
        loss = policy_loss(x, -torch.ones(1, dtype=dtype), o, sequences=1, divisor=1).value
        (found,) = torch.autograd.grad(loss, logp_bT)
        assert math.isfinite(float(found.square().sum()))
        assert float(found) > 0
        assert float(loss.detach()) > before
        before = float(loss.detach())


def test_the_tangent_joins_value_and_slope():
    x = torch.tensor([CEILING - 1e-9, CEILING + 1e-9], dtype=torch.float64, requires_grad=True)
    for less in (0.0, 1.0):
        value = bounded_exp(x, less)
        (slope,) = torch.autograd.grad(value.sum(), x)
        value = value.detach()
        assert float(value[1] / value[0]) == pytest.approx(1, abs=1e-8)
        assert float(slope[1] / slope[0]) == pytest.approx(1, abs=1e-8)
    small = torch.linspace(-40, 20, 7, dtype=torch.float64)
    assert torch.equal(bounded_exp(small), small.exp())
    assert torch.equal(bounded_exp(small, 1.0), torch.expm1(small))
