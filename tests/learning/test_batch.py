"""Judged rollouts as tensors: where actions lie, what belongs to each, and what is never read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sppo.learning.batch import micro_batches, pack
from sppo.types import Rollout, Task, Verdict

TASK, PAD = Task("t", "3+4?"), 0
TURNS = Rollout(
    TASK, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [(2, 4), (7, 8)], [-0.1, -0.2, -0.3], "stop", "",
    verdict=Verdict(1.0, "correct"), kept=[-0.01, -0.02, -0.03],
)  # fmt: skip
"""Two tokens, an observation of three, one token, and an observation of two that nobody answered."""
ANSWER = Rollout.answer(TASK, [20, 21, 22], [23, 24], [-0.4, -0.5], "stop", "", verdict=Verdict(0.0, "wrong"))


def test_actions_are_where_the_turns_are():
    batch = pack([TURNS, ANSWER], PAD)
    assert batch.ids_BL.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, PAD, PAD, PAD]]
    assert batch.action_BL.int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch.length_B.tolist() == [8, 5]
    assert (batch.prompt_len_B.tolist(), batch.response_len_B.tolist()) == ([2, 3], [3, 2])
    assert batch.tokens == 5
    for row, action, rollout in zip(batch.ids_BL, batch.action_BL, batch.rollouts, strict=True):
        assert row[action].tolist() == list(rollout.response_ids)


def test_what_the_engine_thought_of_actions_lies_side_by_side_whatever_was_observed_between():
    batch = pack([TURNS, ANSWER], PAD)
    assert torch.equal(batch.behaviour_logp_BT, torch.tensor([[-0.1, -0.2, -0.3], [-0.4, -0.5, 0.0]]))
    assert torch.equal(batch.kept_BT, torch.tensor([[-0.01, -0.02, -0.03], [0.0, 0.0, 0.0]]))
    assert batch.mask_BT.tolist() == [[True, True, True], [True, True, False]]


def test_an_observation_after_the_last_turn_is_not_read():
    cut = replace(TURNS, ids=TURNS.ids[:8])
    whole, without = pack([TURNS, ANSWER], PAD), pack([cut, ANSWER], PAD)
    assert torch.equal(whole.ids_BL, without.ids_BL)
    assert torch.equal(whole.action_BL, without.action_BL)
    assert torch.equal(whole.length_B, without.length_B)


def test_rows_are_no_wider_than_they_need():
    batch = pack([TURNS, ANSWER], PAD)
    ids, action = batch.rows(torch.tensor([1]))
    assert ids.tolist() == [[20, 21, 22, 23, 24]]
    assert action.tolist() == [[False, False, False, True, True]]
    assert batch.rows(torch.tensor([1, 0]))[0].shape == (2, 8)


@pytest.mark.parametrize("logps", [[-0.1, -0.2], [-0.1] * 4])
def test_a_log_probability_too_few_or_too_many_is_refused(logps):
    with pytest.raises(ValueError, match="every token that the policy wrote needs a log-probability"):
        pack([replace(TURNS, logps=logps, kept=())], PAD)


def test_a_rollout_without_a_verdict_is_refused():
    with pytest.raises(ValueError, match="every rollout needs a verdict"):
        pack([TURNS, replace(ANSWER, verdict=None)], PAD)


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_row_once_within_their_budget(packed):
    length_B = torch.tensor([8, 3, 5, 5, 40, 1, 7, 2])
    parts = micro_batches(torch.tensor([0, 1, 2, 4, 5, 6, 7]), length_B, 15, packed)
    assert sorted(torch.cat(parts).tolist()) == [0, 1, 2, 4, 5, 6, 7]
    for part in parts:
        size = length_B[part].sum() if packed else length_B[part].max() * len(part)
        assert size <= 15 or part.tolist() == [4]  # one row that is longer than the budget by itself
    assert len(parts) == (3 if packed else 4)
