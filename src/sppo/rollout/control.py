"""The engine of control tasks: episodes side by side, the policy asked once a step for all that still run. `rollout.engine = "control"`"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..errors import RecipeError
from ..models.mlp import ControlPolicy, episodes
from ..models.policy import Policy
from .engine import Sample, Sampling


def build(policy: Policy) -> ControlEngine:
    """The engine over a control policy."""
    if not isinstance(policy, ControlPolicy):
        raise RecipeError("rollout.engine = 'control' samples policy.model = 'mlp:TASK' only")
    return ControlEngine(policy)


class ControlEngine:
    """See `rollout.engine.Engine`: prompts are numbers of starts, tokens are rows of the policy's table of steps."""

    stated = ""
    context: int | None = None

    def __init__(self, policy: ControlPolicy) -> None:
        self.policy = policy

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Sample]:
        """One episode a prompt, of `rollout.max_tokens` steps at most (the task's own horizon, if that is shorter), and no other limits."""
        if limits is not None:
            raise ValueError("episodes are all as long as they may get")
        if not prompts:
            return []
        horizon = min(sampling.max_tokens, self.policy.environment.kind.horizon)
        found = episodes(self.policy, [p[0] for p in prompts], seeds, horizon, sampling.temperature)
        first = self.policy.states.add(
            torch.from_numpy(np.stack([o for e in found for o in e.observations])),
            torch.from_numpy(np.stack([a for e in found for a in e.actions])),
            [(len(e.actions), e.success) for e in found],
        )
        samples = []
        for episode in found:
            samples.append(Sample(list(range(first, first + len(episode.actions))), episode.logps, "stop"))
            first += len(episode.actions)
        if progress:
            progress(len(found))
        return samples

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π of steps in the table."""
        return self.policy.given_logps(prompts, responses)

    def sync(self, policy: Policy) -> None:
        """Sample from these very weights."""
        assert isinstance(policy, ControlPolicy)
        self.policy = policy

    def holds(self, policy: Policy) -> bool:
        """Sampling reads the policy's own weights."""
        return self.policy is policy

    def close(self) -> None:
        """Nothing to let go of."""
