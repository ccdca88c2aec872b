"""GSPO-token, GMPO and SAPO on numbers worked by hand, and their gradients against the score vectors of an enumerated policy."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.objective.ratio import log_ratio
from sppo.objective.surrogate import geometric_mean, response_means, soft_gate, surrogate

from .tabular import MASK_ST, gradient, logps, parameters, probabilities, rewards, scores

WIDE = (-math.expm1(-0.4), math.expm1(0.4))


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64, requires_grad=True)


def test_gspo_tokens_ratio_is_the_mean_and_its_gradient_each_tokens_own():
    d_BT, mask_BT = row(0.3, -0.1, 9.0), torch.tensor([[True, True, False]])
    found = log_ratio(d_BT, torch.zeros_like(d_BT), mask_BT, "geometric-token")
    assert torch.allclose(found, row(0.1, 0.1, 0.0), atol=1e-12)
    found[0, 1].backward()
    assert d_BT.grad.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("advantage", "mean", "clipped"),
    [(2.0, (0.1 + 0.4 - 0.5) / 3, [False, True, False]), (-2.0, (0.1 + 0.6 - 0.4) / 3, [False, False, True])],
)
def test_gmpo_by_hand(advantage, mean, clipped):
    """Token ratios e^0.1, e^0.6 and e^-0.5; what lies beyond the response counts for nothing."""
    d_BT, mask_BT = row(0.1, 0.6, -0.5, 7.0), torch.tensor([[True, True, True, False]])
    value, cut = geometric_mean(torch.where(mask_BT, d_BT, 0.0), mask_BT, torch.tensor([[advantage]]), WIDE)
    whole = torch.where(mask_BT, response_means(value, mask_BT), 0.0).sum()
    assert float(whole.detach()) == pytest.approx(advantage * math.exp(mean), abs=1e-12)
    assert cut[0, :3].tolist() == clipped
    whole.backward()
    each = advantage * math.exp(mean) / 3
    assert d_BT.grad[0].tolist() == pytest.approx([0.0 if c else each for c in (*clipped, True)], abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 1.0, 2.0, 1.0),  # on policy: 2 / τ, and the gradient of r·Â
        (1.0, -1.0, -2 / 1.05, -1.0),
        (2.0, 1.0, 2.9242343, 1.5728955),  # 4·σ(1) = 4 × .7310586; 4 × .7310586 × .2689414 × 2
        (0.5, -1.0, -1.4159383, -0.4670699),  # 4/1.05·σ(−.525) = 3.8095238 × .3716838; 4 × .3716838 × .6283162 × .5
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_sapo_by_hand(ratio, advantage, value, slope):
    d = row(math.log(ratio))
    found, clipped = soft_gate(d, torch.tensor([[advantage]]), (1.0, 1.05))
    assert float(found.detach()) == pytest.approx(value, abs=1e-6)
    found.sum().backward()  # with respect to log r: r times the slope in r
    assert float(d.grad) == pytest.approx(slope, abs=1e-6)
    assert not clipped.any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratios_far_off_policy_stay_finite(advantage):
    for far in (1e4, -1e4):
        for dtype in (torch.float32, torch.float64):
            d = torch.tensor([[far, 0.1]], dtype=dtype, requires_grad=True)
            mask, a = torch.ones_like(d, dtype=torch.bool), torch.tensor([[advantage]])
            for value, _ in (geometric_mean(d, mask, a, WIDE), soft_gate(d, a, (1.0, 1.05))):
                (slope,) = torch.autograd.grad(value.sum(), d)
                assert torch.isfinite(value).all()
                assert torch.isfinite(slope).all()
                assert (slope * advantage >= 0).all()  # never turned


@pytest.mark.parametrize("name", ["gspo-token", "gmpo", "sapo"])
def test_autograd_equals_the_enumerated_gradient(name):
    """Σ_y π_old(y) · 1/T Σ_t weight_t · ∇log π(y_t), the weights written out (GSPO-token's eq. 17; GMPO's and SAPO's gradients)."""
    for seed in range(3):
        theta, old = (parameters(seed) + 0.3 * parameters(seed + 50)).requires_grad_(), parameters(seed)
        a_S1, length_S1 = (rewards(seed) - 0.4)[:, None], MASK_ST.sum(1, keepdim=True).double()
        d_ST = torch.where(MASK_ST, logps(theta) - logps(old), 0.0)
        if name == "gspo-token":
            value_ST, _ = surrogate(
                log_ratio(logps(theta), logps(old).detach(), MASK_ST, "geometric-token"), a_S1, (0.1, 0.1)
            )
            mean_S1 = (d_ST.sum(1, keepdim=True) / length_S1).detach()
            shut = ((a_S1 > 0) & (mean_S1 > math.log(1.1))) | ((a_S1 < 0) & (mean_S1 < math.log(0.9)))
            weight_ST = torch.where(shut, 0.0, mean_S1.exp() * a_S1).expand_as(d_ST)
        elif name == "gmpo":
            value_ST, cut_ST = geometric_mean(d_ST, MASK_ST, a_S1, (0.1, 0.1))
            held_ST = torch.where(a_S1 > 0, d_ST.clamp(max=math.log(1.1)), d_ST.clamp(min=math.log(0.9))).detach()
            weight_ST = torch.where(cut_ST, 0.0, (held_ST.sum(1, keepdim=True) / length_S1).exp() * a_S1)
            assert cut_ST.any()
        else:
            value_ST, _ = soft_gate(d_ST, a_S1, (1.0, 1.05))
            r_ST = d_ST.exp().detach()
            tau_S1 = 1.05 - 0.05 * (a_S1 > 0).double()
            p_ST = 1 / (1 + torch.exp(-tau_S1 * (r_ST - 1)))
            weight_ST = 4 * p_ST * (1 - p_ST) * r_ST * a_S1
        mean_S = torch.where(MASK_ST, response_means(value_ST, MASK_ST), 0.0).sum(1)
        found = gradient((probabilities(old) * mean_S).sum(), theta)
        score_STP = scores(theta.detach())
        each = probabilities(old)[:, None] / length_S1 * torch.where(MASK_ST, weight_ST, 0.0)
        truth = (each[..., None] * score_STP).sum((0, 1))
        assert float((found - truth.flatten()).abs().max()) < 1e-10
