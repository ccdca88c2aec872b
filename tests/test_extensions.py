"""A reward, an environment, an engine, a credit and a tracker of the user's own: one new file each, named in a recipe, with nothing else touched."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sppo.environments.loading import load_environment
from sppo.errors import RecipeError, RewardError
from sppo.recipe.config import Config
from sppo.recipe.sections import EnvironmentSection
from sppo.rewards.loading import load_reward
from sppo.rollout.collect import collect
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.types import Rollout, Task

from .conftest import SMALL, small_config

FILES = {
    "mine_environment": '''
from sppo.environments.base import Observation

class Again:
    """Asks once more, and then says how often the policy wrote."""

    def __init__(self, turns=2):
        self.turns, self.seen = turns, []

    def reset(self, task):
        return Observation()

    def step(self, reply):
        self.seen.append(reply.text)
        if len(self.seen) == self.turns:
            return Observation(done=True, evidence={"turns": len(self.seen), "first": self.seen[0]})
        return Observation([{"role": "user", "content": "again"}])

    def close(self):
        pass
''',
    "mine_reward": '''
from sppo.types import Verdict

class Wrote:
    """Right if the environment saw two turns and the first one had an even length."""

    def judge(self, rollouts):
        out = []
        for r in rollouts:
            right = r.evidence.get("turns") == 2 and len(r.evidence["first"]) % 2 == 0
            out.append(Verdict(float(right), "correct" if right else "wrong"))
        return out

    def check(self, task):
        return None

    def close(self):
        pass
''',
    "mine_engine": '''
from sppo.rollout.local import LocalEngine

class Counting(LocalEngine):
    """The local engine, which counts its calls in a file."""

    def generate(self, prompts, seeds, sampling, progress=None, limits=None):
        with open("calls.txt", "a") as file:
            print(len(prompts), file=file)
        return super().generate(prompts, seeds, sampling, progress, limits)
''',
    "mine_credit": '''
class Constant:
    """R less a constant: no critic is trained."""

    critic = None
    charges_tokens = False

    def __init__(self, config, policy, critic, value=0.25):
        self.value = value

    def advantage(self, batch, reward_B):
        return reward_B - self.value, None, {"credit/constant": self.value}

    def learn(self, batch, rows, lr):
        return None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
''',
    "mine_tracker": '''
import json

class Lines:
    id = ""

    def __init__(self, run):
        self.file = open("tracked.jsonl", "a")

    def log(self, step, metrics):
        print(json.dumps({"step": step, "tokens": metrics["rollout/tokens"]}), file=self.file, flush=True)

    def close(self, summary):
        self.file.close()
''',
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A recipe that names one of each."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return small_config(
        environment__use="mine_environment:Again,turns=2",
        reward__use="mine_reward:Wrote",
        rollout__engine="mine_engine:Counting",
        rollout__max_tokens=24,
        rollout__truncated="keep",
        objective__baseline="mine_credit:Constant,value=0.5",
        run__trackers=["mine_tracker:Lines"],
        run__out=str(tmp_path / "run"),
        training__steps=2,
    )


def test_one_of_each_from_outside_the_package_trains_by_name(recipe: Config, tmp_path: Path) -> None:
    run = Run.new(recipe)
    train(run)
    run.close()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["credit/constant"] for m in metrics] == [0.5, 0.5]
    assert [json.loads(line)["step"] for line in (tmp_path / "tracked.jsonl").read_text().splitlines()] == [0, 1]
    assert len((tmp_path / "calls.txt").read_text().splitlines()) > 4  # more than one call per step: turns


def test_a_trajectory_of_two_turns_trains_on_what_the_policy_wrote_and_nothing_else(recipe: Config) -> None:
    from sppo.learning.batch import pack
    from sppo.run.sample import sample

    run = Run.new(recipe)
    run.begin()
    sampled = sample(run.components, 0)
    policy = run.components.policy
    several = [r for r in sampled.rollouts if len(r.turns) == 2]
    assert several
    asked = policy.continuation_ids([{"role": "user", "content": "again"}])
    for r in several:
        (_, end), (start, last) = r.turns
        assert list(r.ids[end:start]) == asked
        assert last == len(r.ids)
        assert len(r.logps) == len(r.response_ids) == sum(r.action_mask) <= 24
    batch = pack(sampled.rollouts, policy.pad_id)
    # the learner finds what the engine found, in every turn
    again = run.learner._all_logps(policy, batch)
    assert (again - batch.behaviour_logp_BT)[batch.mask_BT].abs().max() < 1e-3
    run.close()


def with_step(tmp_path: Path, line: str) -> None:
    """Write the environment with one more line in its `step`."""
    text = FILES["mine_environment"].replace("self.seen.append(reply.text)", f"self.seen.append(reply.text); {line}")
    text = text.replace("self.turns, self.seen = turns, []", "self.turns, self.seen, self.task = turns, [], None")
    (tmp_path / "mine_environment.py").write_text(
        text.replace("def reset(self, task):", "def reset(self, task):\n        self.task = task")
    )


def test_an_environment_that_raises_masks_its_own_trajectory_alone(recipe: Config, tmp_path: Path) -> None:
    with_step(tmp_path, "assert not self.task.id.endswith('/7')")
    run = Run.new(recipe)
    tasks = [Task(f"t/{n}", "1+2?", {"answer": "3"}) for n in range(16)]
    rollouts = play(run, tasks)
    assert [r.verdict.outcome == "infra_error" for r in rollouts] == [n == 7 for n in range(16)]
    assert "AssertionError" in rollouts[7].verdict.evidence["reason"]
    run.close()


def test_an_environment_that_often_raises_stops_the_run(recipe: Config, tmp_path: Path) -> None:
    with_step(tmp_path, "assert len(reply.text) > 10**6")
    run = Run.new(recipe)
    with pytest.raises(
        RewardError, match=r"environment\.use failed in 16 of 16 trajectories; the first time .*AssertionError"
    ):
        play(run, [Task(f"t/{n}", "1+2?", {"answer": "3"}) for n in range(16)])
    run.close()


@pytest.mark.parametrize("where", ["reset", "close"])
@pytest.mark.parametrize("algorithm", ["sppo", "ppo"])
def test_a_trajectory_without_a_token_or_a_close_that_raises_is_masked_in_a_whole_step(
    recipe: Config, tmp_path: Path, where: str, algorithm: str
) -> None:
    text = FILES["mine_environment"].replace(
        "class Again:", "import itertools\nmade = itertools.count()\n\nclass Again:"
    )
    text = text.replace("        self.turns, self.seen =", "        self.number, self.turns, self.seen = next(made),")
    bad = "if self.number % 16 == 5: raise OSError('gone')"
    text = text.replace(
        f"def {where}(self" + (", task):" if where == "reset" else "):"),
        f"def {where}(self{', task' if where == 'reset' else ''}):\n        {bad}",
    )
    (tmp_path / "mine_environment.py").write_text(text)
    config = small_config(
        environment__use="mine_environment:Again", reward__use="mine_reward:Wrote", rollout__max_tokens=24, objective__algorithm=algorithm,
        critic__model=SMALL, run__out=str(tmp_path / "run"), training__steps=1,
    )  # fmt: skip
    run = Run.new(config)
    train(run)
    run.close()
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["rollout/masked"] == metrics["outcome/infra_error"] == 1
    assert math.isfinite(metrics["loss/policy"])
    assert math.isfinite(metrics["update/grad_norm"])


def test_a_name_of_an_environment_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_environment(EnvironmentSection())
    monkeypatch.setattr("sppo.spec.resolve", lambda *_: pytest.fail("looked up for each trajectory"))
    assert made() is not made()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("return 'again'", r"Again\.step returned str; it must return an Observation"),
        ("return Observation('again')", r"Again\.step returned the message 'again'; a message is a dict"),
    ],
)
def test_what_an_environment_may_not_return_is_one_sentence(
    recipe: Config, tmp_path: Path, line: str, sentence: str
) -> None:
    with_step(tmp_path, line)
    run = Run.new(recipe)
    with pytest.raises(RecipeError, match=sentence):
        play(run, [Task("t/0", "1+2?", {"answer": "3"})])
    run.close()


def test_a_reset_that_is_done_is_refused(recipe: Config, tmp_path: Path) -> None:
    text = FILES["mine_environment"].replace("return Observation()", "return Observation(done=True)")
    (tmp_path / "mine_environment.py").write_text(text)
    run = Run.new(recipe)
    with pytest.raises(RecipeError, match=r"its reset said that task t/0 is done"):
        play(run, [Task("t/0", "1+2?", {"answer": "3"})])
    run.close()


def play(run: Run, tasks: list[Task]) -> list[Rollout]:
    c = run.components
    # an end of turn, whatever the policy writes, so that the environment is asked
    sampling = replace(c.sampling, stop=tuple("0123456789+-*=;:A "))
    return collect(
        c.engine, c.policy, c.reward, tasks, sampling, seed=(1,), environment=c.environment, truncated="keep"
    )


def test_a_function_reward_reads_all_turns_and_what_the_environment_said(recipe: Config, tmp_path: Path) -> None:
    seen = []

    def reward(completions, evidence):
        seen.extend(zip(completions, evidence, strict=True))
        return [float(e.get("turns", 0) == 2) for e in evidence]

    run = Run.new(recipe)
    c = run.components
    sampling = replace(c.sampling, stop=tuple("0123456789+-*=;:A "))
    rollouts = collect(
        c.engine, c.policy, load_reward(reward), [Task("t/0", "1+2?", {})], sampling, seed=(1,),
        environment=c.environment, truncated="keep",
    )  # fmt: skip
    assert [m["role"] for m in seen[0][0]] == ["assistant", "user", "assistant"]
    assert seen[0][1]["turns"] == 2
    assert seen[0][0][-1]["content"] == rollouts[0].text
    assert rollouts[0].verdict.score == 1.0
    run.close()


def test_an_environment_that_lacks_a_method_is_refused_before_anything_starts(recipe: Config) -> None:
    changed = recipe.model_copy(
        update={"environment": recipe.environment.model_copy(update={"use": "mine_tracker:json"})}
    )
    with pytest.raises(Exception, match=r"environment\.use"):
        Run.new(changed)
