"""Whether decoding waits for environments: 64 trajectories of 4 turns whose tool takes 200 ms, against as many single turns. `make bench-turns`

The same engine writes as many tokens in both: 4 × 24 after each other in a conversation, and 96 at once. Sides take turns. A third one writes in
rounds, as engines do that cannot take turns as they come, and a fourth asks a tool that answers at once. Last line: one JSON object, tokens per
second of each and the median of their ratios to single turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import workload
from sppo.environments.base import Maker, Observation
from sppo.environments.single_turn import ALONE
from sppo.models.loading import processor
from sppo.models.policy import Policy
from sppo.rollout.collect import sampled
from sppo.rollout.engine import Sampling, in_rounds
from sppo.rollout.local import LocalEngine
from sppo.types import Task

TRAJECTORIES, TURNS, TOKENS = 64, 4, 24
PROMPT = "A train leaves at nine and goes sixty miles an hour. "


class Waits:
    """A tool that takes its time. A turn ends after `TOKENS` tokens, whatever they are: the answer is what the model is told."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.taken = seconds, 0

    def reset(self, task: Task) -> Observation:
        """Nothing to add."""
        return Observation()

    def step(self, reply: Any) -> Observation:
        """A short answer, after a while."""
        self.taken += 1
        time.sleep(self.seconds)
        return Observation([{"role": "user", "content": " It is so."}], done=self.taken == TURNS)

    def close(self) -> None:
        """Nothing was opened."""


class Fixed(LocalEngine):
    """Turns of a fixed length, which end by themselves: random text would end anywhere."""

    def converse(self, turns: Any, sampling: Sampling) -> None:
        """See `LocalEngine`."""
        super().converse(_Fixed(turns), sampling)


class Rounds(Fixed):
    """The same in rounds."""

    def converse(self, turns: Any, sampling: Sampling) -> None:
        """See `in_rounds`."""
        in_rounds(self, _Fixed(turns), sampling)


class _Fixed:
    def __init__(self, turns: Any) -> None:
        self.turns = turns

    def next(self, wait: Any) -> list[Any]:
        return [replace(turn, limit=TOKENS) for turn in self.turns.next(wait)]

    def written(self, number: int, sample: Any) -> None:
        self.turns.written(number, replace(sample, finish="stop"))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="that the tool takes [0.2]")
    args = parser.parse_args()
    policy, _ = Policy.load(workload.model_folder(), dtype="auto", device=torch.device("cpu"), seed=0)
    policy.eos_ids = [policy.vocabulary + 1]  # never drawn: every turn has its length
    tasks = [Task(f"t/{i}", PROMPT * 3 + str(i)) for i in range(TRAJECTORIES)]
    slow, quick = (Maker(lambda s=s: Waits(s), workers=TRAJECTORIES) for s in (args.seconds, 0.0))
    sides = {
        "single": (LocalEngine, ALONE),
        "turns": (Fixed, slow),
        "instant": (Fixed, quick),
        "rounds": (Rounds, slow),
    }
    engines = {name: kind(policy) for name, (kind, _) in sides.items()}
    sampling = Sampling(TURNS * TOKENS, batch=TRAJECTORIES)

    def rate(name: str, turn: int) -> float:
        began = time.perf_counter()
        tracks = sampled(engines[name], policy, tasks, sampling, samples=1, seed=(turn,), environment=sides[name][1])
        tokens = sum(len(t.logps) for t in tracks)
        assert tokens == TRAJECTORIES * TURNS * TOKENS, (name, tokens)
        return tokens / (time.perf_counter() - began)

    for name in sides:  # warms up
        rate(name, -1)
    found = workload.interleaved({name: partial(rate, name) for name in sides}, args.rounds)
    workload.finish({
        "processor": processor(torch.device("cpu")), "trajectories": TRAJECTORIES, "turns": TURNS, "tool_seconds": args.seconds,
        **{f"{name}_tokens_per_second": round(statistics.median(rates), 1) for name, rates in found.items()},
        **{f"{name}_of_single": workload.ratios(rates, found["single"]) for name, rates in found.items() if name != "single"},
    })  # fmt: skip


if __name__ == "__main__":
    main()
