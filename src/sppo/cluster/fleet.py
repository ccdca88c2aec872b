"""Where the actors run: a Ray cluster that is there, or one that is started here and ends with the run."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from ..distributed.transfer import Meeting
from ..errors import RecipeError, RunFailure, WorkerLost
from ..files import first_line
from ..recipe.sections import ClusterSection
from .calls import HEALTH, Failed, Handle, Hosted, outcomes, raised
from .versions import same_versions

STORE_BYTES = 512 * 2**20
"""Of a local cluster's object store, which carries ids and verdicts, no weights."""
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""An actor computes in a thread beside its main one, and glibc gives such threads heaps of 64 MB: every larger tensor would be mapped, and zeroed by the
kernel, anew (memory.keep_memory)."""
LONGEST_BACKOFF = 60.0
"""Seconds."""


class Fleet:
    """Ray, the store in which process groups meet, and the account of what was lost."""

    def __init__(self, section: ClusterSection, note: Callable[[str], None]) -> None:
        """Raises RecipeError where Ray is not installed, the cluster is not there, or has less than the recipe asks for."""
        self.section, self.note = section, note
        self.lost = 0
        self._spare: dict[type[Hosted], list[Handle]] = {}
        self._ray = _connected(section)
        self._enough()
        self.host = "127.0.0.1" if not section.address else self._ray.util.get_node_ip_address()
        self.store = TCPStore(
            self.host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=section.timeout)
        )
        self._meetings = 0

    @property
    def devices(self) -> tuple[float, float]:
        """GPUs of a learner rank, and of a rollout worker."""
        default = 1.0 if self._ray.cluster_resources().get("GPU", 0) else 0.0
        asked = (self.section.learner_gpus, self.section.rollout_gpus)
        ranks, workers = (default if gpus is None else gpus for gpus in asked)
        return ranks, workers

    @property
    def resources(self) -> dict[str, float]:
        """What the cluster has, by Ray's names."""
        found: dict[str, float] = self._ray.cluster_resources()
        return found

    def _enough(self) -> None:
        """Raises RecipeError where the cluster lacks what actors would wait for, for ever."""
        s, there = self.section, self._ray.cluster_resources()
        (rank_gpus, worker_gpus), has = self.devices, there.get("GPU", 0.0)
        gpus = s.learners * rank_gpus + s.rollouts * worker_gpus
        if gpus > has:
            raise RecipeError(
                f"[cluster] asks for {gpus:g} GPUs ({s.learners} learners, {s.rollouts} rollouts), and there are {has:g}: lower "
                "cluster.learners or cluster.rollouts, or let them share (cluster.learner_gpus, cluster.rollout_gpus)"
            )
        cpus, cores = s.learners * s.learner_cpus + s.rollouts * s.rollout_cpus, there.get("CPU", 0.0)
        if s.address and cpus > cores:
            raise RecipeError(
                f"[cluster] reserves {cpus:g} CPU cores, and the cluster has {cores:g}: lower cluster.learner_cpus or rollout_cpus"
            )

    def prepare(self, kind: type[Hosted], number: int, inner: type, *, cpus: float, gpus: float, **where: Any) -> None:
        """Start actors that will be asked for later, and let them import what an object of class `inner` needs. `where` are Ray's options
        that say on which node."""
        for _ in range(number):
            spare = Handle("", self._new(kind, cpus, gpus, where), self.section.timeout)
            spare.actor.warm.remote(inner)
            spare.lives()  # asks for a first sign of life
            self._spare.setdefault(kind, []).append(spare)

    def actor(self, kind: type[Hosted], name: str, *, cpus: float, gpus: float, **where: Any) -> Handle:
        """One that was prepared, else one that is started now; it comes as it may."""
        if spare := self._spare.get(kind):
            found = spare.pop()
            found.name = name
            return found
        return Handle(name, self._new(kind, cpus, gpus, where), self.section.timeout)

    def _new(self, kind: type[Hosted], cpus: float, gpus: float, where: dict[str, Any]) -> Any:
        return self._ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, concurrency_groups={HEALTH: 1},
            runtime_env={"env_vars": _inherited()} if self.section.address else None,  # a local cluster inherits them
            **where,
        )(kind).remote()  # fmt: skip

    def opened(self, makes: dict[Handle, Callable[[], Any]]) -> dict[Handle, Any]:
        """Make an object in each actor; returns their facts. Raises what one raised, or WorkerLost."""
        running = {handle.open(make, self.section.start_timeout): handle for handle, make in makes.items()}
        found: dict[Handle, Any] = {}
        for _, handle, value in outcomes(running):
            if isinstance(value, WorkerLost):
                raise value
            if isinstance(value, Failed):
                raise raised(handle, value)
            same_versions(handle.name, value["versions"])
            found[handle] = value
        return found

    def put(self, value: Any) -> Any:
        """A reference to a value for several calls."""
        return self._ray.put(value)

    def meeting(self, size: int) -> Meeting:
        """A new place for a process group of this size to meet."""
        self._meetings += 1
        return Meeting(self.host, self.store.port, f"{os.getpid()}-{self._meetings}", size, self.section.timeout)

    def account(self, lost: WorkerLost) -> None:
        """Count a loss, and wait a little longer each time. Raises RunFailure once there were too many."""
        self.lost += 1
        if self.lost > self.section.restarts:
            raise RunFailure(
                f"{lost}; it was the {self.lost}th worker lost, and cluster.restarts = {self.section.restarts}: look into Ray's logs"
            ) from lost
        self.note(f"warning: {lost}; it is replaced ({self.lost} of {self.section.restarts})")
        time.sleep(min(LONGEST_BACKOFF, self.section.backoff * 2 ** (self.lost - 1)))

    def close(self) -> None:
        """End every actor, and the cluster where it was started here."""
        with contextlib.suppress(Exception):  # what is gone needs no end
            self._ray.shutdown()


def _inherited() -> dict[str, str]:
    """What threads need to know, of this process's environment; the reward's own variables stay here."""
    names = (*ONE_HEAP, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN")
    return ONE_HEAP | {name: os.environ[name] for name in names if name in os.environ}


@contextlib.contextmanager
def _inheritable() -> Iterator[None]:
    """Until the block ends this process's environment holds what the processes of a cluster begin with, unless the user has set it."""
    given = {name: value for name, value in ONE_HEAP.items() if name not in os.environ}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]


def _connected(section: ClusterSection) -> Any:
    """Ray, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let any other program stop a step
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if section.address and (Path.home() / ".ray" / "auth_token").exists():  # which `ray start` asks for then
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise RecipeError("[cluster] needs Ray: pip install 'sppo[cluster]'") from None
    with contextlib.suppress(
        AttributeError
    ):  # Ray's driver prints, on standard output, that a worker died; we say it, and which
        ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if not section.address:
        needed = section.learners * section.learner_cpus + section.rollouts * section.rollout_cpus
        quiet |= {"num_cpus": max(os.cpu_count() or 1, int(needed) + 1), "include_dashboard": False}
        quiet["object_store_memory"] = STORE_BYTES
    _must_answer(section.address)
    for again in (True, False):
        try:
            with _inheritable():
                ray.init(address=section.address or "local", **quiet)
            break
        except Exception as error:  # Ray raises plain ones too
            ray.shutdown()
            if again and not section.address:  # a busy machine was too slow for it
                continue
            here = "Ray does not start here"
            where = f"cluster.address = {section.address!r}: no Ray cluster answers there" if section.address else here
            mend = "; start one (ray start --head), or leave cluster.address out" if section.address else ""
            raise RecipeError(f"{where} ({first_line(error)}){mend}") from None
    return ray


def _must_answer(address: str) -> None:
    """Raises RecipeError where nobody listens at a `host:port`: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():  # 'auto', or ray://…
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise RecipeError(
            f"cluster.address = {address!r}: no Ray cluster answers there ({error.strerror or error}); start one (ray start --head), or "
            "leave cluster.address out"
        ) from None
