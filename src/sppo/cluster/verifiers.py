"""Verifiers: actors that judge (`reward.workers`), each with the same reward.

A call is divided into chunks in the order of its rollouts, by their number and that of the workers alone; whichever judges a chunk gives the same
verdicts. A reward that may not be divided (`divisible = False`; a user's own, unless it says `divisible = True`) gets each call whole, in one
worker; the others stand by. A worker that dies or hangs is replaced, and its chunk is judged again by another one.

Programs are judged on nodes that have bubblewrap: a worker that cannot judge a task of the run is named, and not used. Where the cluster has a
custom resource `bubblewrap` (`ray start --resources '{"bubblewrap": 1}'`), workers are started on nodes that have it. No cores are reserved.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..audit.verifier import verifier_sha256
from ..errors import RecipeError, RewardError, RunFailure, UserError, WorkerLost
from ..files import first_line
from ..rewards.base import Reward
from ..rewards.combine import MixedReward
from ..rewards.loading import Elsewhere
from ..rewards.user_reward import LEAST, CallableReward, UserJudge
from ..types import Rollout, Task, Verdict
from .calls import Failed, Handle, VerifierWorker, outcomes, raised
from .fleet import Fleet
from .verifier import Verifier
from .versions import same_versions

CHUNKS = 4
"""Of a call, per worker: a slow one holds up no more than one of them."""
SHARE = 0.001
"""Of a node's resource `bubblewrap`, per worker."""
OF_A_NODE = (
    "CUDA",
    "DISPLAY",
    "HOME",
    "HOST",
    "LD_",
    "NCCL",
    "OMP_",
    "PATH",
    "PWD",
    "PYTHON",
    "RAY_",
    "SLURM",
    "TMP",
    "XDG_",
)
"""Beginnings of names of environment variables that say something of this node; the others travel, such as a reward's keys."""
OTHERS = 60.0
"""Seconds per response that parts of a mixture may take which have no limit of their own."""


class Overdue(RewardError):
    """A user's own reward waits for something that Python cannot interrupt."""


class Verifiers:
    """A Reward whose calls are judged by workers. `inner` is the same reward in this process, which judges nothing."""

    def __init__(self, fleet: Fleet, workers: int, make: Callable[[], Verifier], inner: Reward) -> None:
        """Begins to start them; `ready` waits for them. `make` is what a worker makes of itself."""
        self.fleet, self.inner, self.fade = fleet, inner, 1.0
        self.verifier_sha256 = ""
        self._make, self._workers, self._number, self._divisible = make, workers, 0, False
        self._free: list[Handle] = []
        self._opening: dict[Any, Handle] = {}
        self._lock = threading.RLock()
        for _ in range(workers):
            self._start()

    def ready(self) -> None:
        """Wait until all have started. Raises the UserError of the last one where none of them can judge here."""
        while self._opening:
            self._opened(*next(outcomes(self._opening)))
        if self._workers > 1 and not self._divisible:
            self.fleet.note(
                "reward.workers: this reward judges a whole call at once, in one worker, and the others stand by (your own says "
                "`divisible = True` where it judges every response by itself)"
            )

    # -- the reward --------------------------------------------------------------------------------------------------------

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """As the reward judges in one process. Raises what it raises, or RunFailure where too many workers are lost."""
        with self._lock:
            if not rollouts:
                return []
            size = chunk_size(len(rollouts), self._workers) if self._divisible else len(rollouts)
            chunks = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
            try:
                return self._judged(chunks)
            except RewardError as error:
                if len(chunks) == 1 or isinstance(error, Overdue):
                    raise
                return self._judged([rollouts])  # how many faults are too many depends on the whole call

    def check(self, task: Task) -> str | None:
        """Not looked at here: each worker has checked a task of the run."""
        return None

    def close(self) -> None:
        """End all workers, for good."""
        for handle in [*self._free, *self._opening.values()]:
            with contextlib.suppress(Exception):  # what is gone needs no end
                handle.kill()
        self._free, self._opening = [], {}
        self.inner.close()

    def metrics(self) -> dict[str, Any]:
        """Workers that judge."""
        return {"cluster/verifiers": len(self._free)}

    # -- chunks ------------------------------------------------------------------------------------------------------------

    def _judged(self, chunks: Sequence[Sequence[Rollout]]) -> list[Verdict]:
        """Of all chunks in order. After an error no more are begun; that of the first chunk is raised once the others have ended."""
        todo, found = deque(range(len(chunks))), dict[int, list[Verdict]]()
        running: dict[Any, Handle] = {}
        at: dict[Any, tuple[int, float]] = {}
        failed: dict[int, BaseException] = {}
        while running or (todo and not failed):
            for handle in [h for h in self._free if h not in running.values()][: 0 if failed else len(todo)]:
                ref = self._begun(handle, chunks[index := todo.popleft()])
                running[ref], at[ref] = handle, (index, time.monotonic() + self._most(len(chunks[index])))
            waiting = {**running, **self._opening}
            if not waiting:
                raise RunFailure("no verifier worker is left")
            ref, handle, value = next(outcomes(waiting, lambda: self._overdue(running, at)))
            if ref not in running:
                self._opened(ref, handle, value)
                continue
            del running[ref]
            index = at[ref][0]
            if isinstance(value, WorkerLost):
                todo.appendleft(index)
                self._lose(handle, value)
            elif isinstance(value, Failed):
                failed[index] = raised(handle, value)
            else:
                found[index] = pickle.loads(value)
        if failed:
            raise failed[min(failed)]
        return [verdict for index in range(len(chunks)) for verdict in found[index]]

    def _begun(self, handle: Handle, chunk: Sequence[Rollout]) -> Any:
        try:
            return handle.call("judge", list(chunk), self.fade)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise RecipeError(
                f"reward.workers: a row of this task holds what cannot be sent to another process ({first_line(error)}): set "
                "reward.workers = 0"
            ) from None

    def _most(self, responses: int) -> float:
        """Seconds that a chunk may take. A user's own reward is interrupted at its limit, but not where it waits outside of Python."""
        parts = [p.reward for p in self.inner.parts] if isinstance(self.inner, MixedReward) else [self.inner]
        own = [p.limit for p in parts if isinstance(p, CallableReward | UserJudge)]
        others = (len(parts) - len(own)) * OTHERS * responses
        return (
            sum(2 * limit + LEAST * responses for limit in own) + others + self.fleet.section.timeout
            if own
            else float("inf")
        )

    def _overdue(self, running: Mapping[Any, Handle], at: Mapping[Any, tuple[int, float]]) -> None:
        """Raises RewardError where a user's own reward does not come back."""
        for ref, handle in running.items():
            if time.monotonic() > at[ref][1]:
                self._drop(handle)
                self._start()
                raise Overdue(f"the reward did not come back on {handle.name}, long after its limit (reward.limit)")

    # -- workers -----------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._number += 1
        handle = self.fleet.actor(VerifierWorker, f"verifier {self._number}", cpus=0, gpus=0, **places(self.fleet))
        self._opening[handle.open(self._make, self.fleet.section.start_timeout)] = handle

    def _opened(self, ref: Any, handle: Handle, value: Any) -> None:
        """One has started, or not."""
        self._opening.pop(ref, None)
        if isinstance(value, WorkerLost):
            self._lose(handle, value)
            return
        if isinstance(value, Failed):
            raise raised(handle, value)
        same_versions(handle.name, value["versions"])
        if (why := value["refused"]) is not None:
            self._drop(handle)
            if not self._free and not self._opening:
                raise why
            self.fleet.note(f"{handle.name} is not used, because its node cannot judge here: {why}")
            return
        self._same_reward(handle, value["sha256"])
        self._divisible = value["divisible"]
        self._free.append(handle)

    def _same_reward(self, handle: Handle, sha256: str) -> None:
        """Raises UserError where a worker's reward is other code."""
        parts = [p.reward for p in self.inner.parts] if isinstance(self.inner, MixedReward) else [self.inner]
        known = self.verifier_sha256
        if not known:
            known = sha256 if any(isinstance(p, Elsewhere) for p in parts) else verifier_sha256(self.inner)
        if sha256 != known:
            raise UserError(
                f"{handle.name} has other code of this reward than this process: have the same files on every node"
            )
        self.verifier_sha256 = known

    def _lose(self, handle: Handle, error: WorkerLost) -> None:
        self._drop(handle)
        self.fleet.account(error)
        self._start()

    def _drop(self, handle: Handle) -> None:
        handle.kill()
        self._free = [h for h in self._free if h is not handle]
        self._opening = {ref: h for ref, h in self._opening.items() if h is not handle}


def places(fleet: Fleet) -> dict[str, Any]:
    """Ray's options that say where verifiers run: spread over a cluster's nodes, and on those with bubblewrap where that is known."""
    found: dict[str, Any] = {"scheduling_strategy": "SPREAD"} if fleet.section.address else {}
    if "bubblewrap" in fleet.resources:
        found["resources"] = {"bubblewrap": SHARE}
    return found


def chunk_size(responses: int, workers: int) -> int:
    """Responses per chunk: a worker's share of a call, in four."""
    return 1 if responses == 0 else -(-responses // (CHUNKS * workers))


def verifiers(fleet: Fleet, workers: int, given: str | Reward, limit: float, task: Task, inner: Reward) -> Verifiers:
    """Begin to start workers that judge by `reward.use`, or by a reward given in Python, where it can be pickled. Raises RecipeError."""
    source: str | bytes
    if isinstance(given, str):
        source = given
    else:
        from ray import cloudpickle

        try:
            source = cloudpickle.dumps(given)
        except Exception as error:
            raise RecipeError(
                f"this run's reward was given in Python and cannot be sent to other processes ({first_line(error)}): set reward.workers = 0, or "
                "name it in the recipe (reward.use = 'module:object')"
            ) from None
    path = [] if isinstance(given, str) else list(sys.path)
    travels = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_NODE)}
    variables = travels if fleet.section.address else {}  # actors of a local cluster inherit them
    make = partial(Verifier, source, limit, task, Path.cwd(), variables, path, torch.get_num_threads())
    return Verifiers(fleet, workers, make, inner)
