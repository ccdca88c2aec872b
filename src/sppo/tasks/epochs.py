"""Each task of a source once per epoch, in an order that depends on the seed and the epoch alone.

The position in the data is one number, so a resumed run goes on with the very next task. Tasks that cannot be used are
passed over and counted, never cut.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import DataError
from ..types import Task
from .base import TaskSource

Refusal = Callable[[Task], str | None]
"""Why a task cannot be used, or None."""


class Epochs:
    """Draws from `source` without replacement; `refusal` says why a task cannot be used."""

    def __init__(self, source: TaskSource, seed: int, refusal: Refusal) -> None:
        self.source, self.seed, self.refusal = source, seed, refusal
        self.position = 0
        self.passed_over = 0
        self._order: tuple[int, np.ndarray] | None = None

    def sample(self, n: int) -> list[Task]:
        """The next n tasks. Raises DataError when a whole epoch holds none that can be used."""
        return self._next(n, lambda task: True)

    def _next(self, n: int, wanted: Callable[[Task], bool]) -> list[Task]:
        tasks: list[Task] = []
        refused, reason, resting = 0, "", 0
        while len(tasks) < n:
            epoch, index = self._place()
            task = self.source[index]
            self.position += 1
            if not wanted(task):
                refused, reason = refused + 1, reason or f"{task.id}: its difficulty is {task.difficulty}"
            elif self._rests(task, epoch):
                refused, resting = refused + 1, resting + 1
            elif (why := self.refusal(task)) is not None:
                self.passed_over += 1
                refused, reason = refused + 1, f"{task.id}: {why}"
            else:
                tasks.append(task)
                refused = resting = 0
            if refused >= len(self.source):
                if not resting:
                    raise DataError(
                        f"none of the {len(self.source)} training prompts can be used; the last one is {reason}"
                    )
                self._wake()  # better a solved problem again than none
                refused = resting = 0
        return tasks

    def _rests(self, task: Task, epoch: int) -> bool:
        """Whether a task pauses in this epoch."""
        return False

    def _wake(self) -> None:
        """End every pause."""

    def _place(self) -> tuple[int, int]:
        """The epoch, and the index of the task that comes next in it."""
        epoch, offset = divmod(self.position, len(self.source))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=(self.seed << 32) + epoch))
            self._order = (epoch, rng.permutation(len(self.source)))
        return epoch, int(self._order[1][offset])
