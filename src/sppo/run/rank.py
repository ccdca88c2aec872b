"""What actors of a cluster hold: the models and the learner of one rank, and the engine of one rollout worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cluster.remote import CriticFacts, PolicyFacts
from ..cluster.versions import versions
from ..distributed.mesh import Mesh
from ..distributed.ranks import join
from ..distributed.transfer import Channel, Layout, Meeting
from ..errors import RecipeError, WorkerLost
from ..learning.batch import Batch
from ..learning.learner import Learner
from ..learning.lessons import Lessons
from ..learning.sft import Imitation, Row
from ..learning.update_stats import Trace
from ..memory import keep_memory
from ..models.loading import pick_device
from ..models.policy import Policy
from ..models.sharding import shard
from ..recipe.config import Config
from ..rollout.engine import Sample, Sampling, load_engine
from ..rollout.served import of_worker
from ..types import Task
from .models import Models, Parts, load_policy
from .plan import Plan


def layout(policy: Policy) -> Layout:
    """Name, shape and dtype of each weight that travels, in order."""
    return [(name, tuple(p.shape), p.dtype) for name, p in sorted(policy.trained.items())]


def shapes(laid_out: Layout) -> list[tuple[str, tuple[int, ...]]]:
    """What a layout is on every process: a rank may hold its part in another dtype than it sends."""
    return [(name, shape) for name, shape, _ in laid_out]


class Rank:
    """One rank of the learner. All ranks are asked the same, in the same order; what rank 0 returns counts."""

    def __init__(
        self, config: Config, parts: Parts, saved: Path | None, run: Path, rank: int, meeting: Meeting, threads: int
    ) -> None:
        """`run` is the folder of the run, `threads` those of PyTorch."""
        keep_memory()
        torch.set_num_threads(threads)
        self.rank, self.run, self.saved, self.notes = rank, run, saved, list[str]()
        section = config.cluster
        assert section is not None
        self.mesh = Mesh()
        if meeting.size > 1:
            self.mesh = join(rank, meeting.size, meeting.store(), meeting.timeout, pick_device(), section.shards)
        self.models = Models(config, parts, saved, self.notes.append, base=run / "base", writes=rank == 0)
        self.policy, self.critic = self.models.policy, self.models.critic
        self.config = self.models.config
        shard(self.policy, self.critic, None, self.mesh, gather=section.gather, offload=config.training.offload)
        self.learner: Learner
        self.imitation: Imitation
        self._channel: Channel | None = None
        self._at: tuple[int, int] | None = None

    def facts(self) -> dict[str, Any]:
        """What the driver needs to know."""
        critic = None if self.critic is None else CriticFacts.of(self.critic, self.policy)
        return {
            "versions": versions(), "policy": PolicyFacts.of(self.policy), "critic": critic, "config": self.config,
            "notes": self._said(), "layout": shapes(layout(self.policy)),
        }  # fmt: skip

    def _said(self) -> list[str]:
        said, self.notes[:] = [*self.notes], []
        return said

    def progress(self) -> tuple[int, int] | None:
        """Micro-batches of the present update: done, and in all."""
        return self._at

    # -- before the first step -------------------------------------------------------------------------------------------

    def planned(self, config: Config, prompt: int) -> tuple[Config, Plan | None, list[str]]:
        """See `Models`; and what was said."""
        config, found = self.models.planned(config, prompt, self.notes.append)
        return config, found, self._said()

    def rated(self, config: Config) -> Config:
        """See `Models`."""
        return self.models.rated(config)

    def settle(self, config: Config) -> None:
        """The recipe as it is from now on."""
        self.config = config

    def begin_imitation(self) -> None:
        """Make ready to learn from worked solutions."""
        self.imitation = self.models.imitation(self.config)

    def imitate(self, rows: Sequence[Row], lr: float) -> tuple[float, float]:
        """See `Imitation.learn`."""
        return self.imitation.learn(rows, lr)

    def begin(self, saved: Path | None, tight: bool) -> None:
        """Make the learner of the models as they are now."""
        self.imitation = None  # type: ignore[assignment]
        self.learner = self.models.learner(self.config, self.run, saved, tight=tight, mesh=self.mesh)
        if saved is not None and self.learner.reference is not None and self.policy.adapters is None:
            assert self.config.cluster is not None
            shard(
                None, None, self.learner.reference, self.mesh, gather=self.config.cluster.gather
            )  # read from its folder
        self.learner.progress = self._heard

    def _heard(self, done: int, total: int) -> None:
        self._at = done, total

    def start_critic_at(self, base_rate: float) -> None:
        """See `Critic.start_at`."""
        assert self.critic is not None
        self.critic.start_at(base_rate)

    # -- a step ------------------------------------------------------------------------------------------------------------

    def advantage(self, batch: Batch) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """See `Learner`."""
        return self.learner.advantage(batch)

    def update(
        self, batch: Batch, advantage_B: Tensor, step: int, lessons: Lessons | None
    ) -> tuple[dict[str, Any], Trace]:
        """See `Learner`; and what the updates saw."""
        self._at = None
        metrics = self.learner.update(batch, advantage_B, step, lessons)
        self._at = None
        return metrics, self.learner.trace

    def values(self, batch: Batch) -> Tensor | None:
        """See `Learner`."""
        return self.learner.values(batch)

    def given_logps(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Policy`."""
        return self.policy.given_logps(prompts, responses)

    def critic_logits(self, tasks: Sequence[Task], token_budget: int) -> Tensor:
        """See `Critic.logits`."""
        assert self.critic is not None
        return self.critic.logits(tasks, token_budget)

    def critic_chances(self, tasks: Sequence[Task], token_budget: int) -> Tensor:
        """See `Critic.chances`."""
        assert self.critic is not None
        return self.critic.chances(tasks, token_budget)

    # -- weights -------------------------------------------------------------------------------------------------------------

    def send(self, meeting: Meeting) -> None:
        """Send the policy's weights to the workers that wait at a meeting; only rank 0 does, and all put them together."""
        if self.rank:
            for _ in self.policy.weights():
                pass
            return
        if self._channel is None or self._channel.meeting != meeting:
            self._channel = Channel(meeting, 0)
        self._channel.send(self.policy.weights())

    def fingerprint(self) -> str:
        """See `Policy`."""
        return self.policy.fingerprint()

    def sha256(self) -> str:
        """See `Policy`."""
        return self.policy.sha256()

    def save_policy(self, folder: Path) -> None:
        """See `Policy.save`."""
        self.policy.save(folder)

    def save(self, folder: Path) -> None:
        """See `Learner.save`."""
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        """See `Learner.load`."""
        self.learner.load(folder)

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Learner.load_state_dict`."""
        self.learner.load_state_dict(state)


class Sampler:
    """A rollout worker: an engine over a copy of the policy."""

    def __init__(self, config: Config, parts: Parts, saved: Path | None, threads: int, place: int, again: bool) -> None:
        """`place` among the workers, from 0; `again`: instead of one that was lost there."""
        keep_memory()
        torch.set_num_threads(threads)
        self.policy = load_policy(config, parts, saved, pick_device(), lambda said: None)
        self.policy.model.requires_grad_(False)
        assert config.cluster is not None
        try:
            self.engine = load_engine(of_worker(config.rollout.engine, place, config.cluster.rollouts), self.policy)
        except RecipeError as error:
            if again and isinstance(error.__cause__, WorkerLost):  # a server that may come back
                raise error.__cause__ from None
            raise
        self.layout = layout(self.policy)
        self._channel: Channel | None = None
        self._done = 0

    def facts(self) -> dict[str, Any]:
        """What the driver needs to know."""
        return {
            "versions": versions(),
            "stated": self.engine.stated,
            "context": self.engine.context,
            "layout": shapes(self.layout),
        }

    def progress(self) -> int:
        """Responses of the present call that are finished."""
        return self._done

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, limits: Sequence[int] | None
    ) -> list[Sample]:
        """See `Engine`."""
        self._done = 0
        try:
            return self.engine.generate(prompts, seeds, sampling, self._heard, limits)
        finally:
            self._done = 0

    def _heard(self, done: int) -> None:
        self._done = done

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine`."""
        return self.engine.score(prompts, responses)

    def receive(self, meeting: Meeting, place: int, version: int) -> None:
        """Take over the weights that the learner sends to a meeting, at this place of it."""
        if self._channel is None or self._channel.meeting != meeting:
            self._channel = Channel(meeting, place)
        self.engine.load(self._channel.receive(self.layout), version)

    def holds(self, fingerprint: str) -> bool:
        """See `Engine`."""
        return self.engine.holds(fingerprint)
