"""The models of a run on the ranks of a cluster, and the engine of its rollout workers: what `build` makes where a recipe has [cluster]."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..cluster.calls import LearnerRank, RolloutWorker, VerifierWorker
from ..cluster.fleet import Fleet
from ..cluster.journal import Journal
from ..cluster.learners import LearnerGroup
from ..cluster.remote import RemoteCritic, RemoteImitation, RemoteLearner, RemotePolicy
from ..cluster.rollouts import FleetEngine, chunk_of
from ..cluster.verifier import Verifier
from ..cluster.verifiers import Verifiers, places, verifiers
from ..errors import RecipeError, WorkerLost
from ..learning.learner import Learner
from ..learning.sft import Imitation
from ..models.mlp import is_control
from ..recipe.config import Config
from ..rewards.base import Reward
from ..rollout.engine import Engine
from ..rollout.served import of_worker
from ..types import Task
from .directory import step_name
from .models import Models, Note, Parts
from .plan import Plan
from .rank import Rank, Sampler


class OnCluster(Models):
    """See `Models`: policy and critic are on the learner's ranks."""

    def __init__(self, config: Config, parts: Parts, saved: Path | None, note: Note, *, run: Path) -> None:
        """`run` is the folder of the run, which every node can reach. Raises a UserError where the recipe cannot be obeyed."""
        section = config.cluster
        assert section is not None
        if config.rollout.engine == "control" or is_control(config.policy.model):
            raise RecipeError("[cluster] is for language models: leave it out with rollout.engine = 'control'")
        of_worker(config.rollout.engine, 0, section.rollouts)  # refused now, and not once the workers start
        responses = config.rollout.prompts * config.rollout.samples
        section = section.model_copy(update={"chunk": section.chunk or chunk_of(responses, section.rollouts)})
        config = config.model_copy(update={"cluster": section})
        self.run, self.note = run.resolve(), note
        threads = torch.get_num_threads()
        each = [threads if section.address else max(1, threads // n) for n in (section.learners, section.rollouts)]
        self._given = parts.reward
        self.verifiers: Verifiers | None = None
        self.parts = replace(parts, reward=None, train=None, evaluation=None, environment=None)  # models alone travel
        self.fleet = Fleet(section, note)
        try:
            gpus = self.fleet.devices
            self.fleet.prepare(LearnerRank, section.learners, Rank, cpus=section.learner_cpus, gpus=gpus[0])
            self.fleet.prepare(RolloutWorker, section.rollouts, Sampler, cpus=section.rollout_cpus, gpus=gpus[1])
            self.fleet.prepare(VerifierWorker, config.reward.workers, Verifier, cpus=0, gpus=0, **places(self.fleet))
            make = self._make = lambda config, saved, rank, meeting: partial(
                Rank, config, self.parts, _whole(saved), self.run, rank, meeting, each[0]
            )
            self.ranks = LearnerGroup(self.fleet, partial(make, config, saved))
        except BaseException:
            self.fleet.close()
            raise
        facts = self.ranks.facts
        self._say(facts["notes"])
        ranks, workers = (
            f"{n} {what}{'' if n == 1 else 's'}"
            for n, what in ((section.learners, "learner rank"), (section.rollouts, "rollout worker"))
        )
        note(f"cluster: {ranks}, {workers}")
        self.config, self.saved, self._threads = facts["config"], saved, each[1]
        self.policy = RemotePolicy(facts["policy"], self.ranks)
        self.critic = None if facts["critic"] is None else RemoteCritic(facts["critic"], self.policy)

    def _say(self, notes: list[str]) -> None:
        for said in notes:
            self.note(said)

    def planned(self, config: Config, prompt: int, note: Note) -> tuple[Config, Plan | None]:
        """See `Models`."""
        config, found, notes = self._early("planned", config, prompt)
        self._say(notes)
        return config, found

    def rated(self, config: Config) -> Config:
        """See `Models`."""
        found: Config = self._early("rated", config)
        return found

    def _early(self, name: str, *args: Any) -> Any:
        """What the ranks say before anything is learnt; they start again where one is lost."""
        while True:
            try:
                return self.ranks.call(name, *args)
            except WorkerLost as lost:
                self.fleet.account(lost)
                self.ranks.start(partial(self._make, self.config, self.saved))

    def engine(self, config: Config) -> Engine:
        """The engine of the rollout workers, which are started now."""
        self._early("settle", config)
        self.config = config
        self.journal = Journal(self.run / "journal")
        self.workers = FleetEngine(self.fleet, self.ranks, self._sampler, self.journal)
        if self.verifiers is not None:
            self.verifiers.ready()
        return self.workers

    def _sampler(self, place: int, again: bool) -> Callable[[], Sampler]:
        """What a rollout worker makes of itself: a resumed run's from a checkpoint that is still there."""
        return partial(Sampler, self.config, self.parts, _whole(self.saved), self._threads, place, again)

    def judging(self, reward: Reward, task: Task) -> Reward:
        """Verifier workers where the recipe asks for them: they start now, and are there once the engine is."""
        section = self.config.reward
        if not section.workers:
            return reward
        given = section.use if self._given is None else self._given
        self.verifiers = verifiers(self.fleet, section.workers, given, section.limit, task, reward)
        return self.verifiers

    def restart(self, lost: WorkerLost, saved: Path | None) -> None:
        """Fresh ranks, with the models of the checkpoint `saved`, or those of the recipe."""
        self.fleet.account(lost)
        self.workers.meet_anew()
        self.saved = saved
        self.ranks.start(partial(self._make, self.config, saved))
        self._early("settle", self.config)

    def metrics(self) -> dict[str, Any]:
        """See `Models`."""
        return {**self.workers.metrics(), **({} if self.verifiers is None else self.verifiers.metrics())}

    def kept(self, step: int) -> None:
        """See `Models`."""
        if self.saved is not None:  # which goes when newer ones are there
            self.saved = self.run / "checkpoints" / step_name(step)
        self.journal.forget(step - self.fleet.section.lag)

    def copy_journal(self, version: int, folder: Path) -> None:
        """See `Models`."""
        self.journal.copy(version, folder)

    def replaying(self, version: int, fingerprint: str, folder: Path) -> contextlib.AbstractContextManager[None]:
        """See `Models`."""
        return self.workers.replaying(version, fingerprint, Journal(folder))

    def finished(self) -> None:
        """See `Models`."""
        self.journal.close()

    def imitation(self, config: Config) -> Imitation:
        """See `Models`."""
        return RemoteImitation(self.ranks)

    def learner(self, config: Config, path: Path, saved: Path | None, *, tight: bool) -> Learner:  # type: ignore[override]
        """See `Models`."""
        self.ranks.call("begin", _whole(saved), tight)
        return RemoteLearner(self.ranks)

    def close(self) -> None:
        """End all actors, and Ray where it was started here."""
        self.ranks.kill()
        self.fleet.close()


def _whole(saved: Path | None) -> Path | None:
    """A checkpoint's folder as every process finds it."""
    return None if saved is None else saved.resolve()
