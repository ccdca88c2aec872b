"""The engine of a cluster: workers with engines of their own, which get chunks of prompts and the learner's weights.

A chunk is the unit of work, and of doing it again: whichever worker has the weights gives the same samples. A worker that dies or hangs loses its
chunk to another one; a fresh one starts beside, and is given the weights at the next sync, or at once where no other is left.

    STARTING -> STALE -> HEALTHY     it has its models; it holds the weights of now
    DEAD                             replaced, as long as cluster.restarts allows
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import DataError, ModelError, StaleWeights, WorkerLost
from ..files import first_line
from ..models.weights import Weights
from ..rollout.engine import Sample, Sampling
from .calls import Failed, Handle, RolloutWorker, outcomes, raised
from .fleet import Fleet
from .journal import Journal, key
from .learners import LearnerGroup
from .versions import same_versions

STARTING, STALE, HEALTHY = "STARTING", "STALE", "HEALTHY"


class FleetEngine:
    """See `rollout.engine.Engine`. Weights come from the learner's ranks, not through this process."""

    def __init__(
        self, fleet: Fleet, learners: LearnerGroup, make: Callable[[int, bool], Callable[[], Any]], journal: Journal
    ) -> None:
        """`make` gives what a worker that starts now makes of itself, by its place, from 0, and whether another one was lost there. Raises
        what a worker raised."""
        self.fleet, self.learners, self.journal, self._make = fleet, learners, journal, make
        self.chunk = fleet.section.chunk
        self.states: dict[Handle, str] = {}
        self._places: dict[Handle, int] = {}
        self._opening: dict[Any, Handle] = {}
        self._number = self.version = 0
        self._meeting: Any = None
        self.fingerprint, self._replayed = "", False
        for _ in range(fleet.section.rollouts):
            self._start()
        facts = self._joined(wait=True)
        self.stated, self.context = facts["stated"], facts["context"]

    # -- the engine ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Sample]:
        """Chunk by chunk, each by whichever worker is free; what the journal has is not sampled again."""
        size = self.chunk or max(len(prompts), 1)
        cuts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        asked = [(prompts[c], seeds[c], sampling, None if limits is None else limits[c]) for c in cuts]
        names = [key(self.fingerprint, sampling, p, s, most) for p, s, _, most in asked]
        found = {
            i: known for i, name in enumerate(names) if (known := self.journal.find(self.version, name)) is not None
        }
        if self._replayed and len(found) < len(cuts):
            raise DataError(
                f"{self.journal.folder} lacks samples of the steps to come: put it back, or resume an older checkpoint"
            )
        todo = deque(i for i in range(len(cuts)) if i not in found)
        running: dict[Any, Handle] = {}
        at: dict[Any, int] = {}

        def tick() -> None:
            if progress is not None:
                progress(sum(map(len, found.values())) + sum(int(h.progress or 0) for h in running.values()))

        while len(found) < len(cuts):
            busy = set(running.values())
            for handle in [h for h in self._healthy() if h not in busy][: len(todo)]:
                ref = handle.call("generate", *asked[index := todo.popleft()])
                running[ref], at[ref] = handle, index
            if not running:
                self._revive()
                continue
            ref, handle, value = next(outcomes(running, tick))
            if isinstance(value, WorkerLost):
                todo.appendleft(at[ref])
                self._lose(handle, value)
            elif isinstance(value, Failed):
                raise raised(handle, value)
            else:
                found[at[ref]] = value
                self.journal.keep(self.version, names[at[ref]], value)
                tick()
        return [sample for i in range(len(cuts)) for sample in found[i]]

    @contextlib.contextmanager
    def replaying(self, version: int, fingerprint: str, journal: Journal) -> Iterator[None]:
        """Until the block ends samples come from a journal, of weights that are gone. Raises DataError where it lacks some."""
        before = self.version, self.fingerprint, self.journal
        self.version, self.fingerprint, self.journal, self._replayed = version, fingerprint, journal, True
        try:
            yield
        finally:
            (self.version, self.fingerprint, self.journal), self._replayed = before, False

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """By one of them; the canary asks all (`scores`)."""
        return next(iter(self.scores(prompts, responses).values()))

    def scores(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> dict[str, list[list[float]]]:
        """What every worker says of given responses, by its name."""
        return self._asked("score", prompts, responses)

    def load(self, weights: Weights, version: int) -> None:
        """Give every worker the weights that the learner's ranks hold now; those that have started since join."""
        self.version = version
        self._joined(wait=not (self._healthy() or self._stale()))
        self._send()

    def holds(self, fingerprint: str) -> bool:
        """Whether every worker does. Raises StaleWeights naming one that does not."""
        for name, held in self._asked("holds", fingerprint).items():
            if not held:
                raise StaleWeights(
                    f"{name} does not hold the learner's weights after a sync: their fingerprints differ"
                )
        self.fingerprint = fingerprint
        return True

    def close(self) -> None:
        """End all workers."""
        for handle in [*self.states]:
            self._drop(handle)

    def meet_anew(self) -> None:
        """The learner's ranks are other ones: no channel to them is left."""
        self._meeting = None

    def metrics(self) -> dict[str, Any]:
        """Workers by state, and how many were lost."""
        counts = {
            f"cluster/{state.lower()}": sum(s == state for s in self.states.values())
            for state in (HEALTHY, STALE, STARTING)
        }
        return {**counts, "cluster/learners": len(self.learners.ranks), "cluster/lost": self.fleet.lost}

    # -- workers ---------------------------------------------------------------------------------------------------------

    def _healthy(self) -> list[Handle]:
        return [h for h, state in self.states.items() if state == HEALTHY]

    def _stale(self) -> list[Handle]:
        return [h for h, state in self.states.items() if state == STALE]

    def _start(self) -> None:
        self._number += 1
        section = self.fleet.section
        handle = self.fleet.actor(
            RolloutWorker, f"rollout worker {self._number}", cpus=section.rollout_cpus, gpus=self.fleet.devices[1]
        )
        place = next(i for i in range(section.rollouts) if i not in self._places.values())
        self._places[handle] = place
        self._opening[handle.open(self._make(place, self._number > section.rollouts), section.start_timeout)] = handle
        self.states[handle] = STARTING

    def _joined(self, wait: bool) -> dict[str, Any]:
        """Let those that have started be given weights; `wait` for all. Returns the facts of the last one."""
        import ray

        facts: dict[str, Any] = {}
        while self._opening:
            if not wait and not ray.wait([*self._opening], timeout=0)[0]:
                break
            _, handle, value = next(outcomes(self._opening))
            if isinstance(value, WorkerLost):
                self._lose(handle, value)
            elif isinstance(value, Failed):
                raise raised(handle, value)
            else:
                same_versions(handle.name, value["versions"])
                if value["layout"] != self.learners.facts["layout"]:
                    raise ModelError(
                        f"{handle.name} has weights of other names or shapes than the learner: have the same model on every node"
                    )
                self.states[handle], facts = STALE, value
        return facts

    def _revive(self) -> None:
        """Nobody is left that holds the weights: fresh ones get them, if the learner has them still."""
        gone = WorkerLost("every rollout worker is gone, and the learner has begun to change the weights they had")
        if self.learners.busy:
            raise gone
        self._joined(wait=not self._stale())
        self._send()
        if self.fingerprint and not all(self._asked("holds", self.fingerprint).values()):
            raise gone

    def _send(self) -> None:
        """Broadcast until every worker that is left has received."""
        while True:
            receivers = [*self._healthy(), *self._stale()]
            if not receivers:
                self._joined(wait=True)
                continue
            if self._meeting is None or self._meeting[1] != receivers:
                self._meeting = self.fleet.meeting(len(receivers) + 1), receivers
            meeting = self._meeting[0]
            received = {h.call("receive", meeting, i, self.version): h for i, h in enumerate(receivers, 1)}
            sent = self.learners.begun("send", meeting)
            if self._delivered({**received, **sent}):
                for handle in receivers:
                    self.states[handle] = HEALTHY
                return
            self._meeting = None

    def _delivered(self, running: dict[Any, Handle]) -> bool:
        """Whether a broadcast went well; those that were lost in it are replaced. Raises WorkerLost where a rank of the learner was."""
        lost: list[tuple[Handle, WorkerLost]] = []
        failed: list[tuple[Handle, Failed]] = []
        for _, handle, value in outcomes(running):
            if isinstance(value, WorkerLost):
                lost.append((handle, value))
            elif isinstance(value, Failed):
                failed.append((handle, value))
        for handle, error in lost:
            if handle in self.learners.ranks:
                self.learners.kill()
                raise error
            self._lose(handle, error)
        for handle, failure in failed:
            if not lost and not failure.of_another:
                raise raised(handle, failure)
        if failed and not lost:
            self.fleet.account(WorkerLost(f"a transfer of weights broke off ({first_line(failed[0][1].error)})"))
        return not lost and not failed

    def _asked(self, name: str, *args: Any) -> dict[str, Any]:
        """What every worker with the weights answers, by its name; those that die meanwhile are replaced."""
        answers: dict[str, Any] = {}
        for _, handle, value in outcomes({h.call(name, *args): h for h in self._healthy()}):
            if isinstance(value, WorkerLost):
                self._lose(handle, value)
            elif isinstance(value, Failed):
                raise raised(handle, value)
            else:
                answers[handle.name] = value
        if not answers:
            self._revive()
            return self._asked(name, *args)
        return answers

    def _lose(self, handle: Handle, error: WorkerLost) -> None:
        self._drop(handle)
        self.fleet.account(error)
        self._start()

    def _drop(self, handle: Handle) -> None:
        handle.kill()
        self.states.pop(handle, None)
        self._places.pop(handle, None)
        self._opening = {ref: h for ref, h in self._opening.items() if h is not handle}
        self._meeting = None


def chunk_of(responses: int, rollouts: int) -> int:
    """Responses per chunk where a recipe leaves it open: a step's, divided; 0, all at once, for a single worker."""
    return 0 if rollouts == 1 else -(-responses // rollouts)
