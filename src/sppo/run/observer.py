"""Who hears what a run does: a progress display (`report/progress.py`), a test, nobody."""

from __future__ import annotations

from typing import Any, Protocol

from ..evaluation.evaluate import Evaluation


class Observer(Protocol):
    """Hears what a run does; a progress display implements it. See `report/progress.py`."""

    def note(self, text: str) -> None:
        """A statement for the user: a choice that was made, a warning."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A stage (`bootstrap`, `train`) of `total` steps begins."""

    def step(self, done: int, metrics: dict[str, Any]) -> None:
        """A step of the stage is done."""

    def within(self, what: str, done: int, total: int) -> None:
        """How far a step is: `sampling` and `judging` responses, `updating` by micro-batches, or `evaluating`. Called often."""

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Held-out problems were tried."""


class Silent:
    """An observer that says nothing."""

    def note(self, text: str) -> None: ...
    def stage(self, name: str, total: int, done: int = 0) -> None: ...
    def step(self, done: int, metrics: dict[str, Any]) -> None: ...
    def within(self, what: str, done: int, total: int) -> None: ...
    def evaluation(self, step: int, result: Evaluation) -> None: ...
