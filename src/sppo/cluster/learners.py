"""The learner's ranks as one: every call goes to all of them at the same time, and rank 0 answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..distributed.transfer import Meeting
from ..errors import WorkerLost
from ..files import first_line
from .calls import Failed, Handle, LearnerRank, outcomes, raised
from .fleet import Fleet


class LearnerGroup:
    """N ranks. Where one is lost, all are: they share every number."""

    def __init__(self, fleet: Fleet, make: Callable[[int, Meeting], Callable[[], Any]]) -> None:
        """`make` gives what rank r makes of itself. Raises what a rank raised, or WorkerLost."""
        self.fleet, self.ranks, self.busy = fleet, list[Handle](), False
        self._order = threading.Lock()
        self.start(make)

    def start(self, make: Callable[[int, Meeting], Callable[[], Any]]) -> None:
        """Start all ranks, in place of any that are there; and again where one is lost meanwhile."""
        while True:
            try:
                self._started(make)
                return
            except WorkerLost as lost:
                self.fleet.account(lost)

    def _started(self, make: Callable[[int, Meeting], Callable[[], Any]]) -> None:
        self.kill()
        size = self.fleet.section.learners
        gpus, cpus = self.fleet.devices[0], self.fleet.section.learner_cpus
        self.ranks = [self.fleet.actor(LearnerRank, f"learner rank {r}", cpus=cpus, gpus=gpus) for r in range(size)]
        meeting = self.fleet.meeting(size)
        try:
            facts = self.fleet.opened({handle: make(rank, meeting) for rank, handle in enumerate(self.ranks)})
        except BaseException:
            self.kill()
            raise
        self.facts = facts[self.ranks[0]]

    def begun(self, name: str, *args: Any) -> dict[Any, Handle]:
        """Begin a call on every rank."""
        if not self.ranks:
            raise WorkerLost("the learner's ranks are gone")
        with self._order:  # every rank must get its calls in the same order, whichever threads begin them
            return {handle.call(name, *args): handle for handle in self.ranks}

    def call(self, name: str, *args: Any, tick: Callable[[Any], None] | None = None) -> Any:
        """What rank 0 returns; `tick` is called with its progress about every second.

        Raises what a rank raised, or WorkerLost: then all of them are gone.
        """
        self.busy = True
        try:
            return self.settled(self.begun(name, *args), tick)
        finally:
            self.busy = False

    def settled(self, running: dict[Any, Handle], tick: Callable[[Any], None] | None = None) -> Any:
        """The end of a call."""
        found: Any = None

        def look() -> None:
            if tick is not None and self.ranks and self.ranks[0].progress is not None:
                tick(self.ranks[0].progress)

        for _, handle, value in outcomes(running, look):
            if isinstance(value, WorkerLost | Failed):
                error = value if isinstance(value, WorkerLost) else raised(handle, value)
                if isinstance(value, Failed) and value.of_another:
                    error = WorkerLost(f"{handle.name} lost another one ({first_line(value.error)})")
                if isinstance(error, WorkerLost):
                    self.kill()
                raise error
            if self.ranks and handle is self.ranks[0]:
                found = value
        return found

    def kill(self) -> None:
        """End all ranks."""
        ranks, self.ranks = self.ranks, []
        for handle in ranks:
            handle.kill()
