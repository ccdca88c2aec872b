"""What a run reports its progress to: a display (`report/progress.py`), a test, or nothing."""

from __future__ import annotations

from typing import Any, Protocol

from ..evaluation.evaluate import Evaluation


class Observer(Protocol):
    """Is called as a run goes on. `report/progress.py` implements it as a display."""

    def note(self, text: str) -> None:
        """A sentence for the user: a choice that was made, or a warning."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A stage (`bootstrap`, `train`) of `total` steps begins."""

    def step(self, done: int, metrics: dict[str, Any]) -> None:
        """Step `done` of the stage (from 1) has ended, with these metrics."""

    def within(self, what: str, done: int, total: int) -> None:
        """Progress inside a step: `what` is `sampling`, `judging`, `updating` (in micro-batches) or `evaluating`. Called often."""

    def evaluation(self, step: int, result: Evaluation) -> None:
        """The held-out accuracy after a step; 0 is before the first."""


class Silent:
    """An observer that says nothing."""

    def note(self, text: str) -> None: ...
    def stage(self, name: str, total: int, done: int = 0) -> None: ...
    def step(self, done: int, metrics: dict[str, Any]) -> None: ...
    def within(self, what: str, done: int, total: int) -> None: ...
    def evaluation(self, step: int, result: Evaluation) -> None: ...
