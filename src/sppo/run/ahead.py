"""Sampling ahead of learning: with `cluster.lag` = k, step s + k is sampled from the weights of step s while step s is learnt.

The order is fixed, whatever takes how long: the problems of step s + k are drawn before the verdicts of step s are known to the curriculum, and the
weights change only once everything that was begun is sampled and judged. So two runs give the same bits. A checkpoint holds what was sampled
ahead (its weights are gone by then), and where the curriculum stood when each step's problems were drawn.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import Components
from .sample import Sampled, Search, sample

AHEAD = "ahead"
"""In a checkpoint: the samples of steps to come."""


@dataclass
class Pending:
    """A step that is being sampled, or was: from which weights, and where the curriculum stood before."""

    step: int
    version: int
    fingerprint: str
    before: dict[str, Any]
    future: Future[Sampled]


class Ahead:
    """The steps that are sampled but not learnt. Without a lag there are none."""

    def __init__(self, components: Components, search: Search | None) -> None:
        self.components, self.search = components, search
        section = components.config.cluster
        self.lag = 0 if section is None else section.lag
        self.pending: dict[int, Pending] = {}
        self._saved: list[dict[str, Any]] = []
        self._folder: Path | None = None
        self._one = ThreadPoolExecutor(1, "sampling-ahead")

    def before(self, step: int) -> dict[str, Any]:
        """Where the curriculum stood before a step's problems were drawn."""
        if step in self.pending:
            return self.pending[step].before
        return self.components.curriculum.state_dict()

    def sampled(self, step: int) -> Sampled:
        """A step's judged rollouts: those that were begun before, else sampled now. Raises what sampling them raised."""
        if step in self.pending:
            try:
                return self.pending[step].future.result()
            except BaseException:
                self.drop()  # what follows was drawn after it
                raise
            finally:
                self.pending.pop(step, None)
        return sample(self.components, step, self.search)

    def begin(self, step: int) -> None:
        """A step is about to be learnt: begin to sample those that follow, from the weights that are there now."""
        engine: Any = self.components.engine
        for later in range(step + 1, min(step + self.lag, self.components.config.training.steps - 1) + 1):
            if later not in self.pending:
                self.settle()  # one after the other: each draws its problems where the last one stopped
                before = self.before(later)
                future = self._one.submit(sample, self.components, later, None)
                self.pending[later] = Pending(later, engine.version, engine.fingerprint, before, future)

    def settle(self) -> None:
        """Wait until all that was begun is sampled and judged; what went wrong is raised when its step comes."""
        for p in self.pending.values():
            p.future.exception()

    def drop(self) -> None:
        """Forget all of it, once it has ended."""
        self.settle()
        self.pending.clear()
        self._saved = []

    # -- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> list[dict[str, Any]]:
        """Put what was sampled ahead into a checkpoint's folder; returns what else it takes to have it again."""
        kept = [p for p in self.pending.values() if p.future.exception() is None]
        for p in kept:
            self.components.models.copy_journal(p.version, folder / AHEAD)
        return [{"step": p.step, "version": p.version, "fingerprint": p.fingerprint, "before": p.before} for p in kept]

    def load(self, saved: list[dict[str, Any]], folder: Path) -> None:
        """What a checkpoint holds of steps to come; `recall` makes rollouts of it."""
        self._saved, self._folder = saved, folder / AHEAD

    def recall(self) -> None:
        """Have the steps again that were sampled ahead of a checkpoint: from its samples, judged once more. Raises DataError where
        these are incomplete."""
        c, saved, self._saved = self.components, self._saved, []
        if not saved:
            return
        assert self._folder is not None
        now = c.curriculum.state_dict()
        for entry in saved:
            c.curriculum.load_state_dict(entry["before"])
            with c.models.replaying(entry["version"], entry["fingerprint"], self._folder):
                found: Future[Sampled] = Future()
                found.set_result(sample(c, entry["step"], None))
            self.pending[entry["step"]] = Pending(**entry, future=found)
        c.curriculum.load_state_dict(now)

    def close(self) -> None:
        """End the thread."""
        self._one.shutdown(wait=False, cancel_futures=True)
