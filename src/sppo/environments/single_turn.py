"""One prompt, one answer: the trajectory is over once the policy has written. `environment.use = "single_turn"`, the default."""

from __future__ import annotations

from ..types import Task
from .base import Maker, Observation, Reply


def build() -> SingleTurn:
    """The environment of a single answer."""
    return SingleTurn()


class SingleTurn:
    """Adds nothing to the prompt, and ends at the first reply."""

    def reset(self, task: Task) -> Observation:
        """Nothing beyond the task's own prompt."""
        return Observation()

    def step(self, reply: Reply) -> Observation:
        """Over."""
        return Observation(done=True)

    def close(self) -> None:
        """Nothing to let go of."""


ALONE = Maker(build, answers=False)
"""Where nothing answers the policy."""
