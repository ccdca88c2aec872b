"""The optimal baseline: what it is fitted to, that it is the one of least variance, and that the gradient stays what it is."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.errors import RecipeError
from sppo.learning.batch import Batch
from sppo.learning.credit.loading import load_credit
from sppo.learning.credit.optimal_baseline import DOUBT, MEMORY, OptimalBaseline, squared_scores
from sppo.models.mlp import ControlPolicy
from sppo.objective.advantage import shifted
from sppo.recipe.config import Config

from ..conftest import STEPS, small_config, small_critic, small_policy
from ..exact.tabular import MASK_ST, logps, parameters, probabilities, rewards, scores


def batch_of(logp_BT, correct_B, mask_BT=None, **changes) -> Batch:
    """Just what squared scores are read from."""
    action_BT = torch.ones_like(logp_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    number = len(logp_BT)
    parts = {
        "rollouts": [None] * number,
        "ids_BL": torch.zeros(action_BT.shape, dtype=torch.long),
        "action_BL": action_BT,
        "length_B": action_BT.sum(1),
        "behaviour_logp_BT": logp_BT,
        "kept_BT": torch.zeros_like(logp_BT),
        "reward_B": correct_B,
        "correct_B": correct_B,
        "keep_B": torch.ones(number, dtype=torch.bool),
        "group_B": torch.arange(number),
    }
    return Batch(**parts | changes)


def odds_of(**objective) -> OptimalBaseline:
    return OptimalBaseline(
        small_policy(), small_config(**{f"objective.{k}": v for k, v in objective.items()}).objective
    )


def learn(odds: OptimalBaseline, batch: Batch, chance) -> None:
    odds.learn(batch, torch.as_tensor(chance).expand(len(batch)), batch.reward_B)


HALF, SURE = math.log(0.5), math.log(0.9)


def test_the_shift_by_hand():
    """Tokens of ½ and of 0.9: squared scores ¼ and 0.01. Right 0.26 and 0.02, wrong 0.5, all of chance 0.6; then a right one of 0.25."""
    odds = odds_of()
    assert odds.shift == 0.0
    learn(odds, batch_of(torch.tensor([[HALF, SURE], [SURE, SURE], [HALF, HALF]]), torch.tensor([1.0, 1.0, 0.0])), 0.6)
    doubt = DOUBT / 2 * 0.78 / 3
    assert odds.shift == pytest.approx(math.log((0.4 * 0.28 + doubt) / (0.6 * 0.5 + doubt)), rel=1e-5)
    learn(odds, batch_of(torch.tensor([[HALF]]), torch.tensor([1.0])), 0.2)
    assert odds.paired == pytest.approx([MEMORY * 0.3, MEMORY * 0.112 + 0.8 * 0.25], rel=1e-5)
    wrong, right = MEMORY * 0.5, MEMORY * 0.28 + 0.25
    assert odds.earned.sums == pytest.approx([wrong + right, right, right, 0.0, 0.0], rel=1e-5)
    assert odds.number == pytest.approx(MEMORY * 3 + 1)


def test_what_is_masked_or_no_number_does_not_count():
    odds, logp_BT = odds_of(), torch.full((3, 3), HALF)
    logp_BT[2, 0] = torch.nan
    keep_B, mask_BT = torch.tensor([True, False, True]), torch.tensor([[True, True, False], [True] * 3, [True] * 3])
    learn(odds, batch_of(logp_BT, torch.tensor([1.0, 0.0, 1.0]), mask_BT, keep_B=keep_B), 0.5)
    assert odds.paired == pytest.approx([0.0, 0.5 * 2 * 0.25])
    assert odds.number == 1


@pytest.mark.parametrize(
    ("objective", "divisor"),
    [({"ratio": "geometric"}, 9), ({"ratio": "family", "kappa": 0.5}, 3), ({"ratio": "token"}, 1),
     ({"ratio": "token", "average": "responses"}, 9)],
)  # fmt: skip
def test_a_ratio_that_divides_by_length_divides_the_score(objective, divisor):
    odds = odds_of(**objective)
    learn(odds, batch_of(torch.full((1, 3), HALF), torch.tensor([1.0])), 0.0)
    assert odds.earned.sums[1] == pytest.approx(3 * 0.25 / divisor)


def test_a_density_says_nothing_of_its_score():
    batch = batch_of(torch.tensor([[1.5, -2.0]]), torch.tensor([1.0]))
    for task, expected in (("pendulum", 1.0), ("precision-cartpole", (1 - math.exp(-2.0)) ** 2)):
        policy = ControlPolicy._made(task, 8, 1, 0, "mlp")
        assert float(squared_scores(policy, batch)[0, 1]) == pytest.approx(expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 3.0)])
def test_hard_problems_do_not_pass_for_wrong_responses(weights):
    """Long responses to what is solved once in ten, short ones to what is solved nine times: to each, right and wrong ones are alike, and so
    nothing must be shifted, whatever a curriculum makes each kind count."""
    right_B = torch.tensor([1.0] + [0.0] * 9 + [1.0] * 9 + [0.0])
    length_B, chance_B = torch.tensor([40] * 10 + [4] * 10), torch.tensor([0.1] * 10 + [0.9] * 10)
    weight_B = torch.tensor([weights[0]] * 10 + [weights[1]] * 10)
    odds = odds_of()
    mask_BT = torch.arange(40) < length_B[:, None]
    learn(odds, batch_of(torch.full((20, 40), HALF), right_B, mask_BT, weight_B=weight_B), chance_B)
    assert odds.shift == pytest.approx(0.0, abs=1e-5)
    assert odds.paired[0] > 0


def noise(probability_S, square_S, reward_S, baseline) -> float:
    return float((probability_S * square_S * (reward_S - baseline).square()).sum())


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_varies_least(seed, shaped, monkeypatch):
    """Every response of a small policy, as often as it comes. V is the true chance of success: the best prediction, not the best baseline.
    Shaped: right and wrong ones earn more or less, by how they look."""
    monkeypatch.setattr("sppo.learning.credit.optimal_baseline.DOUBT", 1e-9)
    theta, right_S = parameters(seed), rewards(seed)
    reward_S = 0.7 * right_S - 0.4 + torch.linspace(0, 0.3, len(right_S), dtype=torch.float64) if shaped else right_S
    probability_S = probabilities(theta)
    value = (probability_S * right_S).sum()
    odds = odds_of()
    batch = batch_of(logps(theta), right_S, MASK_ST, reward_B=reward_S, weight_B=1e6 * probability_S.sqrt())
    learn(odds, batch, value)
    shifted_value = odds.baseline(value[None])

    square_S = scores(theta).sum(1).square().sum(1)
    best = (probability_S * square_S * reward_S).sum() / (probability_S * square_S).sum()
    least, ours, plain = (noise(probability_S, square_S, reward_S, b) for b in (best, shifted_value, value))
    assert least <= ours < plain
    assert ours - least < 0.01 * (plain - least)


def test_shifted_odds():
    found = shifted(torch.tensor([0.0, 0.5, 0.9, 1.0, -0.2, 1.3]), math.log(1 / 9))
    assert found.tolist() == pytest.approx([0.0, 0.1, 0.5, 1.0, 0.0, 1.0])


def test_what_the_critic_missed_is_a_chance_too_where_rewards_are_not():
    """Eight failures that earn −1.5, V = ½: with what V missed the chance is 0, and nobody is blamed for what everybody earns."""
    policy = small_policy()
    keys = {"objective.algorithm": "sppo-centred", "objective.optimal_baseline": True}
    made = load_credit(small_config(**keys), policy, small_critic())
    made.model.logits = lambda tasks, tokens: torch.zeros(len(tasks))
    batch = batch_of(torch.full((8, 1), HALF), torch.zeros(8), reward_B=torch.full((8,), -1.5))
    batch.rollouts = [type("R", (), {"task": type("T", (), {"difficulty": None})})] * 8
    found = [float(made.advantage(batch, batch.reward_B)[0].abs().max()) for _ in range(60)]
    assert found[0] == pytest.approx(1.5)
    assert found[-1] < 0.2  # DOUBT of a response that earns 0 is left


@pytest.mark.parametrize("name", ["grpo", "ppo", "sppo-hybrid"])
def test_the_optimal_baseline_needs_a_chance_of_success(name):
    with pytest.raises(RecipeError, match=r"optimal_baseline shifts the odds of a chance, and baseline = .* is none"):
        Config.load(None, {"objective.algorithm": name, "objective.optimal_baseline": True})
    shifted = {"objective.algorithm": "sppo-centred", "objective.optimal_baseline": True, "reward.use": STEPS}
    assert not Config.load(None, shifted).as_algorithm(name, {}).objective.optimal_baseline
    with pytest.raises(RecipeError, match="optimal_baseline shifts the odds"):  # named, and contradicted
        Config.load(None, {"objective.algorithm": "sppo-optimal", "objective.baseline": "batch"})
    with pytest.raises(RecipeError, match="undoes the shift of optimal_baseline"):
        Config.load(None, {"objective.optimal_baseline": True, "objective.scale": "batch"})


@pytest.mark.parametrize(
    "keys",
    [{"objective.baseline": "centred"}, {"objective.baseline": "batch"}, {"objective.scale": "batch"}],
)  # fmt: skip
def test_no_other_key_changes_the_algorithm(keys):
    default = Config.load(None).objective.algorithm
    assert Config.load(None, keys).objective.algorithm == default
    named = Config.load(None, {**keys, "objective.algorithm": "sppo"}).objective
    assert (named.algorithm, named.optimal_baseline) == ("sppo", False)


def test_earlier_names_are_refused_with_the_new_ones():
    with pytest.raises(RecipeError, match=r"'objective\.stakes' has a new name: 'objective\.optimal_baseline'"):
        Config.load(None, {"objective.stakes": True})
    with pytest.raises(RecipeError, match="'sppo-stakes' has a new name: 'sppo-optimal'"):
        Config.load(None, {"objective.algorithm": "sppo-stakes"})


def test_it_learns_from_earlier_batches_only_and_is_kept():
    policy = small_policy()
    made = load_credit(small_config(**{"objective.algorithm": "sppo-optimal"}), policy, small_critic())
    made.model.logits = lambda tasks, tokens: torch.zeros(len(tasks))
    logp_BT = torch.log(torch.tensor([[0.9]] * 9 + [[0.1]]))
    batch = batch_of(logp_BT, torch.tensor([1.0] * 9 + [0.0]))
    batch.rollouts = [type("R", (), {"task": None})] * 10
    first, _, metrics = made.advantage(batch, batch.reward_B)
    assert first.tolist() == pytest.approx([0.5] * 9 + [-0.5])
    assert metrics["critic/shift"] == 0.0
    again = load_credit(small_config(**{"objective.algorithm": "sppo-optimal"}), policy, small_critic())
    state = made.state_dict()
    again.load_state_dict(state)
    assert again.optimal.shift == made.optimal.shift < -0.5
    baseline = float(made.optimal.baseline(torch.tensor([0.5])))
    second, value_B, _ = made.advantage(batch, batch.reward_B)
    assert second.tolist() == pytest.approx([1 - baseline] * 9 + [-baseline])
    assert value_B.tolist() == pytest.approx([0.5] * 10)  # what is measured and shown is V
    assert again.optimal.shift != made.optimal.shift  # the state was a copy
    del state["optimal"]  # of a version that knew none
    again.load_state_dict(state)


def test_partly_right_responses_are_paid_what_they_are():
    """R = c of any share: the baseline is the shifted chance itself, which R₁ and R₀ as means weighted by c and 1 − c would draw together."""
    odds = odds_of()
    learn(odds, batch_of(torch.full((5, 2), HALF), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])), 0.5)
    chance_B = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(odds.baseline(chance_B), shifted(chance_B, odds.shift))
