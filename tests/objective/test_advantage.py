"""Advantages and baselines by hand, and what is remembered of a prompt."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.learning.history import History
from sppo.objective.advantage import (
    STRATUM,
    centred_advantage,
    gae,
    group_deviation,
    group_mean,
    leave_one_out_mean,
    shrunk_value,
    strata,
    whitened,
)


def test_groups_by_hand():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    group, keep = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([True, True, True, True, False])
    assert torch.allclose(group_mean(reward, keep, group), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 1.0]))
    # deviations 2/3, 1/3, 1/3: squares sum to 6/9, over N − 1 = 2
    assert torch.allclose(group_deviation(reward, keep, group)[:3], torch.full((3,), math.sqrt(1 / 3)))
    assert group_deviation(reward, keep, group)[3] == 0.0
    assert torch.allclose(leave_one_out_mean(reward, keep, group), torch.tensor([0.0, 0.5, 0.5, 0.0, 1.0]))
    assert torch.allclose(leave_one_out_mean(reward, keep), torch.tensor([1 / 3, 2 / 3, 2 / 3, 1 / 3, 0.5]))


def test_a_centred_advantage_by_hand():
    reward, value = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0.6, 0.6, 0.6, 0.5, 0.9])
    stratum, keep = torch.tensor([0, 0, 0, 1, 0]), torch.tensor([True, True, True, True, False])
    # what is left of the first three: 0.4, -0.6, -0.6; less the mean of the other two. One by itself is compared with its V alone
    found = centred_advantage(reward, value.logit(), keep, stratum)
    assert torch.allclose(found[:4], torch.tensor([1.0, -0.5, -0.5, 0.5]))


def test_strata_are_of_one_difficulty_where_there_are_enough_of_it():
    difficulty = [8.0] * STRATUM + [5.0] * (STRATUM - 1) + [None] * STRATUM + [2.0] * (STRATUM + 1)
    n = len(difficulty)
    kept, groups = torch.ones(n, dtype=torch.bool), torch.arange(n)
    assert strata(difficulty, kept, groups).tolist() == [1] * STRATUM + [0] * (2 * STRATUM - 1) + [2] * (STRATUM + 1)
    kept[0] = False  # one problem too few
    assert set(strata(difficulty, kept, groups)[:STRATUM].tolist()) == {0}
    assert set(strata([8.0] * 32, torch.ones(32), torch.arange(32) // 8).tolist()) == {
        0
    }  # four problems of eight samples


def test_gae_by_hand():
    value, mask = (
        torch.tensor([[0.5, 0.6, 0.8], [0.2, 9.0, float("nan")]]),
        torch.tensor([[True] * 3, [True, False, False]]),
    )
    # δ = (0.1, 0.2, 1 − 0.8); with λ = ½: 0.2, 0.2 + 0.1, 0.1 + 0.15
    found = gae(torch.tensor([1.0, 0.0]), value, mask, 0.5)
    assert torch.allclose(found, torch.tensor([[0.25, 0.3, 0.2], [-0.2, 0.0, 0.0]]))
    # λ = 1: R − V(s_t) at every token, λ = 0: the next value less this one
    assert torch.allclose(gae(torch.tensor([1.0, 0.0]), value, mask, 1.0)[0], torch.tensor([0.5, 0.4, 0.2]))
    assert torch.allclose(gae(torch.tensor([1.0, 0.0]), value, mask, 0.0)[0], torch.tensor([0.1, 0.2, 0.2]))


@pytest.mark.parametrize("length", [1, 7, 40])
def test_a_constant_critic_scales_the_first_tokens_signal_by_lambda_to_the_length(length):
    mask = torch.ones(1, length, dtype=torch.bool)
    found = gae(torch.tensor([1.0], dtype=torch.float64), torch.full((1, length), 0.3, dtype=torch.float64), mask, 0.95)
    assert math.isclose(float(found[0, 0]), 0.95 ** (length - 1) * float(found[0, -1]), rel_tol=1e-12)
    assert math.isclose(float(found[0, -1]), 0.7, rel_tol=1e-12)


def test_whitening_and_shrinkage_by_hand():
    mask = torch.tensor([True, True, True, False])
    found = whitened(torch.tensor([1.0, 2.0, 3.0, 99.0]), mask)
    assert torch.allclose(found, torch.tensor([-1.0, 0.0, 1.0, 0.0]), atol=1e-6)
    # (3·0.6 + 1) / (3 + 2)
    assert torch.allclose(
        shrunk_value(torch.tensor([0.6]), 3.0, torch.tensor([1.0]), torch.tensor([2.0])), torch.tensor([0.56])
    )


def test_history_discounts_by_the_policys_movement():
    history = History(half_life=2.0)
    history.observe(["a"], [[1.0, 0.0]], [0.5])
    assert history.past("a") == (2.0, 1.0)
    history.clock += 2.0  # one half-life
    assert history.past("a") == (1.0, 0.5)
    history.observe(["a"], [[1.0]], [0.5])
    assert history.past("a") == (2.0, 1.5)
    assert history.past("b") == (0.0, 0.0)


def test_the_strength_of_the_critic_is_estimated_from_pairs():
    """Success rates from Beta(n0·V, n0·(1−V)) about V: the estimate finds n0; a perfect critic is worth the most."""
    rng = torch.Generator().manual_seed(0)
    for n0 in (2.0, 6.0):
        history, values = History(1e9), 0.2 + 0.6 * torch.rand(4000, generator=rng)
        torch.manual_seed(1)
        rate = torch.distributions.Beta(n0 * values, n0 * (1 - values)).sample()
        rewards = (torch.rand(4000, 2, generator=rng) < rate[:, None]).double()
        history.observe([str(i) for i in range(4000)], rewards.tolist(), values.tolist())
        assert history.strength == pytest.approx(n0, rel=0.15)
    exact = History(1e9)
    rewards = (torch.rand(4000, 2, generator=rng) < values[:, None]).double()
    exact.observe([str(i) for i in range(4000)], rewards.tolist(), values.tolist())
    assert exact.strength > 50


def test_history_lowers_the_baselines_error_with_every_visit():
    """ALGORITHM §3: mean squared error to the true success rate, of V alone, with one past visit, with six."""
    rng = torch.Generator().manual_seed(0)
    rate = torch.rand(5000, generator=rng)
    value = (0.35 * rate + 0.325 + 0.2 * torch.randn(5000, generator=rng)).clamp(0.05, 0.95)
    names = [str(i) for i in range(5000)]
    history, errors = History(1e9), {}
    for visit in range(7):
        past = torch.tensor([history.past(n) for n in names])
        guess = shrunk_value(value, history.strength, past[:, 1], past[:, 0])
        errors[visit] = float((guess - rate).square().mean())
        rewards = (torch.rand(5000, generator=rng) < rate).double()
        history.observe(names, rewards[:, None].tolist(), value.tolist())
    assert sorted(errors.values(), reverse=True) == list(errors.values())
    assert errors[6] < 0.35 * errors[0]
