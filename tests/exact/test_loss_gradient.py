"""Autograd's gradient of the loss code equals the enumerated one, for every ratio, anchor and clip."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sppo.objective.ratio import log_ratio
from sppo.objective.surrogate import surrogate

from .tabular import MASK_ST, gradient, logps, parameters, probabilities, rewards, scores

RATIOS = [("sequence", 0.0), ("geometric", 1.0), ("family", 0.5), ("token", None)]


def by_hand(theta, old, anchor, advantage_S, ratio, kappa, clip, dual):
    """Σ_y π_old(y) ∇ value(y), written with the score vectors and no autograd."""
    theta = theta.detach()
    score_STP = scores(theta)
    length_S = MASK_ST.sum(1).double()
    difference_ST = torch.where(MASK_ST, logps(theta) - logps(anchor), 0.0)
    if ratio == "token":
        l_ST, a_ST, direction = difference_ST, advantage_S[:, None].expand(MASK_ST.shape), score_STP
        keep = MASK_ST
    else:
        scale_S = length_S**-kappa
        l_ST = (difference_ST.sum(1) * scale_S)[:, None]
        a_ST = advantage_S[:, None]
        direction = (score_STP.sum(1) * scale_S[:, None])[:, None]
        keep = torch.ones_like(l_ST, dtype=torch.bool)
    gone = torch.zeros_like(l_ST, dtype=torch.bool)
    if clip:
        gone |= (a_ST > 0) & (l_ST > math.log(1 + clip[1]))
        gone |= (a_ST < 0) & (l_ST < math.log(1 - clip[0]))
    if dual:
        gone |= (a_ST < 0) & (l_ST > math.log(dual))
    weight_ST = torch.where(gone | ~keep, 0.0, l_ST.exp() * a_ST)
    return (probabilities(old)[:, None, None] * weight_ST[..., None] * direction).sum((0, 1)), gone


@pytest.mark.parametrize(("ratio", "kappa"), RATIOS)
@pytest.mark.parametrize("anchor", ["behaviour", "reference"])
@pytest.mark.parametrize(("clip", "dual"), [(None, None), ((0.2, 0.2), None), ((0.1, 0.3), 3.0)])
def test_autograd_equals_the_enumerated_gradient(ratio, kappa, anchor, clip, dual):
    for seed in range(3):
        theta = (parameters(seed) + 0.3 * parameters(seed + 50)).requires_grad_()
        old, reference = parameters(seed), parameters(seed) + 0.5 * parameters(seed + 70)
        base = old if anchor == "behaviour" else reference
        advantage_S = rewards(seed) - 0.4
        log_r = log_ratio(logps(theta), logps(base).detach(), MASK_ST, ratio, kappa if kappa is not None else 0.5)
        value, clipped = surrogate(log_r, advantage_S[:, None] if ratio == "token" else advantage_S, clip, dual)
        value = torch.where(MASK_ST, value, 0.0).sum(1) if ratio == "token" else value
        found = gradient((probabilities(old) * value).sum(), theta)
        truth, gone = by_hand(theta, old, base, advantage_S, ratio, kappa, clip, dual)
        assert float((found - truth.detach().flatten()).abs().max()) < 1e-10
        if ratio != "token":
            assert torch.equal(clipped, gone[:, 0])
        if clip:
            assert bool(clipped.any()), "the test must exercise clipping"


def test_kappa_family_contains_sequence_and_geometric():
    theta, old = parameters(0), parameters(1)
    for name, kappa in (("sequence", 0.0), ("geometric", 1.0)):
        a = log_ratio(logps(theta), logps(old), MASK_ST, name)
        assert torch.equal(a, log_ratio(logps(theta), logps(old), MASK_ST, "family", kappa))


@pytest.mark.parametrize(
    ("log_r", "advantage", "value", "clipped"),
    [
        (math.log(1.1), 1.0, 1.1, False),
        (math.log(1.3), 1.0, 1.2, True),  # above, good: bounded
        (math.log(1.3), -1.0, -1.3, False),  # above, bad: must be pushed back
        (math.log(0.7), 1.0, 0.7, False),
        (math.log(0.7), -1.0, -0.8, True),  # below, bad: enough
        (math.log(5.0), -1.0, -3.0, True),  # dual clip
        (500.0, 1.0, 1.2, True),
        (500.0, -1.0, -3.0, True),
        (-500.0, 1.0, 0.0, False),
        (0.3, 0.0, 0.0, False),
    ],
)
def test_surrogate_on_numbers_worked_by_hand(log_r, advantage, value, clipped):
    x = torch.tensor([log_r], requires_grad=True)
    got, was_clipped = surrogate(x, torch.tensor([advantage]), (0.2, 0.2), 3.0)
    assert math.isclose(float(got.detach()), value, rel_tol=1e-6, abs_tol=1e-12)
    assert bool(was_clipped) is clipped
    got.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (float(x.grad) == 0.0) or not clipped


def test_surrogate_equals_the_textbook_formula():
    log_r = torch.linspace(-1.5, 1.0, 101, dtype=torch.float64)
    for a, (low, high) in itertools.product((-2.0, 0.5), ((0.2, 0.2), (0.1, 0.28))):
        r = log_r.exp()
        textbook = torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)
        got, _ = surrogate(log_r, torch.tensor(a, dtype=torch.float64), (low, high), None)
        assert torch.allclose(got, textbook, atol=1e-12)


def test_without_a_dual_clip_a_huge_ratio_stays_finite():
    x = torch.tensor([1e4], requires_grad=True)
    value, _ = surrogate(x, torch.tensor([-1.0]), (0.2, 0.2), None)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(x.grad).all()
