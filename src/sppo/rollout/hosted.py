"""A policy and an engine for one client after the other: one job at a time, and always clear which weights they hold.

New weights come tensor by tensor. From their announcement until all of them are there it holds nothing, and samples
nothing: half of an update is no policy. A load that broke off stays so until a whole one comes.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..connections import Refusal
from ..models.policy import Policy
from ..models.weights import fingerprint, write
from .engine import Engine
from .wire import Wanted, dtype_of, layout, layout_hash

MOST_WAITING = 16
"""Jobs that may wait for the engine."""


class CalledOff(Exception):
    """Nobody waits for the result any more."""


@dataclass(frozen=True, slots=True)
class Held:
    """Whole weights: the name of the load that brought them, the number of steps after which they were taken."""

    load: str
    version: int
    fingerprint: str


@dataclass(slots=True)
class Loading:
    """Weights that are coming, and the names of those that are still missing."""

    load: str
    version: int
    missing: set[str]
    receiving: bool = False


@dataclass(eq=False, slots=True)
class Job:
    """Something for the engine to do. `finished` counts sequences, of `of`."""

    what: str
    of: int
    work: Callable[[Job], Iterable[Any]]
    finished: int = 0
    called_off: bool = False
    began: float = 0.0
    future: Future[Iterable[Any]] = field(default_factory=Future)

    def heard(self, finished: int) -> None:
        """The engine's progress. Raises CalledOff, which ends a generation where nobody waits for it."""
        self.finished = finished
        if self.called_off:
            raise CalledOff

    def call_off(self) -> None:
        """Nobody waits for it any more: it does not begin, or ends when its next sequence is finished."""
        self.called_off = True
        self.future.cancel()

    def run(self) -> None:
        """Do it, unless it was called off. KeyboardInterrupt and its kind end the job and pass."""
        if not self.future.set_running_or_notify_cancel():
            return
        self.began = time.monotonic()
        try:
            self.future.set_result(self.work(self))
        except Exception as error:
            self.future.set_exception(error)
        except BaseException:
            self.future.set_exception(CalledOff())
            raise


class Hosted:
    """`begin` and `receivable` answer at once, from any thread; the other methods are the work of jobs, and run in
    the thread of `forever`."""

    def __init__(self, policy: Policy, engine: Engine) -> None:
        self.policy, self.engine = policy, engine
        self.layout = layout(policy)
        self.layout_hash = layout_hash(self.layout)
        self.held: Held | None = Held("start", 0, policy.fingerprint())
        self.loading: Loading | None = None
        self.running: Job | None = None
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return self._queue.qsize()

    def submit(self, what: str, of: int, work: Callable[[Job], Iterable[Any]]) -> Job:
        """Have the engine's thread do something. Raises Refusal (503) where too much waits already."""
        if self.waiting >= MOST_WAITING:
            raise Refusal(503, f"{self.waiting} requests wait for the engine already")
        job = Job(what, of, work)
        self._queue.put(job)
        return job

    def forever(self) -> None:
        """Do jobs, until `stop`."""
        while (job := self._queue.get()) is not None:
            self.running = job
            try:
                job.run()
            finally:
                self.running = None

    def stop(self) -> None:
        """Have `forever` return after the jobs that wait; from any thread."""
        self._queue.put(None)

    # -- loading -------------------------------------------------------------------------------------------------------

    def begin(self, version: int, layout_hash: str) -> str:
        """Announce whole new weights: from here on it holds nothing. Returns the name of this load; an earlier one that
        is not whole yet ends. Raises Refusal for those of another model, which changes nothing."""
        if layout_hash != self.layout_hash:
            raise Refusal(409, "these weights are of another model than the server's")
        with self._lock:
            self.held, self.loading = None, Loading(secrets.token_hex(8), version, set(self.policy.trained))
            return self.loading.load

    def receivable(self, load: str, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """The weight of this name, whose bytes may come now. Raises Refusal."""
        loading = self._current(load)
        own = self.policy.trained.get(name)
        if own is None:
            raise Refusal(409, f"the model has no weight {name[:200]} that is trained")
        if (dtype, tuple(shape)) != (dtype_of(own), tuple(own.shape)):
            raise Refusal(409, f"weight {name} is {dtype_of(own)} of shape {list(own.shape)} here")
        if loading.receiving:
            raise Refusal(409, "another weight of this load is being received")
        return own

    def take(self, load: str, name: str, tensor: Tensor, sent: str) -> list[Any]:
        """Take one weight over. Raises Refusal, and ends the load, where it is not what was sent."""
        loading = self._current(load)
        if fingerprint([(name, tensor)]) != sent:
            with self._lock:
                self.loading = None if self.loading is loading else self.loading
            raise Refusal(409, f"weight {name} is not what was sent (its fingerprint differs); it holds nothing now")
        write({name: self.policy.trained[name]}, [(name, tensor)])
        loading.missing.discard(name)
        return []

    def finish(self, load: str) -> list[Any]:
        """Let the engine sample from the weights that came. Raises Refusal where some are missing."""
        loading = self._current(load)
        if loading.missing:
            raise Refusal(409, f"{len(loading.missing)} weights did not come, {min(loading.missing)} among them")
        self.engine.load(self.policy.weights(), loading.version)
        held = Held(load, loading.version, self.policy.fingerprint())
        with self._lock:
            if self.loading is not loading:  # another one has been announced meanwhile
                raise Refusal(409, "another load has begun")
            self.held, self.loading = held, None
        return [{"version": held.version, "fingerprint": held.fingerprint}]

    def _current(self, load: str) -> Loading:
        loading = self.loading
        if loading is None or loading.load != load:
            raise Refusal(409, "there is no such load: another one has begun since, or it ended")
        return loading

    # -- asking the engine ---------------------------------------------------------------------------------------------

    def generate(self, wanted: Wanted, job: Job) -> Iterable[Any]:
        """The samples. Raises Refusal where other weights are held."""
        self._holding(wanted.load)
        return self.engine.generate(wanted.prompts, wanted.seeds, wanted.sampling, job.heard, wanted.limits)

    def score(self, load: str, prompts: list[list[int]], responses: list[list[int]]) -> Iterable[Any]:
        """log π of each token of each response. Raises Refusal where other weights are held."""
        self._holding(load)
        return self.engine.score(prompts, responses)

    def holds(self, load: str, fingerprint: str) -> list[Any]:
        """Whether the engine holds the weights of this load, and they have this fingerprint where they are."""
        held = self.held
        return [held is not None and held.load == load and self.engine.holds(fingerprint)]

    def _holding(self, load: str) -> None:
        held = self.held
        if held is None:
            raise Refusal(409, "it holds nothing: a load has begun that is not whole")
        if held.load != load:
            raise Refusal(409, "it holds other weights: it was started again, or another run has loaded its own")
