"""The baseline by stakes: what it is fitted to, that it is the one of least variance, and that the gradient stays what it is."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.config import Config
from sppo.errors import RecipeError
from sppo.models.control import ControlPolicy
from sppo.objective.advantage import shifted
from sppo.training.batch import Batch
from sppo.training.credit import credit
from sppo.training.stakes import DOUBT, MEMORY, Odds, stakes

from ..conftest import small_config, small_critic, small_policy
from ..exact.tabular import MASK_ST, logps, parameters, probabilities, rewards, scores, true_gradient
from ..exact.test_estimators import error, expected_gradient


def batch_of(logp_BT, correct_B, mask_BT=None, **changes) -> Batch:
    """Just what stakes are read from."""
    length_B = torch.ones_like(logp_BT, dtype=torch.bool).sum(1) if mask_BT is None else mask_BT.sum(1)
    number = len(length_B)
    parts = {
        "rollouts": [None] * number,
        "ids_BL": torch.zeros(number, 1),
        "prompt_len_B": torch.ones(number),
        "response_len_B": length_B,
        "behaviour_logp_BT": logp_BT,
        "kept_BT": torch.zeros_like(logp_BT),
        "reward_B": correct_B,
        "correct_B": correct_B,
        "keep_B": torch.ones(number, dtype=torch.bool),
        "group_B": torch.arange(number),
        "share_B": torch.ones(number),
    }
    return Batch(**parts | changes)


def odds_of(**objective) -> Odds:
    return Odds(small_policy(), small_config(**{f"objective.{k}": v for k, v in objective.items()}).objective)


def test_the_shift_by_hand():
    """Tokens of ½ and of 0.9: stakes ¼ and 0.01. Right 0.26 and 0.02, wrong 0.5; then a batch of nothing but right ones, of 0.25."""
    odds = odds_of()
    assert odds.shift == 0.0
    half, sure = math.log(0.5), math.log(0.9)
    odds.learn(batch_of(torch.tensor([[half, sure], [sure, sure], [half, half]]), torch.tensor([1.0, 1.0, 0.0])))
    doubt = DOUBT * 0.78 / 3
    right, wrong = (0.28 + doubt) / (2 + DOUBT), (0.5 + doubt) / (1 + DOUBT)
    assert odds.shift == pytest.approx(math.log(right / wrong), rel=1e-5)
    odds.learn(batch_of(torch.tensor([[half]]), torch.tensor([1.0])))
    assert odds.stake == pytest.approx([MEMORY * 0.5, MEMORY * 0.28 + 0.25], rel=1e-5)
    assert odds.number == pytest.approx([MEMORY, 2 * MEMORY + 1])


def test_what_is_masked_does_not_count_and_a_corrected_advantage_counts_squared():
    odds, logp_BT, right_B = odds_of(), torch.full((2, 3), math.log(0.5)), torch.tensor([1.0, 0.0])
    keep_B, length_B = torch.tensor([True, False]), torch.tensor([2, 3])
    odds.learn(batch_of(logp_BT, right_B, keep_B=keep_B, response_len_B=length_B, weight_B=torch.tensor([3.0, 1.0])))
    assert odds.stake == pytest.approx([0.0, 9 * 2 * 0.25])
    assert odds.number == [0.0, 1.0]


@pytest.mark.parametrize(
    ("objective", "divisor"),
    [({"ratio": "geometric"}, 9), ({"ratio": "family", "kappa": 0.5}, 3), ({"ratio": "token"}, 1),
     ({"ratio": "token", "average": "responses"}, 9)],
)  # fmt: skip
def test_a_ratio_that_divides_by_length_divides_the_score(objective, divisor):
    odds = odds_of(**objective)
    odds.learn(batch_of(torch.full((1, 3), math.log(0.5)), torch.tensor([1.0])))
    assert odds.stake[1] == pytest.approx(3 * 0.25 / divisor)


def test_a_density_says_nothing_of_its_score():
    batch = batch_of(torch.tensor([[1.5, -2.0]]), torch.tensor([1.0]))
    for task, expected in (("pendulum", 1.0), ("precision-cartpole", (1 - math.exp(-2.0)) ** 2)):
        policy = ControlPolicy._made(task, 8, 1, 0, "mlp")
        assert float(stakes(policy, batch)[0, 1]) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_varies_less_and_is_the_same(seed):
    """Every response of a small policy, as often as it comes. V is the true chance of success: the best prediction, not the best baseline."""
    theta, reward_S = parameters(seed), rewards(seed)
    probability_S, logp_ST = probabilities(theta), logps(theta)
    odds = odds_of()
    odds.learn(batch_of(logp_ST, reward_S, MASK_ST, share_B=1e9 * probability_S))
    value = float((probability_S * reward_S).sum())
    staked = torch.tensor(math.log(value / (1 - value)) + odds.shift).sigmoid()
    found = expected_gradient(theta, theta, reward_S, baseline_S=staked)
    assert error(found, true_gradient(theta, reward_S)) < 1e-10

    square_S = scores(theta).sum(1).square().sum(1)
    best = (probability_S * square_S * reward_S).sum() / (probability_S * square_S).sum()

    def noise(baseline):
        return float((probability_S * square_S * (reward_S - baseline).square()).sum())

    assert noise(best) <= noise(staked) < noise(value)
    assert noise(staked) - noise(best) < 0.02 * (noise(value) - noise(best))


def test_shifted_odds():
    found = shifted(torch.tensor([0.0, 0.5, 0.9, 1.0, -0.2, 1.3]), math.log(1 / 9))
    assert found.tolist() == pytest.approx([0.0, 0.1, 0.5, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("name", ["grpo", "ppo", "sppo-hybrid"])
def test_stakes_want_a_chance_of_success(name):
    with pytest.raises(RecipeError, match="stakes shifts the odds of a chance of success"):
        Config.load(None, {"objective.algorithm": name, "objective.stakes": True})
    mine = Config.load(None, {"objective.algorithm": "sppo-centred", "objective.stakes": True})
    assert not mine.as_algorithm(name, {}).objective.stakes


def test_it_learns_from_earlier_batches_only_and_is_kept():
    policy = small_policy()
    made = credit(small_config(**{"objective.algorithm": "sppo-stakes"}), policy, small_critic())
    made.critic.start_at(0.5)
    made.model.logits = lambda tasks, tokens: torch.zeros(len(tasks))
    logp_BT = torch.log(torch.tensor([[0.9]] * 9 + [[0.1]]))
    batch = batch_of(logp_BT, torch.tensor([1.0] * 9 + [0.0]))
    batch.rollouts = [type("R", (), {"task": None})] * 10
    first, _, metrics = made.advantage(batch, batch.reward_B)
    assert first.tolist() == pytest.approx([0.5] * 9 + [-0.5])
    assert metrics["critic/shift"] == 0.0
    again = credit(small_config(**{"objective.algorithm": "sppo-stakes"}), policy, small_critic())
    state = made.state_dict()
    again.load_state_dict(state)
    assert again.odds.shift == made.odds.shift < -0.5
    baseline = 1 / (1 + math.exp(-made.odds.shift))
    second, value_B, _ = made.advantage(batch, batch.reward_B)
    assert second.tolist() == pytest.approx([1 - baseline] * 9 + [-baseline])
    assert value_B.tolist() == pytest.approx([0.5] * 10)  # what is measured and shown is V
    del state["odds"]  # of a version that knew none
    again.load_state_dict(state)
