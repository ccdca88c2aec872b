"""The entropy bonus against enumeration: each state's own entropy along the responses sampled, by the score function."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.objective.loss import ENTROPY_CAP, Scored, entropy_bonus, policy_loss
from sppo.recipe.objective import ObjectiveSection

from .tabular import INDEX, LIMIT, MASK_ST, PREFIXES, RESPONSES, gradient, logps, parameters, probabilities

TOLERANCE = 1e-10
COUNT = len(RESPONSES)


def entropies(theta):
    """H of the state before each token, [31, T]; NaN beyond each response, as hostile padding."""
    logp = torch.log_softmax(theta.detach(), -1)
    table = -(logp.exp() * logp).sum(-1)
    rows = [[table[INDEX[y[:t]]] if t < len(y) else math.nan for t in range(LIMIT)] for y in RESPONSES]
    return torch.tensor(rows, dtype=theta.dtype)


def scored(theta, sampled):
    behaviour = logps(sampled).detach()
    weight_b = COUNT * probabilities(sampled).detach()
    return Scored(logps(theta), behaviour, behaviour, MASK_ST, weight_b=weight_b, entropy_bT=entropies(theta))


def bonus(theta, sampled=None, **objective):
    """E over samples of the bonus in the learner's own loss, and of its gradient; responses (and their tokens) are summed."""
    x = scored(theta, theta if sampled is None else sampled)
    o = ObjectiveSection(entropy_bonus=1.0, engine_correction=0, **objective)
    value = -policy_loss(x, torch.zeros(COUNT, dtype=theta.dtype), o, sequences=COUNT, divisor=COUNT).value
    return float(value.detach()), gradient(value, theta)


def along_the_samples(theta, sampled):
    """Σ_s d(s)·H(π_θ(·|s)), d(s) the chance that the policy that sampled writes the prefix s."""
    share_S = probabilities(sampled).detach()
    d_P = torch.zeros(len(PREFIXES), dtype=theta.dtype)
    for s, y in enumerate(RESPONSES):
        for t in range(len(y)):
            d_P[INDEX[y[:t]]] += share_S[s]
    logp = torch.log_softmax(theta, -1)
    return -(d_P * (logp.exp() * logp).sum(-1)).sum()


SUMS = [{"ratio": "token", "average": "constant"}, {"ratio": "token"}, {"ratio": "sequence"}]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("objective", SUMS)
def test_value_and_expected_gradient_are_those_of_each_states_entropy(seed, objective):
    theta = parameters(seed).requires_grad_()
    truth = along_the_samples(theta, theta)
    value, found = bonus(theta, **objective)
    assert abs(value - float(truth.detach())) < TOLERANCE
    assert float((found - gradient(truth, theta)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
def test_later_updates_have_the_same_expectation_over_the_states_that_were_sampled(seed):
    theta, old = parameters(seed).requires_grad_(), parameters(seed) + 0.1 * parameters(seed + 50)
    with torch.no_grad():
        assert float(torch.where(MASK_ST, logps(theta) - logps(old), 0.0).max()) < math.log(ENTROPY_CAP)
    found = bonus(theta, old, ratio="sequence")[1]
    assert float((found - gradient(along_the_samples(theta, old), theta)).abs().max()) < TOLERANCE


def test_a_far_token_counts_the_cap_at_most():
    theta, old = parameters(0).requires_grad_(), parameters(0) + 2 * parameters(50)
    assert (
        float((bonus(theta, old, ratio="sequence")[1] - gradient(along_the_samples(theta, old), theta)).abs().max())
        > 1e-3
    )
    x = scored(theta, old)
    ratio_ST = (logps(theta) - logps(old)).exp().detach()
    factor_ST = -gradient_by_token(x)
    expected = ratio_ST.clamp(max=ENTROPY_CAP) * (logps(theta).detach() + entropies(theta))
    assert torch.allclose(factor_ST[MASK_ST], expected[MASK_ST], atol=1e-12)
    assert float(ratio_ST[MASK_ST].max()) > ENTROPY_CAP
    assert float(factor_ST[~MASK_ST].abs().max()) == 0.0  # what lies beyond a response is NaN above


def gradient_by_token(x):
    """∂(sum of bonuses)/∂ log π of each token."""
    logp = x.logp_bT.detach().requires_grad_()
    of = Scored(logp, x.old_bT, x.behaviour_bT, x.mask_bT, entropy_bT=x.entropy_bT)
    return torch.autograd.grad(entropy_bonus(of).sum(), logp)[0]


def test_a_responses_mean_weighs_states_by_what_was_written_later():
    """1/T depends on the token, so that this is no entropy's gradient exactly."""
    theta = parameters(0).requires_grad_()
    _, found = bonus(theta, ratio="token", average="responses")
    _, geometric = bonus(theta, ratio="geometric")
    assert float((found - geometric).abs().max()) < TOLERANCE  # both spread a response's token terms by 1/T
    assert float((found - gradient(along_the_samples(theta, theta), theta)).abs().max()) > 1e-3


def test_it_is_not_the_entropy_of_whole_responses():
    """Whose gradient also credits a token with the entropy of the states that it leads to."""
    theta = parameters(0).requires_grad_()
    p = probabilities(theta)
    whole = -(p * p.log()).sum()
    value, found = bonus(theta, ratio="sequence")
    assert abs(value - float(whole.detach())) < TOLERANCE  # by the chain rule
    assert float((found - gradient(whole, theta)).abs().max()) > 1e-3
