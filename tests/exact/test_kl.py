"""ALGORITHM §4.4: the KL table of `objective/kl.py`, row by row, against enumeration."""

from __future__ import annotations

import pytest

from sppo.objective.kl import kl_in_reward, sequence_kl
from sppo.objective.ratio import log_ratio
from sppo.objective.surrogate import surrogate

from .tabular import MASK_ST, gradient, logps, parameters, probabilities, rewards, total

TOLERANCE = 1e-10


def reverse_kl(theta, reference):
    """KL(π_θ ‖ π_ref)."""
    logp, ref = total(logps(theta)), total(logps(reference))
    return (logp.exp() * (logp - ref)).sum()


def forward_kl(theta, reference):
    """KL(π_ref ‖ π_θ)."""
    logp, ref = total(logps(theta)), total(logps(reference))
    return (ref.exp() * (ref - logp)).sum()


def loss_gradient(theta, reference, form):
    """E over samples from π_θ of ∇ of the estimator as a loss term."""
    kl_S = sequence_kl(logps(theta), logps(reference).detach(), MASK_ST, form)
    return gradient((probabilities(theta).detach() * kl_S).sum(), theta)


@pytest.mark.parametrize("seed", range(5))
def test_the_table(seed):
    theta, reference = parameters(seed).requires_grad_(), parameters(seed + 30)
    reverse, forward = gradient(reverse_kl(theta, reference), theta), gradient(forward_kl(theta, reference), theta)
    assert float(loss_gradient(theta, reference, "k1").abs().max()) < TOLERANCE  # zero: useless
    assert float((loss_gradient(theta, reference, "k2") - reverse).abs().max()) < TOLERANCE
    k3 = loss_gradient(theta, reference, "k3")
    assert float((k3 - forward).abs().max()) < TOLERANCE
    assert float((k3 - reverse).abs().max()) > 1e-3  # the other direction, really


@pytest.mark.parametrize("form", ["k1", "k3"])
def test_k1_and_k3_estimate_the_value_of_the_reverse_kl(form):
    theta, reference = parameters(0), parameters(30)
    expected = (probabilities(theta) * sequence_kl(logps(theta), logps(reference), MASK_ST, form)).sum()
    assert float((expected - reverse_kl(theta, reference)).abs()) < TOLERANCE


@pytest.mark.parametrize("seed", range(5))
def test_kl_in_the_reward_is_exact(seed):
    theta, reference, reward_S, beta = parameters(seed).requires_grad_(), parameters(seed + 30), rewards(seed), 0.3
    truth = gradient((probabilities(theta) * reward_S).sum() - beta * reverse_kl(theta, reference), theta)
    shaped_S = kl_in_reward(reward_S, logps(theta), logps(reference), MASK_ST, beta)
    assert not shaped_S.requires_grad
    value, _ = surrogate(log_ratio(logps(theta), logps(theta).detach(), MASK_ST), shaped_S - 0.2, clip=None)
    found = gradient((probabilities(theta).detach() * value).sum(), theta)
    assert float((found - truth).abs().max()) < TOLERANCE


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="k4"):
        sequence_kl(logps(parameters(0)), logps(parameters(1)), MASK_ST, "k4")
