"""The engine of control tasks: episodes side by side, the policy asked once per step for all that still run.
`rollout.engine = "control"`"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..errors import RecipeError
from ..models.mlp import ControlPolicy
from ..models.mlp_episodes import episodes
from ..models.policy import Policy
from ..models.weights import Weights
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
        self.policy, self.version = policy, 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Sample]:
        """One episode per prompt, of `rollout.max_tokens` steps at most (the task's own horizon, if that is shorter),
        and no other limits."""
        if limits is not None:
            raise ValueError("episodes are all as long as they may get")
        if not prompts:
            return []
        horizon = min(sampling.max_tokens, self.policy.environment.kind.horizon)
        found = episodes(self.policy.scorer, [p[0] for p in prompts], seeds, horizon, sampling.temperature)
        first = self.policy.states.add(
            torch.from_numpy(np.stack([o for e in found for o in e.observations])),
            torch.from_numpy(np.stack([a for e in found for a in e.actions])),
            [(len(e.actions), e.success) for e in found],
        )
        samples = []
        for episode in found:
            samples.append(
                Sample(list(range(first, first + len(episode.actions))), episode.logps, "stop", version=self.version)
            )
            first += len(episode.actions)
        if progress:
            progress(len(found))
        return samples

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π of steps in the table."""
        return self.policy.given_logps(prompts, responses)

    def load(self, weights: Weights, version: int) -> None:
        """Take these weights; the policy's own lie here already, and are not copied."""
        self.policy.take(weights)
        self.version = version

    def holds(self, fingerprint: str) -> bool:
        """Whether the policy that is sampled from has these weights."""
        return self.policy.fingerprint() == fingerprint

    def close(self) -> None:
        """Nothing to release."""
