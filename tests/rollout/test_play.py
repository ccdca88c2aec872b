"""Trajectories of several turns: engines that take turns as they come, and environments that are slow, hang, raise or flood."""

from __future__ import annotations

import threading
import time

import pytest

from sppo.environments.base import Maker, Observation
from sppo.environments.tools import Tools
from sppo.errors import RewardError
from sppo.models.policy import Policy
from sppo.models.tiny import build as tiny
from sppo.rollout.collect import collect
from sppo.rollout.engine import Sampling, in_rounds
from sppo.rollout.local import LocalEngine
from sppo.types import Task, Verdict

ENDS = tuple("0123456789+-*=;:A ")
TASKS = [Task(f"t/{i}", f"{i}+{i}?") for i in range(24)]


class Talks:
    """Says its turn's number three times, after a pause that differs from trajectory to trajectory."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause, self.turn = pause, 0

    def reset(self, task: Task) -> Observation:
        self.number = int(task.id.rpartition("/")[2])
        return Observation(added=f"({self.number})")

    def step(self, reply) -> Observation:
        self.turn += 1
        time.sleep(self.pause * (self.number % 5))
        return Observation([{"role": "user", "content": f"turn {self.turn}"}], done=self.turn == 3)

    def close(self):
        return {"closed": self.turn}


class Rounds(LocalEngine):
    """An engine that writes in rounds."""

    def converse(self, turns, sampling):
        in_rounds(self, turns, sampling)


class Fair:
    """Pays everybody the same."""

    def judge(self, rollouts):
        return [Verdict(1.0, "correct") for _ in rollouts]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(*tiny(hidden=32, layers=2, heads=2, context=256))


def played(policy, engine, make, seconds=60.0, tasks=TASKS, workers=16, batch=8, most=60):
    sampling = Sampling(max_tokens=most, batch=batch, stop=ENDS)
    return collect(
        engine(policy),
        policy,
        Fair(),
        tasks,
        sampling,
        seed=(1,),
        environment=Maker(make, workers, seconds),
        truncated="keep",
    )


def test_turns_that_come_when_they_come_are_those_of_rounds(policy):
    """A sample depends on task, seed, weights and answers: not on when these come."""
    quick = played(policy, LocalEngine, Talks)
    slow = played(policy, LocalEngine, lambda: Talks(0.01), batch=5)
    rounds = played(policy, Rounds, Talks, workers=1)
    assert max(len(r.turns) for r in quick) == 3
    for one in (slow, rounds):
        assert [r.ids for r in one] == [r.ids for r in quick]
        assert [r.turns for r in one] == [r.turns for r in quick]
        assert [r.logps for r in one] == [r.logps for r in quick]  # to the last bit
    assert all(r.evidence["closed"] == len(r.turns) for r in quick if r.finish == "stop")
    assert policy.rendered(quick[7].prompt_ids) == "7+7?(7)"


def test_what_was_sampled_is_what_the_policy_finds(policy):
    for r in played(policy, LocalEngine, Talks, tasks=TASKS[:6]):
        found = policy.given_logps([r.ids[:s] for s, _ in r.turns], [r.ids[s:e] for s, e in r.turns])
        assert [x for row in found for x in row] == pytest.approx(list(r.logps), abs=1e-4)


def test_turns_share_one_limit_and_no_seed(policy):
    seeds = []

    class Notes(Rounds):
        def generate(self, prompts, numbers, sampling, progress=None, limits=None):
            seeds.extend(numbers)
            return super().generate(prompts, numbers, sampling, progress, limits)

    done = played(policy, Notes, Talks, most=9)
    assert len(set(seeds)) == len(seeds) > len(TASKS)
    assert max(len(r.logps) for r in done) == 9
    assert any(len(r.turns) > 1 and r.finish == "length" for r in done)


def test_decoding_does_not_wait_for_environments(policy):
    """While one environment thinks the others' turns are written: they are over long before it."""
    over = []

    class Waits(Talks):
        def step(self, reply):
            seen = super().step(reply)
            if self.number == 0 and self.turn == 1:
                assert others.wait(20)
            if seen.done:
                over.append(self.number)
                if len(over) == len(TASKS) - 1:
                    others.set()
            return seen

    others = threading.Event()
    done = played(policy, LocalEngine, Waits)
    assert all(r.verdict.outcome == "correct" for r in done)


def test_an_environment_that_hangs_is_masked_and_the_others_go_on(policy):
    stop = threading.Event()

    class Hangs(Talks):
        def step(self, reply):
            if self.number == 3:
                stop.wait()
            return super().step(reply)

    began = time.monotonic()
    done = played(policy, LocalEngine, Hangs, seconds=0.5, workers=2)
    assert time.monotonic() - began < 20
    stop.set()
    assert [r.task.id for r in done if r.verdict.outcome == "infra_error"] == ["t/3"]
    assert "0.5 s" in done[3].verdict.evidence["reason"]
    assert "closed" not in done[3].evidence  # somebody is still inside


@pytest.mark.parametrize("where", ["reset", "step", "close"])
def test_an_environment_that_raises_masks_its_own_trajectory(policy, where):
    class Raises(Talks):
        def _maybe(self):
            if self.number == 2:
                raise RuntimeError("broken")

        def reset(self, task):
            seen = super().reset(task)
            if where == "reset":
                self._maybe()
            return seen

        def step(self, reply):
            if where == "step":
                self._maybe()
            return super().step(reply)

        def close(self):
            if where == "close":
                self._maybe()

    done = played(policy, LocalEngine, Raises)
    assert [r.task.id for r in done if r.verdict.masked] == ["t/2"]
    assert done[2].verdict.evidence["reason"] == "the environment raised RuntimeError: broken"


def test_one_that_often_fails_stops_the_run(policy):
    class Fails(Talks):
        def step(self, reply):
            raise RuntimeError("no server")

    with pytest.raises(RewardError, match=r"24 of 24 trajectories; the first time .*no server"):
        played(policy, LocalEngine, Fails)


def test_what_is_given_up_costs_no_thread_for_good(policy):
    """More environments hang than there are threads."""
    stop = threading.Event()

    class Hangs(Talks):
        def step(self, reply):
            if self.number in (3, 4):
                stop.wait()
            return super().step(reply)

    done = played(policy, LocalEngine, Hangs, seconds=0.3, workers=1)
    stop.set()
    assert [r.task.id for r in done if r.verdict.masked] == ["t/3", "t/4"]


def test_a_context_that_is_full_cuts_a_trajectory(policy):
    class Floods(Talks):
        def step(self, reply):
            return Observation([{"role": "user", "content": "x" * 300}])

    done = played(policy, LocalEngine, Floods, tasks=TASKS[:4])
    assert all(r.finish == "length" and len(r.turns) == 1 for r in done)


class Counter:
    """A tool with a state of its own."""

    def __init__(self):
        self.total = 0

    def reset(self, prompt: str, **row) -> str:
        self.prompt = prompt
        return " Count."

    def add(self, number: int) -> int:
        """Add to the total.

        Args:
            number: What to add.
        """
        self.total += number
        return self.total

    def get_reward(self) -> float:
        return self.total / 10


def test_each_trajectory_has_tools_of_its_own(policy):
    """The model writes at random: here its replies are calls."""
    written = iter(["[add(3)]", "[add(number=4)]", "[add('x')]", "done"] * 2)

    class Says(Rounds):
        def generate(self, prompts, seeds, sampling, progress=None, limits=None):
            from sppo.rollout.engine import Sample

            ids = [self.policy.response_ids(text) for text in (next(written) for _ in prompts)]
            return [Sample(i, [0.0] * len(i), "stop") for i in ids]

    one, other = played(policy, Says, lambda: Tools([Counter]), tasks=TASKS[:1]) + played(
        policy, Says, lambda: Tools([Counter]), tasks=TASKS[1:2]
    )
    for r in (one, other):
        assert r.evidence == {"calls": 3, "failed_calls": 1, "reward": 0.7}
        assert [m["role"] for m in r.messages] == ["assistant", "tool"] * 3 + ["assistant"]
        assert [m["content"] for m in r.messages if m["role"] == "tool"] == [
            "3", "7", "error: add: number must be an integer, not text",
        ]  # fmt: skip
        assert r.messages[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"*": [3]}}
        assert policy.rendered(r.ids).endswith(
            "[add('x')]<eos>\nerror: add: number must be an integer, not text\ndone<eos>"
        )
    assert policy.rendered(one.prompt_ids) == "0+0? Count."
