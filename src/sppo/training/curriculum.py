"""Which problems come next: every training problem once an epoch, in an order that is a function of the seed.

The state is one number, so a resumed run continues at the very next problem. Prompts that are too long are passed over
and counted, never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import DataError
from ..tasks.base import TaskSource
from ..types import Rollout, Task


class Curriculum:
    """Uniform sampling without replacement. `too_long(task)` gives a reason to pass a task over, or None."""

    def __init__(self, source: TaskSource, seed: int, too_long: Callable[[Task], str | None]) -> None:
        self.source, self.seed, self.too_long = source, seed, too_long
        self.position = 0
        self.passed_over = 0
        self._order: tuple[int, np.ndarray] | None = None

    def sample(self, n: int) -> list[Task]:
        """The next n tasks. Raises DataError when a whole epoch holds none that can be used."""
        tasks: list[Task] = []
        refused, reason = 0, ""
        while len(tasks) < n:
            task = self.source[self._index(self.position)]
            self.position += 1
            why = self.too_long(task)
            if why is None:
                tasks.append(task)
                refused = 0
                continue
            self.passed_over += 1
            refused, reason = refused + 1, f"{task.id}: {why}"
            if refused >= len(self.source):
                raise DataError(
                    f"none of the {len(self.source)} training prompts can be used; the last one is {reason}"
                )
        return tasks

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from what happened. Uniform sampling has nothing to learn."""

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.source))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=(self.seed << 32) + epoch))
            self._order = (epoch, rng.permutation(len(self.source)))
        return int(self._order[1][offset])

    def state_dict(self) -> dict[str, int]:
        """The position in the data."""
        return {"position": self.position, "passed_over": self.passed_over}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position."""
        self.position, self.passed_over = state["position"], state["passed_over"]
