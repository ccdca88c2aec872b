"""Control tasks: what counts as success, log-probabilities of actions, and the whole loop on them, resumed to the same bits."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("gymnasium")

from sppo.environments.base import Reply
from sppo.environments.control import KINDS, ControlTask, episode
from sppo.errors import RecipeError
from sppo.models.mlp import ControlCritic, ControlPolicy
from sppo.models.mlp_episodes import episodes
from sppo.models.mlp_scorer import PROBE, States
from sppo.recipe.config import Config
from sppo.rollout.control import ControlEngine, build
from sppo.rollout.engine import Sampling
from sppo.run.loop import train
from sppo.run.models import Parts, load_policy
from sppo.run.run import Run
from sppo.tasks.loading import load_pair

from ..conftest import logps_of, small_policy

CPU = torch.device("cpu")


def a_policy(task="precision-cartpole", seed=0, teaching="demonstrations=4,skill=0.01", hidden=16):
    return ControlPolicy.load(f"mlp:{task},hidden={hidden},{teaching}", dtype="auto", device=CPU, seed=seed)[0]


# -- the tasks -----------------------------------------------------------------------------------------------------------


def test_success_is_what_the_paper_says():
    degree = math.radians(1)
    cart = KINDS["precision-cartpole"].success
    assert cart(None, np.array([0, 0, 0.4 * degree, 0]), False)
    assert not cart(None, np.array([0, 0, 0.6 * degree, 0]), False)
    assert not cart(None, np.array([0, 0, 0.0, 0]), True)  # it fell, or left the track
    assert KINDS["mountain-car"].success(None, np.array([0.46, 0.0]), False)
    assert not KINDS["mountain-car"].success(None, np.array([0.44, 0.0]), False)
    lander = KINDS["lunar-lander"].success
    assert lander(None, np.array([0.3, 0, 0, 0, 0, 0, 1.0, 1.0]), True)
    assert not lander(None, np.array([0.3, 0, 0, 0, 0, 0, 1.0, 0.0]), True)
    assert not lander(None, np.array([0.5, 0, 0, 0, 0, 0, 1.0, 1.0]), True)
    assert KINDS["pendulum"].success(None, np.array([0.81, 0, 0]), False)
    assert not KINDS["pendulum"].success(None, np.array([0.79, 0, 0]), False)
    for x, fallen in ((1.1, False), (1.1, True), (0.9, False)):
        there = SimpleNamespace(data=SimpleNamespace(qpos=[x]))
        assert KINDS["hopper"].success(there, np.zeros(11), fallen) == (x > 1 and not fallen)


@pytest.mark.parametrize("name", list(KINDS))
def test_teachers_succeed_where_chance_does_not(name):
    rates = []
    for slip in (0.02 if name == "hopper" else 0.1, 1.0):
        env, rng, solved = ControlTask(name), np.random.default_rng(0), 0
        for start in range(6):
            env.reset(episode(name, start))
            for _ in range(env.kind.horizon):
                if env.step(Reply(action=env.taught(rng, slip))).done:
                    break
            solved += env.success()
        rates.append(solved / 6)
    assert rates[0] > rates[1]
    assert rates[0] >= 0.3


def test_a_hopper_that_falls_ends_there():
    env = ControlTask("hopper")
    env.reset(episode("hopper", 0))
    steps = 1
    while not env.step(Reply(action=np.ones(3, dtype=np.float32))).done:
        steps += 1
    assert steps < 100
    assert not env.success()


def test_the_same_start_and_actions_give_the_same_episode():
    env, other = ControlTask("mountain-car"), ControlTask("mountain-car")
    other.reset(episode("mountain-car", 9))
    assert np.array_equal(env.reset(episode("mountain-car", 4)).values, other.reset(episode("mountain-car", 4)).values)
    for action in (0, 2, 1, 2):
        assert np.array_equal(*(e.step(Reply(action=np.array([action]))).values for e in (env, other)))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [("control:cartpole", "did you mean 'precision-cartpole'"), ("control:pendulum,split=x", "leaves nothing to hold out"), ("control", "not a control task")],
)  # fmt: skip
def test_a_wrong_task_is_one_sentence(spec, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load_pair(spec, None, "")


def test_cloning_at_a_rate_and_looked_at_so_often():
    said = []
    for teaching in ("look=7", "look=7,rate=1e-3", "look=21"):
        name = f"mlp:precision-cartpole,hidden=16,demonstrations=4,skill=0.01,{teaching}"
        _, stated = ControlPolicy.load(name, dtype="auto", device=CPU, seed=0)
        updates = re.search(r"; (\d+) updates", stated)
        assert updates is not None
        said.append(int(updates[1]))
    slow, fast, seldom = said
    assert [slow % 7, fast % 7, seldom % 21] == [0, 0, 0]
    assert fast < slow / 2


def test_cloning_that_does_not_get_there_is_looked_at_once_more(monkeypatch):
    monkeypatch.setattr("sppo.models.mlp.UPDATES", 5)
    name = "mlp:mountain-car,hidden=16,demonstrations=1,slip=0,skill=0.99,look=100"
    looks = []
    monkeypatch.setattr(
        "sppo.models.mlp.episodes",
        lambda *a: looks.append(1) or [SimpleNamespace(success=True)] * 2 + [SimpleNamespace(success=False)] * 2,
    )
    _, stated = ControlPolicy.load(name, dtype="auto", device=CPU, seed=0)
    assert looks == [1]
    assert "5 updates" in stated
    assert "50% of its own succeed: warning: skill=0.99 was not reached" in stated


def test_a_wrong_model_is_one_sentence():
    for name, sentence in (
        ("mlp:x", "unknown control task"), ("mlp:pendulum,hiden=3", "hiden"), ("mlp", "task"),
        ("mlp:pendulum,hidden=abc", "hidden=abc is not a whole number"), ("mlp:pendulum,hidden=16.5", "not a whole number"),
        ("mlp:pendulum,layers=0", "layers=0 must be 1 or more"), ("mlp:pendulum,skill=2", "skill and rate in"),
        ("mlp:pendulum,rate=0", "skill and rate in"), ("mlp:pendulum,look=0", "look=0 must be 1 or more"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=sentence):
            ControlPolicy.load(name, dtype="auto", device=CPU, seed=0)
    with pytest.raises(RecipeError, match="demonstrations"):  # a critic is not taught
        ControlCritic.load("mlp:pendulum,demonstrations=3", dtype="auto", device=CPU, seed=0)
    said = []
    with pytest.raises(RecipeError, match="look=0"):
        load_policy(
            Config.load("recipes/control-pendulum.toml", {"policy.model": "mlp:pendulum,look=0"}),
            Parts(),
            None,
            CPU,
            said.append,
        )
    assert said == []  # before anybody is told to wait
    with pytest.raises(RecipeError, match="samples policy.model = 'mlp:TASK' only"):  # noqa: RUF043
        build(small_policy())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"policy.model": "mlp:pendulum"}, "policy.model is of the control task 'pendulum', but"),
        ({"critic.model": "mlp:pendulum"}, "but critic.model of 'pendulum'"),
        ({"critic.model": "tiny:hidden=64,layers=2,heads=4"}, "set critic.model = 'mlp:mountain-car'"),
        ({"task.train": "chain:steps=4-6"}, "set task.train = 'control:mountain-car'"),
        ({"rollout.engine": "local"}, "set rollout.engine = 'control'"),
        ({"rollout.top_p": 0.5}, "leave them out"),
        ({"rollout.stop": ["x"]}, "leave them out"),
        ({"objective.algorithm": "dapo", "rollout.overlong": 0}, "set rollout.resample to 2 at most"),
    ],
)  # fmt: skip
def test_parts_of_different_tasks_are_one_sentence(changes, sentence):
    with pytest.raises(RecipeError, match=sentence):
        Config.load("recipes/control-mountaincar.toml", changes)


def test_a_saved_model_of_another_task_is_one_sentence(tmp_path):
    saved = tmp_path / "saved"
    a_policy("pendulum").save(saved)
    recipe = {
        "run.out": str(tmp_path / "run"),
        "critic.model": "mlp:mountain-car,hidden=16",
        "policy.model": str(saved),
    }
    with pytest.raises(RecipeError, match="is of the control task pendulum, but"):
        Run.new(Config.load("recipes/control-mountaincar.toml", recipe))
    with pytest.raises(RecipeError, match="is of the control task pendulum, but"):
        Run.new(Config.load("recipes/quickstart.toml", {"run.out": str(tmp_path / "text"), "policy.model": str(saved)}))


# -- the policy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["precision-cartpole", "pendulum"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_engine_and_learner_find_the_same_log_probabilities(task, temperature):
    policy = a_policy(task)
    samples = ControlEngine(policy).generate([[3], [5], [8]], [1, 2, 3], Sampling(30, temperature))
    ids = torch.tensor([[start, *s.ids] for start, s in zip((3, 5, 8), samples, strict=True)])
    found = logps_of(policy, ids, torch.ones(3, dtype=torch.long), torch.tensor([30] * 3), temperature)
    assert torch.allclose(found.logp_BT, torch.tensor([s.logps for s in samples]), atol=1e-5)
    assert bool(found.mask_BT.all())


def test_discrete_and_gaussian_log_probabilities_by_hand():
    policy = a_policy("pendulum")
    o, a = torch.randn(5, 3), torch.randn(5, 1)
    mean, std = policy.model(o), policy.model.log_std.exp()
    expected = torch.distributions.Normal(mean, std).log_prob(a).sum(-1)
    logp, entropy = policy.scorer.action_logps(o, a, 1.0)
    assert torch.allclose(logp, expected, atol=1e-6)
    assert torch.allclose(entropy, torch.distributions.Normal(mean, std).entropy().sum(-1), atol=1e-6)
    policy = a_policy()
    o, a = torch.randn(5, 4), torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]])
    logp, entropy = policy.scorer.action_logps(o, a, 2.0)
    categorical = torch.distributions.Categorical(logits=policy.model(o) / 2.0)
    assert torch.allclose(logp, categorical.log_prob(a[:, 0]), atol=1e-6)
    assert torch.allclose(entropy, categorical.entropy(), atol=1e-6)


def test_actions_are_drawn_from_the_policy():
    """The first action over many seeds: frequencies against probabilities."""
    policy, n = a_policy(), 4000
    with torch.no_grad():
        p = float(
            torch.softmax(
                policy.model(
                    torch.from_numpy(policy.environment.reset(episode(policy.environment.name, 7)).values)[None]
                ),
                -1,
            )[0, 1]
        )
    ones = sum(
        int(e.actions[0][0])
        for i in range(0, n, 500)
        for e in episodes(policy.scorer, [7] * 500, range(i, i + 500), 1, 1.0)
    )
    assert abs(ones / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_an_episode_does_not_depend_on_its_neighbours():
    policy = a_policy()
    alone = episodes(policy.scorer, [11], [42], 50, 1.0)[0]
    among = episodes(policy.scorer, [3, 11, 5], [1, 42, 2], 50, 1.0)[1]
    assert np.array_equal(np.stack(alone.actions), np.stack(among.actions))
    assert np.allclose(alone.logps, among.logps, atol=1e-6)


def test_steps_are_held_for_a_while_and_never_mistaken():
    states = States(2, 1)
    firsts = [states.add(torch.full((3, 2), float(k)), torch.full((3, 1), float(k)), [(3, True)]) for k in range(6)]
    assert firsts == [PROBE + 3 * k for k in range(6)]
    assert float(states.rows(torch.tensor([firsts[-1]]))[0][0, 0]) == 5.0
    assert float(states.rows(torch.tensor([firsts[3]]))[1][0, 0]) == 3.0
    with pytest.raises(IndexError):
        states.rows(torch.tensor([firsts[0]]))
    assert firsts[0] not in states.outcomes
    assert firsts[-1] in states.outcomes


def test_models_are_saved_and_come_back(tmp_path):
    policy = a_policy("pendulum")
    policy.save(tmp_path / "policy")
    again, _ = ControlPolicy.load(str(tmp_path / "policy"), dtype="auto", device=CPU, seed=9)
    assert again.fingerprint() == policy.fingerprint()
    critic, _ = ControlCritic.load("mlp:pendulum,hidden=8", dtype="auto", device=CPU, seed=1)
    critic.start_at(0.25)
    critic.save(tmp_path / "critic")
    back, _ = ControlCritic.load(str(tmp_path / "critic"), dtype="auto", device=CPU, seed=2)
    value = back.prompt_logits([[0.1, 0.2, 0.3]]).sigmoid()
    assert math.isclose(float(value.detach()), 0.25, abs_tol=1e-6)
    assert back.trained


# -- the loop ------------------------------------------------------------------------------------------------------------


def a_recipe(tmp_path, name, **changes):
    small = {
        "policy.model": "mlp:precision-cartpole,hidden=16,demonstrations=4,skill=0.01", "critic.model": "mlp:precision-cartpole,hidden=16",
        "rollout.prompts": 8, "rollout.max_tokens": 40, "training.steps": 4, "evaluation.n": 8, "evaluation.every": 2,
        "run.checkpoint_every": 2, "run.keep": 9, "run.out": str(tmp_path), "objective.algorithm": name,
    }  # fmt: skip
    return Config.load("recipes/control-cartpole.toml", small | changes)


@pytest.mark.parametrize("name", ["sppo", "ppo", "remax"])
def test_peers_run_on_control_tasks_and_resume_to_the_same_bits(tmp_path, name):
    job = Run.new(a_recipe(tmp_path / "whole", name))
    whole = train(job)
    job.close()
    assert whole["stopped"] == "finished"
    job = Run.new(a_recipe(tmp_path / "cut", name))
    original = job.record

    def record(step, *args):
        if step == 1:
            job.interrupt()
        original(step, *args)

    job.record = record
    assert train(job)["stopped"] == "interrupted"
    job.close()
    job = Run.resume(tmp_path / "cut")
    again = train(job)
    job.close()
    assert again["policy_sha256"] == whole["policy_sha256"]
    for name_of in ("step-000002", "step-000003"):
        files = [next((tmp_path / k / "rollouts").glob(f"*{name_of[-6:]}*")) for k in ("whole", "cut")]
        assert pq.read_table(files[0]).equals(pq.read_table(files[1]))
    assert (tmp_path / "whole" / "checkpoints" / "step-000004" / "critic").exists() == (name in ("sppo", "ppo"))


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("control-*.toml")), ids=lambda p: p.stem)
def test_every_control_recipe_is_valid(recipe):
    config = Config.load(recipe)
    assert config.as_algorithm("ppo", {}).critic_reads == "tokens"
    assert config.task.train.removeprefix("control:") in KINDS
