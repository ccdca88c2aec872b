"""Where the critic begins: at the share solved of training problems, sampled as the first step samples them."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.models.mlp_scorer import KEEP
from sppo.recipe.config import Config
from sppo.run import accuracy
from sppo.run.build import Parts
from sppo.run.run import Run
from sppo.run.sample import sample
from sppo.types import Verdict

from ..conftest import small_config


class Spy:
    """Some of the one-step problems are solved, by chance, and none of the longer ones; keeps what it was shown."""

    def __init__(self, outcome="correct"):
        self.shown, self.outcome = [], outcome

    def judge(self, rollouts):
        self.shown.append(rollouts)
        right = [float(r.task.difficulty == 1 and sum(r.response_ids) % 3 == 0) for r in rollouts]
        return [Verdict(c, self.outcome if c or self.outcome != "correct" else "wrong") for c in right]

    def check(self, task):
        return None

    def close(self):
        pass


def begun(tmp_path, spy, **changes):
    keys = {
        "task.train": "chain:steps=1", "task.eval": "chain:steps=3", "evaluation.temperature": 0.0, "rollout.temperature": 1.5,
        "rollout.truncated": "keep", "run.out": str(tmp_path / "run"),
    }  # fmt: skip
    job = Run.new(small_config(**keys | changes), parts=Parts(reward=spy))
    temperatures, generate = [], job.components.engine.generate

    def noted(prompts, seeds, sampling, *rest, **more):
        temperatures.append(sampling.temperature)
        return generate(prompts, seeds, sampling, *rest, **more)

    job.components.engine.generate = noted
    job.begin()
    job.close()
    return job, temperatures


CURRICULA = [
    {},
    {"curriculum.kind": "predicted"},
    {"curriculum.kind": "staged", "curriculum.stages": [1, 3], "task.train": "chain:steps=1-3", "evaluation.every": 1},
    {"objective.algorithm": "ppo"},
    {"curriculum.aside": 1},
]


@pytest.mark.parametrize("changes", CURRICULA)
def test_the_critic_starts_from_training_problems_under_the_rollouts_sampling(tmp_path, changes):
    spy = Spy()
    staged = {"task.eval": "chain:steps=1-3"} if "curriculum.stages" in changes else {}
    job, temperatures = begun(tmp_path, spy, **changes | staged)
    held_out, base = spy.shown[-2:]
    assert temperatures[-2:] == [0.0, 1.5]
    assert len(base) == min(accuracy.BASE_RATE_PROBLEMS, 2 * job.components.config.rollout.prompts)
    assert {r.task.difficulty for r in base} == {1}  # staged: of the first stage
    assert not {r.task.id for r in base} & {r.task.id for r in held_out}
    share = sum(sum(r.response_ids) % 3 == 0 for r in base) / len(base)
    assert 0.1 < share < 0.9
    start = share if job.components.critic.linear else math.log(share / (1 - share))
    assert float(job.components.critic.head.bias.detach()) == pytest.approx(start, abs=1e-5)
    assert staged or job.state.before["accuracy"] == 0.0  # of three steps, greedily: no guide to these


@pytest.mark.parametrize("changes", CURRICULA)
def test_no_data_is_consumed(tmp_path, monkeypatch, changes):
    """The first step begins with the problems of a run that never looked."""
    staged = {"task.eval": "chain:steps=1-3"} if "curriculum.stages" in changes else {}
    names = []
    for looked in (True, False):
        with monkeypatch.context() as patch:
            if not looked:
                patch.setattr(accuracy, "base_rate", lambda *_: 0.5)
            job = Run.new(
                small_config(**{"task.train": "chain:steps=1", "run.out": str(tmp_path / str(looked))} | changes | staged), parts=Parts(reward=Spy())
            )  # fmt: skip
            job.begin()
        assert (job.components.curriculum.position, job.components.curriculum.passed_over) == (0, 0)
        names.append([(r.task.id, list(r.response_ids)) for r in sample(job.components, 0).rollouts])
        job.close()
    assert names[0] == names[1]


def test_a_trained_critic_is_left_alone_and_nothing_is_sampled_for_it(tmp_path):
    job, _ = begun(tmp_path, Spy())
    folder = tmp_path / "critic"
    with torch.no_grad():
        job.components.critic.head.bias.fill_(0.7)
    job.components.critic.save(folder)
    spy = Spy()
    again, _ = begun(tmp_path / "again", spy, **{"critic.model": str(folder)})
    assert len(spy.shown) == 1  # the evaluation
    assert float(again.components.critic.head.bias.detach()) == pytest.approx(0.7)


def test_nothing_is_sampled_without_a_critic(tmp_path):
    spy = Spy()
    begun(tmp_path, spy, **{"objective.algorithm": "reinforce"})
    assert len(spy.shown) == 1


def test_ungradable_training_problems_leave_the_held_out_accuracy(tmp_path):
    class Blind(Spy):
        def judge(self, rollouts):
            if rollouts[0].task.difficulty == 1:
                return [Verdict(0.0, "infra_error") for _ in rollouts]
            return [Verdict(float(i < 4), "correct" if i < 4 else "wrong") for i in range(len(rollouts))]

    job, _ = begun(tmp_path, Blind())
    assert float(job.components.critic.head.bias.detach()) == pytest.approx(math.log(0.25 / 0.75), abs=1e-5)


@pytest.mark.parametrize("name", ["sppo", "ppo"])
def test_episodes_of_a_control_task_serve_too_and_are_not_in_the_way(tmp_path, name):
    """The table of steps holds a few blocks: what the base rate took is let go of, and the first step's are there."""
    keys = {
        "policy.model": "mlp:precision-cartpole,hidden=16,demonstrations=4,skill=0.01", "critic.model": "mlp:precision-cartpole,hidden=16",
        "rollout.prompts": 8, "rollout.samples": 2, "rollout.resample": 2, "rollout.max_tokens": 40, "training.steps": 2, "evaluation.n": 8,
        "run.out": str(tmp_path / "run"), "objective.algorithm": name,
    }  # fmt: skip
    job = Run.new(Config.load("recipes/control-cartpole.toml", keys))
    job.begin()
    states = job.components.policy.states
    assert len(states.blocks) - 1 <= KEEP
    bias = float(job.components.critic.head.bias.detach())
    assert 0.01 <= 1 / (1 + math.exp(-bias)) <= 0.99
    for step in range(2):
        sampled = sample(job.components, step)
        ids = torch.tensor([i for r in sampled.seen for i in r.response_ids])
        assert int(ids.min()) >= states.oldest
        assert torch.isfinite(states.rows(ids)[0]).all()
    job.close()
