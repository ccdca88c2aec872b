"""What stands in the loop for models and a learner that are elsewhere: text becomes ids here, passes are made on the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..learning.batch import Batch
from ..learning.learner import Learner
from ..learning.lessons import Lessons
from ..learning.sft import Imitation, Row
from ..models.critic import Critic
from ..models.policy import Policy
from ..models.weights import Weights
from ..types import Task
from .learners import LearnerGroup


@dataclass(frozen=True)
class PolicyFacts:
    """What reading and writing text needs to know of a policy."""

    tokenizer: Any
    name: str
    chat: bool
    eos_ids: list[int]
    pad_id: int
    embeddings: int
    vocabulary: int
    context: int | None
    dtype: torch.dtype
    device: str
    packs: bool

    @classmethod
    def of(cls, p: Policy) -> PolicyFacts:
        """Of a policy that is here."""
        return cls(
            p.tokenizer, p.name, p.chat, p.eos_ids, p.pad_id, p.embeddings, p.vocabulary, p.context, p.dtype, p.device.type, p.packs
        )  # fmt: skip


class RemotePolicy(Policy):
    """A policy on the learner's ranks."""

    def __init__(self, facts: PolicyFacts, ranks: LearnerGroup) -> None:
        self.ranks, self.facts = ranks, facts
        self.tokenizer, self.name, self.chat = facts.tokenizer, facts.name, facts.chat
        self.eos_ids, self.pad_id, self.adapters, self.base = facts.eos_ids, facts.pad_id, None, {}

    packs = property(lambda self: self.facts.packs)
    dtype = property(lambda self: self.facts.dtype)
    device = property(lambda self: torch.device(self.facts.device))
    context = property(lambda self: self.facts.context)
    vocabulary = property(lambda self: self.facts.vocabulary)
    embeddings = property(lambda self: self.facts.embeddings)

    def given_logps(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Policy`."""
        found: list[list[float]] = self.ranks.call("given_logps", prompts, responses)
        return found

    def weights(self) -> Any:
        """None travel through this process: the engine lets the ranks send them."""
        return ()

    def take(self, weights: Weights) -> None:
        """Not here: a learner's weights change by updates, and by being resumed."""
        raise TypeError("the weights of a policy on a cluster are not written to from here")

    def fingerprint(self) -> str:
        """See `Policy`."""
        return str(self.ranks.call("fingerprint"))

    def sha256(self) -> str:
        """See `Policy`."""
        return str(self.ranks.call("sha256"))

    def save(self, folder: Path) -> None:
        """See `Policy`; the folder must be reachable from the ranks."""
        self.ranks.call("save_policy", folder)


@dataclass(frozen=True)
class CriticFacts:
    """What reading text needs to know of a critic."""

    tokenizer: Any
    name: str
    embeddings: int
    context: int | None
    trained: bool
    reads_as_policy: bool

    @classmethod
    def of(cls, critic: Critic, policy: Policy) -> CriticFacts:
        """Of a critic that is here."""
        own = critic.tokenizer is not policy.tokenizer
        return cls(
            critic.tokenizer if own else None, critic.name, critic.embeddings, critic.context, critic.trained, not own
        )


class RemoteCritic(Critic):
    """A critic on the learner's ranks."""

    def __init__(self, facts: CriticFacts, policy: RemotePolicy) -> None:
        torch.nn.Module.__init__(self)
        self.facts, self.policy, self.name, self.trained = facts, policy, facts.name, facts.trained
        self.tokenizer = policy.tokenizer if facts.reads_as_policy else facts.tokenizer

    context = property(lambda self: self.facts.context)
    embeddings = property(lambda self: self.facts.embeddings)

    def prompt_ids(self, task: Task) -> list[int]:
        """See `Critic`."""
        return self.policy.prompt_ids(task) if self.facts.reads_as_policy else super().prompt_ids(task)

    def refuses(self, task: Task) -> str | None:
        """See `Critic`."""
        return None if self.facts.reads_as_policy else super().refuses(task)

    def start_at(self, base_rate: float) -> None:
        """See `Critic`."""
        self.policy.ranks.call("start_critic_at", base_rate)

    def logits(self, tasks: Sequence[Task], token_budget: int = 16384) -> Tensor:
        """See `Critic`."""
        found: Tensor = self.policy.ranks.call("critic_logits", list(tasks), token_budget)
        return found

    def chances(self, tasks: Sequence[Task], token_budget: int = 16384) -> Tensor:
        """See `Critic`."""
        found: Tensor = self.policy.ranks.call("critic_chances", list(tasks), token_budget)
        return found


class RemoteImitation(Imitation):
    """Learning from worked solutions on the ranks."""

    def __init__(self, ranks: LearnerGroup) -> None:
        self.ranks = ranks
        ranks.call("begin_imitation")

    def learn(self, rows: Sequence[Row], lr: float) -> tuple[float, float]:
        """See `Imitation`."""
        loss, norm = self.ranks.call("imitate", list(rows), lr)
        return loss, norm


class RemoteLearner(Learner):
    """The learner on the ranks."""

    def __init__(self, ranks: LearnerGroup) -> None:
        self.ranks = ranks
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self._sent: tuple[Batch, Any] | None = None

    def _reference_to(self, batch: Batch) -> Any:
        if self._sent is None or self._sent[0] is not batch:
            self._sent = batch, self.ranks.fleet.put(batch)
        return self._sent[1]

    def advantage(self, batch: Batch) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """See `Learner`."""
        found: tuple[Tensor, Tensor | None, dict[str, Any]] = self.ranks.call("advantage", self._reference_to(batch))
        return found

    def update(self, batch: Batch, advantage_B: Tensor, step: int, lessons: Lessons | None = None) -> dict[str, Any]:
        """See `Learner`."""
        metrics, self.trace = self.ranks.call(
            "update", self._reference_to(batch), advantage_B, step, lessons, tick=lambda at: self.progress(*at)
        )
        self._sent = None
        found: dict[str, Any] = metrics
        return found

    def values(self, batch: Batch) -> Tensor | None:
        """See `Learner`."""
        found: Tensor | None = self.ranks.call("values", batch)
        return found

    def save(self, folder: Path) -> None:
        """See `Learner`; the folder must be reachable from the ranks."""
        self.ranks.call("save", folder.resolve())

    def load(self, folder: Path) -> None:
        """See `Learner`."""
        self.ranks.call("load", folder.resolve())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        self.ranks.call("load_state", state)
