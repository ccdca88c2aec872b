"""Diagnostics against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.evaluation.intervals import accuracy_interval, pass_at_k, wilson
from sppo.learning.optimizer import MasterAdamW, learning_rate
from sppo.objective.diagnostics import (
    auc,
    brier,
    effective_sample_size,
    expected_calibration_error,
    explained_variance,
    explained_variance_ceiling,
)


def t(*values):
    return torch.tensor(values)


def test_effective_sample_size():
    assert math.isclose(effective_sample_size(torch.zeros(7)), 1.0, rel_tol=1e-6)
    # weights 1, 1, 2: (4)² / (3 · 6) = 8/9
    assert math.isclose(effective_sample_size(t(0.0, 0.0, math.log(2))), 16 / 18, rel_tol=1e-6)
    assert math.isclose(effective_sample_size(t(1000.0, 0.0, -1000.0)), 1 / 3, rel_tol=1e-6)


def test_explained_variance():
    reward = t(0.0, 1.0, 0.0, 1.0)
    assert explained_variance(reward, reward) == 1.0
    assert explained_variance(reward, torch.full((4,), 0.3)) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(reward, 1 - reward) == pytest.approx(-3.0)
    assert explained_variance(torch.ones(4), torch.rand(4)) is None


def test_the_ceiling_is_what_a_perfect_critic_reaches():
    """Success rates 0.1 and 0.9, half each: Var(p) = 0.16, Var(R) = 0.25, ceiling 0.64; the estimate converges there."""
    generator = torch.Generator().manual_seed(0)
    p = torch.where(torch.rand(20_000, 1, generator=generator) < 0.5, 0.1, 0.9)
    reward = (torch.rand(20_000, 2, generator=generator) < p).float()
    assert explained_variance_ceiling(reward) == pytest.approx(0.64, abs=0.02)
    assert explained_variance(reward[:, 0], p[:, 0]) == pytest.approx(0.64, abs=0.02)
    assert explained_variance_ceiling(reward[:, :1]) is None


def test_brier_ece_auc():
    reward, value = t(1.0, 0.0, 1.0, 0.0), t(0.9, 0.1, 0.6, 0.6)
    assert brier(reward, value) == pytest.approx((0.01 + 0.01 + 0.16 + 0.36) / 4)
    # bins: {0.9: gap .1}, {0.1: gap .1}, {0.6, 0.6: gap .2 in sum} → (.1 + .1 + .2) / 4
    assert expected_calibration_error(reward, value) == pytest.approx(0.1)
    assert auc(reward, value) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert auc(torch.ones(3), torch.rand(3)) is None
    assert expected_calibration_error(t(1.0), t(1.0)) == 0.0


def test_wilson_on_textbook_values():
    low, high = wilson(0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(0, 0) == (0.0, 1.0)


def test_intervals_of_several_samples_know_that_they_are_not_independent():
    same = accuracy_interval([0.0, 1.0] * 50, 8)  # each problem always or never solved: 8 samples tell no more than one
    assert same[1:] == pytest.approx(wilson(50, 100), abs=5e-3)
    spread = accuracy_interval([0.5] * 100, 8)
    assert spread[2] - spread[1] < 0.5 * (same[2] - same[1])


def test_pass_at_k():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0


def test_learning_rates():
    assert learning_rate(1.0, 0, 10, warmup=4, schedule="constant") == 0.25
    assert learning_rate(1.0, 9, 10, warmup=4, schedule="constant") == 1.0
    assert learning_rate(1.0, 5, 10, warmup=0, schedule="linear") == 0.5
    assert learning_rate(1.0, 5, 10, warmup=0, schedule="cosine") == pytest.approx(0.5)


def test_master_weights_keep_what_bfloat16_would_lose():
    """A hundred updates of 1e-5 on a weight of 1: plain bfloat16 never moves, the master arrives."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimiser = MasterAdamW([p], betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimiser.step(1e-5, 1e9)
    assert torch.allclose(optimiser.masters[0], torch.full((4,), 0.999), atol=1e-5)
    for _ in range(700):
        p.grad = torch.ones_like(p)
        optimiser.step(1e-5, 1e9)
    assert float(p[0].detach()) < 1.0


def test_a_gradient_that_is_not_finite_updates_nothing():
    p = torch.nn.Parameter(torch.ones(4))
    optimiser = MasterAdamW([p], betas=(0.9, 0.999), weight_decay=0.0)
    p.grad = torch.full((4,), float("nan"))
    assert math.isnan(optimiser.step(0.1, 1.0))
    assert torch.equal(p.detach(), torch.ones(4))
