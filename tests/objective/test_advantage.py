"""Advantages and baselines by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.objective.advantage import (
    STRATUM,
    centred_advantage,
    gae,
    group_deviation,
    group_mean,
    leave_one_out_mean,
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


def test_whitening_by_hand():
    mask = torch.tensor([True, True, True, False])
    found = whitened(torch.tensor([1.0, 2.0, 3.0, 99.0]), mask)
    assert torch.allclose(found, torch.tensor([-1.0, 0.0, 1.0, 0.0]), atol=1e-6)
