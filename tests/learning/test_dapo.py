"""DAPO as its paper has it: the over-long penalty (arXiv 2503.14476 eq. 13), and groups that agree leave the loss (eq. 11)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sppo.errors import RecipeError
from sppo.learning.batch import pack
from sppo.learning.learner import Learner
from sppo.learning.lessons import Lessons
from sppo.objective.advantage import overlong_penalty
from sppo.recipe.config import Config
from sppo.rollout.collect import truncation_rule
from sppo.types import Verdict

from ..conftest import graded, small_config, small_critic, small_policy, small_rollouts


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (80, 0.0), (81, 0.025), (90, 0.25), (99, 0.475), (100, 0.5)])
def test_the_penalty_by_hand(length, penalty):
    """A cache of 20 of 100 tokens; half of the paper's, whose scores are twice as far apart."""
    found = overlong_penalty(torch.tensor([length]), 100, 0.2)
    assert float(found) == pytest.approx(penalty, abs=1e-6)
    trl = pytest.importorskip("trl.rewards")
    (theirs,) = trl.get_soft_overlong_punishment(100, 20)(completion_ids=[[1] * length])
    assert float(found) == pytest.approx(-theirs / 2, abs=1e-6)


def a_config(name="dapo", **changes):
    base = {"objective__algorithm": name, "rollout__prompts": 4, "rollout__samples": 4, "training__minibatches": 1}
    return small_config(**base | {"objective__engine_correction": 0} | changes).with_rates(1, 1)


def a_learner(name="dapo", **changes):
    config = a_config(name, **changes)
    return Learner(small_policy(), small_critic() if config.critic_reads else None, None, config)


def rollouts_of(scores, samples=4):
    found = small_rollouts(small_policy(), len(scores) // samples, samples=samples)
    return [graded(r, s) for r, s in zip(found, scores, strict=True)]


def a_batch(scores, samples=4, keep=None):
    rollouts = rollouts_of(scores, samples)
    rollouts = [r for i, r in enumerate(rollouts) if keep is None or i // samples in keep]
    return pack(rollouts, small_policy().pad_id)


def update_gradient(learner, batch, lessons=None):
    """What one update gives to the policy's optimiser, and its metrics."""
    found, optimiser = [], learner.policy_optimiser
    optimiser.step = lambda *_: (
        found.append(torch.cat([g.flatten().clone() for g in optimiser.gradients()])) or optimiser.zero_grad() or 0.0
    )
    metrics = learner.update(batch, learner.advantage(batch)[0], 0, lessons)
    return found, metrics


# -- the penalty -----------------------------------------------------------------------------------------------------


def test_dapos_advantages_are_those_of_the_papers_scores():
    """Right is 1, wrong −1, and the penalty up to 1: the group's mean and deviation make the same of both."""
    batch = a_batch([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    found, _, metrics = a_learner(rollout__prompts=2).advantage(batch)
    length = batch.response_len_B.double()
    cache = 0.2 * 12
    punishment = -((length - (12 - cache)) / cache).clamp(0, 1)
    paper = (2 * batch.reward_B.double() - 1 + punishment).view(2, 4)
    wanted = ((paper - paper.mean(1, keepdim=True)) / paper.std(1, keepdim=True)).flatten()
    assert torch.allclose(found.double(), wanted, atol=1e-3)
    assert float(punishment.min()) < 0
    assert metrics["reward/overlong"] == pytest.approx(-float(punishment.mean()) / 2, abs=1e-6)


@pytest.mark.parametrize("rule", ["penalise", "mask", "keep"])
def test_a_response_that_was_cut_pays_in_full_and_one_that_is_masked_pays_nothing(rule):
    """penalise: 0 less ½, the lowest of all; mask: it leaves everything; keep: its verdict less ½."""
    rollouts = rollouts_of([1.0, 0.0, 1.0, 0.0], samples=4)
    room = max(len(r.response_ids) for r in rollouts)
    whole = next(i for i, r in enumerate(rollouts) if len(r.response_ids) == room)
    cut = replace(rollouts[whole], finish="length")
    rollouts[whole] = cut.judged(truncation_rule(cut, Verdict(1.0, "correct"), rule))
    batch = pack(rollouts, small_policy().pad_id)
    learner = a_learner(
        "rloo", rollout__prompts=1, rollout__max_tokens=room, rollout__overlong=0.2, objective__baseline="batch"
    )
    score = {"penalise": -0.5, "mask": None, "keep": 0.5}[rule]
    found = learner.advantage(batch)[0]
    reward = batch.reward_B - overlong_penalty(batch.response_len_B, room, 0.2)
    others = [float(reward[i]) for i in range(4) if i != whole]
    if score is None:
        assert not batch.keep_B[whole]
        rest = [i for i in range(4) if i != whole]
        assert float(found[rest[0]]) == pytest.approx(others[0] - sum(others[1:]) / 2, abs=1e-6)
    else:
        assert float(found[whole]) == pytest.approx(score - sum(others) / 3, abs=1e-6)
    assert float(batch.correct_B[whole]) == (0.0 if rule == "penalise" else 1.0)


@pytest.mark.parametrize("name", ["sppo", "ppo", "sppo-hybrid"])
def test_the_penalty_never_reaches_a_critic_of_chances(name):
    chance = {"objective__value_loss": "cross-entropy"} if name == "ppo" else {}
    batch = a_batch([1.0, 0.0, 0.0, 1.0], samples=1)
    found, advantages = [], []
    for share in (0.0, 1.0):
        learner = a_learner(name, rollout__samples=1, rollout__overlong=share, **chance)
        torch.manual_seed(3)
        torch.nn.init.normal_(learner.credit.model.head.weight)
        advantages.append(learner.advantage(batch)[0])
        optimiser = learner.credit.optimiser
        optimiser.step = lambda *_, o=optimiser: found.append(torch.cat([g.flatten() for g in o.gradients()])) or 0.0
        learner.credit.learn(batch, torch.arange(4), 1e-3)
    assert torch.equal(*found)
    assert not torch.allclose(*advantages)


def test_remax_holds_a_response_against_a_greedy_one_that_pays_too():
    rollouts, greedy = rollouts_of([1.0, 0.0], samples=1), rollouts_of([1.0, 1.0], samples=1)
    batch = pack([replace(r, greedy=g) for r, g in zip(rollouts, reversed(greedy), strict=True)], small_policy().pad_id)
    found = a_learner("remax", rollout__samples=1, rollout__overlong=1.0).advantage(batch)[0]
    mine, theirs = ([len(x.response_ids) for x in group] for group in (rollouts, reversed(greedy)))
    wanted = [s - 1 - (a - b) / 12 / 2 for s, a, b in zip([1.0, 0.0], mine, theirs, strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_long_episode_is_no_long_response():
    with pytest.raises(RecipeError, match="set it to 0"):
        Config.load(Path(__file__).parents[2] / "recipes/control-cartpole.toml", {"rollout.overlong": 0.2})


# -- groups that agree ---------------------------------------------------------------------------------------------------

MIXED = [1.0, 0.0, 0.0, 1.0]
SCORES = [*MIXED, *[1.0] * 4, 1.0, 1.0, 1.0, 0.0, *[0.0] * 4]  # the second and the fourth group agree


def test_groups_that_still_agree_leave_every_denominator():
    """The gradient is that of the other groups alone, penalties or none; GRPO, which resamples nothing, keeps them."""
    (found,), metrics = update_gradient(a_learner(), a_batch(SCORES))
    (alone,), _ = update_gradient(a_learner(), a_batch(SCORES, keep=(0, 2)))
    assert metrics["update/left_out"] == 8
    assert torch.allclose(found, alone, atol=1e-6)
    (grpo,), _ = update_gradient(a_learner("grpo"), a_batch(SCORES))
    (halved,), _ = update_gradient(a_learner("grpo"), a_batch(SCORES, keep=(0, 2)))
    assert torch.allclose(grpo, halved / 2, atol=1e-6)
    assert float(halved.abs().max()) > 1e-3


def test_a_group_of_which_one_sample_was_graded_says_nothing_either():
    batch = a_batch(SCORES)
    batch.keep_B[1:4] = False
    assert batch.flat_B.tolist() == [True] * 8 + [False] * 4 + [True] * 4


def test_where_all_groups_agree_nothing_is_learnt_but_lessons():
    flat = a_batch([*[1.0] * 4, *[0.0] * 4])
    (found,), metrics = update_gradient(a_learner(), flat)
    assert metrics["update/left_out"] == 8
    assert float(found.abs().max()) == 0
    lessons = Lessons(flat, [1.0] * 8, 8)
    (found,), _ = update_gradient(a_learner(), flat, lessons)
    assert float(found.abs().max()) > 1e-3


def test_a_critics_baseline_learns_from_groups_that_agree():
    learner = a_learner("sppo-centred", rollout__resample=1, training__minibatches=2)
    found, metrics = update_gradient(learner, a_batch(SCORES))
    assert len(found) == 2
    assert "update/left_out" not in metrics
