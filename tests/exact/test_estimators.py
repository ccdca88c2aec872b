"""The paper's claims by enumeration: the expectation of the estimator is ∇J, to 1e-10; and what must not be, is not."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.objective.advantage import centred_advantage, critic_advantage, leave_one_out_mean
from sppo.objective.ratio import log_ratio
from sppo.objective.surrogate import surrogate

from .tabular import (
    INDEX,
    LIMIT,
    MASK_ST,
    RESPONSES,
    gradient,
    logps,
    parameters,
    probabilities,
    rewards,
    total,
    true_gradient,
)

TOLERANCE = 1e-10
SEEDS = range(5)


def expected_gradient(
    theta, old, reward_S, *, ratio="sequence", baseline_S=0.0, weight_S=None, sample_temperature=1.0, mask=MASK_ST
):
    """Σ_y π_old(y) ∇ surrogate(y): the exact expectation of the code's own loss over everything that can be sampled."""
    theta = theta.detach().requires_grad_()
    old_logp = logps(old).detach()
    log_r = log_ratio(logps(theta), old_logp, mask, ratio)
    advantage = reward_S - baseline_S
    if ratio == "token":
        advantage = advantage if advantage.dim() == 2 else advantage[:, None]
    value, _ = surrogate(log_r, advantage, clip=None)
    value = torch.where(mask, value, 0.0).sum(1) if ratio == "token" else value
    probability_S = probabilities(old, sample_temperature) if weight_S is None else weight_S
    return gradient((probability_S.detach() * value).sum(), theta)


def error(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("seed", SEEDS)
def test_enumeration_is_a_distribution(seed):
    assert len(RESPONSES) == 31
    assert math.isclose(float(probabilities(parameters(seed)).sum()), 1.0, abs_tol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("logit", [-3.0, 0.0, 1.7])
def test_critic_baseline_is_unbiased_for_any_value(seed, logit):
    theta, reward_S = parameters(seed), rewards(seed)
    advantage_S = critic_advantage(reward_S, torch.full_like(reward_S, logit))
    found = expected_gradient(theta, theta, advantage_S)
    assert error(found, true_gradient(theta, reward_S)) < TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_joint_ratio_is_unbiased_off_policy(seed):
    theta, old, reward_S = parameters(seed), parameters(seed + 100), rewards(seed)
    found = expected_gradient(theta, old, reward_S, baseline_S=0.37)
    assert error(found, true_gradient(theta, reward_S)) < TOLERANCE


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_gradient_of_each_ratio_is_exact(seed, ratio):
    theta, reward_S = parameters(seed), rewards(seed)
    found = expected_gradient(theta, theta, reward_S, ratio=ratio, baseline_S=0.2)
    assert error(found, true_gradient(theta, reward_S)) < TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_any_prefix_baseline_that_does_not_see_the_token_is_unbiased(seed):
    theta, reward_S = parameters(seed), rewards(seed)
    phi = torch.randn(len(INDEX), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    phi_ST = torch.tensor([[float(phi[INDEX[y[:t]]]) if t < len(y) else 0.0 for t in range(LIMIT)] for y in RESPONSES])
    found = expected_gradient(theta, theta, reward_S[:, None] - phi_ST, ratio="token")
    assert error(found, true_gradient(theta, reward_S)) < TOLERANCE


def test_control_a_prefix_baseline_that_sees_the_token_is_biased():
    theta, reward_S = parameters(0), rewards(0)
    after_ST = torch.tensor([[float(y[t]) if t < len(y) else 0.0 for t in range(LIMIT)] for y in RESPONSES])
    found = expected_gradient(theta, theta, reward_S[:, None] - after_ST, ratio="token")
    assert error(found, true_gradient(theta, reward_S)) > 1e-3


def pairs_gradient(theta, reward_S, baseline):
    """The expectation over independent pairs (N = 2) of the mean of both samples' surrogates."""
    theta = theta.detach().requires_grad_()
    old = logps(theta).detach()
    log_r = log_ratio(logps(theta), old, MASK_ST)
    p = probabilities(theta).detach()
    n = len(RESPONSES)
    out = torch.zeros((), dtype=torch.float64)
    for a in range(n):
        for b in range(n):
            pair = torch.tensor([a, b])
            value, _ = surrogate(log_r[pair], reward_S[pair] - baseline(reward_S[pair]), clip=None)
            out = out + p[a] * p[b] * value.mean()
    return gradient(out, theta)


def test_leave_one_out_is_unbiased():
    theta, reward_S = parameters(1), rewards(1)
    found = pairs_gradient(theta, reward_S, lambda r: leave_one_out_mean(r, torch.ones(2)))
    assert error(found, true_gradient(theta, reward_S)) < TOLERANCE


@pytest.mark.parametrize("logits", [(0.3, -1.0), (2.0, 2.0)])
def test_what_the_critic_missed_on_the_other_is_unbiased(logits):
    """And with the sample in its own mean it would be half of the gradient."""
    theta, reward_S = parameters(1), rewards(1)
    logit_B, keep_B, stratum_B = (
        torch.tensor(logits, dtype=torch.float64),
        torch.ones(2),
        torch.zeros(2, dtype=torch.long),
    )
    found = pairs_gradient(theta, reward_S, lambda r: r - centred_advantage(r, logit_B, keep_B, stratum_B))
    assert error(found, true_gradient(theta, reward_S)) < TOLERANCE
    own = pairs_gradient(theta, reward_S, lambda r: logit_B.sigmoid() + (r - logit_B.sigmoid()).mean())
    assert error(own, 0.5 * true_gradient(theta, reward_S)) < TOLERANCE


def test_fixed_shrinkage_of_critic_and_the_other_sample_is_unbiased():
    theta, reward_S = parameters(2), rewards(2)
    n0, value = 3.0, 0.6
    found = pairs_gradient(theta, reward_S, lambda r: (n0 * value + r.sum() - r) / (n0 + 1))
    assert error(found, true_gradient(theta, reward_S)) < TOLERANCE


def test_control_a_mean_that_includes_the_sample_scales_the_gradient_by_one_half():
    theta, reward_S = parameters(1), rewards(1)
    found, truth = pairs_gradient(theta, reward_S, lambda r: r.mean()), true_gradient(theta, reward_S)
    assert error(found, 0.5 * truth) < TOLERANCE  # 1 − 1/N with N = 2
    assert error(found, truth) > 1e-3


def test_neyman_sampling_with_the_matching_division_keeps_the_uniform_objective():
    """Two prompts, drawn with unequal probability q; each advantage divided by 2q. Without the division: another objective."""
    thetas = [parameters(s) for s in (3, 4)]
    reward = [rewards(s) for s in (3, 4)]
    q = (0.8, 0.2)
    for corrected in (True, False):
        worst = 0.0
        for theta, reward_S, share in zip(thetas, reward, q, strict=True):
            scale = 1 / (2 * share) if corrected else 1.0
            found = share * expected_gradient(theta, theta, scale * (reward_S - 0.3))
            worst = max(worst, error(found, 0.5 * true_gradient(theta, reward_S)))
        assert worst < TOLERANCE if corrected else worst > 1e-3


def test_control_gspo_off_policy_is_biased():
    theta, old, reward_S = parameters(0), parameters(100), rewards(0)
    # per-token scale: the geometric form averages over tokens, so compare the direction as well as the size
    found = expected_gradient(theta, old, reward_S, ratio="geometric", baseline_S=0.37)
    truth = true_gradient(theta, reward_S)
    assert error(found, truth) > 1e-3
    assert torch.nn.functional.cosine_similarity(found, truth, dim=0) < 0.99


def test_control_a_dropped_eos_is_biased():
    theta, reward_S = parameters(0), rewards(0)
    without_eos = MASK_ST.clone()
    for s, y in enumerate(RESPONSES):
        if y[-1] == 0:
            without_eos[s, len(y) - 1] = False
    found = expected_gradient(theta, theta, reward_S, baseline_S=0.2, mask=without_eos)
    assert error(found, true_gradient(theta, reward_S)) > 1e-3


def test_control_a_temperature_mismatch_is_biased():
    theta, reward_S = parameters(0), rewards(0)
    found = expected_gradient(theta, theta, reward_S, baseline_S=0.2, sample_temperature=0.6)
    assert error(found, true_gradient(theta, reward_S)) > 1e-3


def test_matched_temperature_is_exact():
    """With τ in sampling, old and current alike, the estimator is the gradient of the tempered policy's objective."""
    theta, reward_S, tau = parameters(0).requires_grad_(), rewards(0), 0.6
    truth = gradient((probabilities(theta, tau) * reward_S).sum(), theta)
    value, _ = surrogate(log_ratio(logps(theta, tau), logps(theta, tau).detach(), MASK_ST), reward_S - 0.2, clip=None)
    found = gradient((probabilities(theta, tau).detach() * value).sum(), theta)
    assert error(found, truth) < TOLERANCE


def test_reference_anchor_bounds_what_samples_from_the_reference_can_teach():
    """With samples from π_ref, clipping against π_ref caps the objective at (1+ε)·J(π_ref), whatever θ is."""
    reference, reward_S = parameters(0), rewards(0)
    p_ref = probabilities(reference)
    cap = 1.2 * float((p_ref * reward_S).sum())
    for scale in (1.0, 10.0, 100.0):
        theta = reference + scale * parameters(1)
        value, _ = surrogate(log_ratio(logps(theta), logps(reference), MASK_ST), reward_S, clip=(0.2, 0.2))
        assert float((p_ref * value).sum()) <= cap + 1e-12


def test_total_is_the_masked_sum():
    logp = logps(parameters(0))
    assert torch.isnan(logp).any()
    assert torch.isfinite(total(logp)).all()
