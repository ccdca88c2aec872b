"""PPO's value loss: squared error and its clip on hand-worked numbers, in the learner, and what a saved critic's read-out means."""

from __future__ import annotations

import pytest
import torch

from sppo.errors import RecipeError
from sppo.learning.batch import pack
from sppo.learning.learner import Learner
from sppo.models.critic import Critic
from sppo.objective.advantage import gae
from sppo.objective.value import squared_error
from sppo.recipe.config import Config
from sppo.tasks.loading import load_tasks
from sppo.types import Verdict

from ..conftest import small_config, small_critic, small_policy, small_rollouts


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "error", "slope"),
    [
        (0.5, 0.2, 1.0, 0.0, 0.25, -1.0),  # (V − target)², 2(V − target)
        (0.5, 0.2, 1.0, 0.2, 0.36, 0.0),  # moved by .3 towards its target: counts as .4, and rests
        (0.3, 0.2, 1.0, 0.2, 0.49, -1.4),  # moved by .1: free
        (-0.1, 0.2, 1.0, 0.2, 1.21, -2.2),  # moved away: comes back
        (1.7, 0.2, 1.0, 0.2, 0.49, 1.4),  # past the target and further off than .4 is: (.7)² > (.6)²
        (1.5, 0.2, 1.0, 0.2, 0.36, 0.0),
    ],
)
def test_squared_error_and_its_clip_by_hand(value, old, target, clip, error, slope):
    v, o, g = (torch.tensor(x, dtype=torch.float64) for x in (value, old, target))
    v.requires_grad_()
    found = squared_error(v, g, o, clip)
    found.backward()
    assert found.item() == pytest.approx(error, abs=1e-12)
    assert v.grad.item() == pytest.approx(slope, abs=1e-12)


def a_learner(critic=None, **changes):
    policy, critic = small_policy(), critic or small_critic()
    config = small_config(objective__algorithm="ppo", training__micro_tokens=100, **changes).with_rates(1, 1)
    learner = Learner(policy, critic, None, config)
    rollouts = small_rollouts(policy, 8)
    rollouts = [r.judged(Verdict(float(i % 2), "correct" if i % 2 else "wrong")) for i, r in enumerate(rollouts)]
    return learner, pack(rollouts, policy.pad_id)


def critic_gradient(learner, batch):
    """What one call of learn() gives to its optimiser."""
    found, optimiser = [], learner.credit.optimiser
    optimiser.step = lambda *_: found.append(torch.cat([g.flatten().clone() for g in optimiser.gradients()])) or 0.0
    loss, _ = learner.credit.learn(batch, torch.arange(len(batch)), 1e-3)
    optimiser.zero_grad()
    return loss, found[0]


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_ppos_critic_learns_by_squared_error_from_lambda_returns(clip):
    """Loss and gradient against a plain version, in one pass; weights moved after the values were taken, so that the clip has something to do."""
    learner, batch = a_learner(objective__value_clip=clip)
    critic = learner.credit.model
    torch.manual_seed(3)
    torch.nn.init.normal_(critic.head.weight)
    value_BT = learner.credit.values(batch)
    assert float(value_BT.min()) < 0  # any number
    learner.advantage(batch)
    with torch.no_grad():
        critic.head.bias += 0.1
    loss, found = critic_gradient(learner, batch)

    target_BT = gae(batch.correct_B, value_BT, batch.mask_BT, 0.95) + value_BT
    assert not bool(((target_BT >= 0) & (target_BT <= 1))[batch.mask_BT].all())
    new_BT = critic(batch.ids_BL, batch.action_BL)
    total = []
    for b, t in enumerate(batch.response_len_B.tolist()):
        for v, old, wanted in zip(new_BT[b, :t], value_BT[b, :t], target_BT[b, :t], strict=True):
            error = (v - wanted) ** 2
            if clip:
                error = torch.maximum(error, (old + (v - old).clamp(-clip, clip) - wanted) ** 2)
            total.append(error)
    plain = torch.stack(total).mean()
    plain.backward()
    assert loss == pytest.approx(float(plain.detach()), rel=1e-5)
    wanted = torch.cat([p.grad.flatten() for p in critic.parameters()])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert float(wanted.abs().max()) > 1e-2


def test_squared_and_cross_entropy_start_from_the_same_values_and_part():
    found = []
    for loss in ("squared", "cross-entropy"):
        learner, batch = a_learner(objective__value_loss=loss)
        learner.credit.critic.start_at(0.3)
        advantage, value_B, metrics = learner.advantage(batch)
        assert torch.allclose(value_B, torch.full_like(value_B, 0.3), atol=1e-6)
        assert metrics["critic/value_mean"] == pytest.approx(0.3, abs=1e-6)
        found.append((advantage, critic_gradient(learner, batch)[1]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert not torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_a_saved_critic_says_what_its_read_out_means(tmp_path):
    learner, _ = a_learner()
    critic = learner.credit.critic
    critic.start_at(0.7)
    critic.save(tmp_path / "linear")
    again, _ = Critic.load(str(tmp_path / "linear"), dtype="float32", device=torch.device("cpu"), seed=0)
    assert again.linear
    tasks = [load_tasks("chain:steps=1")[0]]
    assert float(again.chances(tasks)) == pytest.approx(0.7, abs=1e-6)
    with torch.no_grad():
        again.head.bias.fill_(1.5)
    assert float(again.chances(tasks)) == 1.0
    assert a_learner(again)[0].credit.critic.linear
    with pytest.raises(RecipeError, match=r"set objective.value_loss = 'squared'"):
        a_learner(again, objective__value_loss="cross-entropy")
    with pytest.raises(RecipeError, match="trained by squared error"):
        Learner(small_policy(), again, None, small_config().with_rates(1, 1))

    small_critic().save(tmp_path / "chance")
    chance, _ = Critic.load(str(tmp_path / "chance"), dtype="float32", device=torch.device("cpu"), seed=0)
    assert float(chance.chances(tasks)) == 0.5
    with pytest.raises(RecipeError, match=r"set objective.value_loss = 'cross-entropy'"):
        a_learner(chance)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective.value_loss": "squared"}, "set value_loss = 'cross-entropy'"),
        ({"objective.algorithm": "sppo-hybrid", "objective.value_loss": "squared"}, "is of baseline = 'token-critic'"),
        ({"objective.algorithm": "ppo", "objective.value_loss": "cross-entropy", "objective.value_clip": 0.2}, "value_clip"),
    ],
)  # fmt: skip
def test_a_value_loss_that_nothing_reads_is_one_sentence(changes, sentence):
    with pytest.raises(RecipeError, match=sentence):
        Config.load(None, changes)


def test_another_algorithm_takes_no_value_loss_along():
    ppo = Config.load(None, {"objective.algorithm": "ppo", "objective.value_clip": 0.2})
    assert (ppo.objective.value_loss, ppo.objective.value_clip) == ("squared", 0.2)
    for name in ("sppo", "grpo"):
        other = ppo.as_algorithm(name, {})
        assert (other.objective.value_loss, other.objective.value_clip) == ("cross-entropy", 0.0)
