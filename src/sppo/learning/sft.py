"""Supervised training on worked solutions: the bootstrap of a recipe, and `sppo sft`. Loss on the response only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..errors import DataError, NonFinite
from ..models.calls import spelt
from ..models.policy import Policy
from ..recipe.sections import BootstrapSection
from ..tasks.base import TaskSource
from ..tasks.epochs import Epochs
from ..types import Message, Span, Task
from .batch import Share
from .optimizer import MasterAdamW, learning_rate

Row = tuple[list[int], list[Span]]
"""Ids, and the spans of them that are learnt."""


class Imitation:
    """A policy that learns from worked solutions, and its optimiser."""

    def __init__(self, policy: Policy, micro_tokens: int, *, offload: bool = False) -> None:
        """`micro_tokens` are those of a micro-batch; `offload` is as `training.offload`. On ranks that hold the policy together each is
        given the same."""
        self.policy, self.micro_tokens = policy, micro_tokens
        self.optimiser = MasterAdamW(
            policy.trained.values(), betas=(0.9, 0.95), weight_decay=0.01, offload=offload, mesh=policy.mesh,
            of=policy.scorer,
        )  # fmt: skip

    def learn(self, rows: Sequence[Row], lr: float) -> tuple[float, float]:
        """One update by the mean negative log-likelihood per token that is the policy's; returns that mean, and the gradient's norm."""
        loss = self._gradient(rows)
        return loss, self.optimiser.step(lr, 1.0)

    def _gradient(self, rows: Sequence[Row]) -> float:
        policy = self.policy
        length_B = torch.tensor([len(ids) for ids, _ in rows])
        ids_BL = torch.full((len(rows), int(length_B.max())), policy.pad_id)
        action_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
        for b, (ids, turns) in enumerate(rows):
            ids_BL[b, : length_B[b]] = torch.tensor(ids)
            for start, end in turns:
                action_BL[b, start:end] = True
        total = 0.0
        parts = Share.of(torch.arange(len(rows)), length_B, self.micro_tokens, False, policy.mesh)
        for n, part in enumerate(parts, 1):
            width = int(length_B[part].max()) if len(part) else 0
            logps = policy.logps(ids_BL[part, :width], action_BL[part, :width], 1.0)
            loss = -logps.logp_BT.sum() / int(action_BL.sum())
            self.optimiser.backward(loss, last=n == len(parts))
            total += float(loss.detach())
        return policy.mesh.sum(total)


def supervised(
    policy: Policy,
    imitation: Imitation,
    source: TaskSource,
    config: BootstrapSection,
    *,
    seed: int,
    on_step: Callable[[int, dict[str, float]], bool],
    asked: Callable[[Task], Task] = lambda task: task,
) -> dict[str, float]:
    """Train on `solution`s by mean token log-likelihood; returns the last metrics.

    Args:
        policy: reads prompts and solutions; those that are longer than its context are left out (never cut).
        imitation: what learns.
        asked: a task as the policy is asked it, where an environment adds to it.
        on_step: called with the number of steps done and the last one's metrics; training stops early when it returns False, on any rank.

    Raises:
        DataError: no problem has a worked solution that fits.
        NonFinite: three updates in a row were not finite.
    """
    solutions = _Solutions(policy, policy.context, asked)
    order = Epochs(source, seed, solutions.refusal)
    metrics: dict[str, float] = {}
    bad = 0
    for step in range(config.steps):
        solutions.encoded.clear()
        try:
            tasks = order.sample(config.batch)
        except DataError as error:
            raise DataError(f"supervised training: {error}") from None
        assert config.lr is not None  # resolved by Config.with_rates
        lr = learning_rate(config.lr, step, config.steps, warmup=config.warmup, schedule=config.schedule)
        loss, norm = imitation.learn([solutions.encoded[t.id] for t in tasks], lr)
        bad = 0 if math.isfinite(norm) else bad + 1
        if bad >= 3:
            raise NonFinite(
                "the supervised loss or its gradient was not finite three times in a row: lower the learning rate"
            )
        metrics = {"loss": loss, "lr": lr, "passed_over": float(order.passed_over)}
        if policy.mesh.max(int(not on_step(step + 1, metrics))):
            break
    return metrics


class _Solutions:
    """The ids of prompts and worked solutions, as they are looked at."""

    def __init__(self, policy: Policy, limit: int | None, asked: Callable[[Task], Task]) -> None:
        self.policy, self.limit, self.asked = policy, limit, asked
        self.encoded: dict[str, Row] = {}

    def refusal(self, task: Task) -> str | None:
        """Why a task cannot be learnt from, or None; its ids are kept."""
        if task.solution is None:
            return "it has no worked solution (a `solution` or `messages` column)"
        if (refused := self.policy.refuses(task)) is not None:
            return refused
        ids, turns = demonstrated(self.policy, self.asked(task))
        if self.limit is not None and len(ids) > self.limit:
            return f"prompt and solution take {len(ids)} tokens, the limit is {self.limit}"
        self.encoded[task.id] = (ids, turns)
        return None


def demonstrated(policy: Policy, task: Task) -> Row:
    """The ids of a task and its worked solution, and the spans of them that are the policy's."""
    assert task.solution is not None
    ids, turns, told = policy.prompt_ids(task), list[Span](), list[Message]()
    solution = [{"role": "assistant", "content": task.solution}] if isinstance(task.solution, str) else task.solution
    for message in solution:
        if message["role"] != "assistant":
            told.append(message)
            continue
        if told:
            ids, told = [*ids, *policy.continuation_ids(told, ids[-1])], []
        text = spelt(message, policy.manner.syntax) if message.get("tool_calls") else message["content"]
        reply = policy.response_ids(text)
        turns.append((len(ids), len(ids) + len(reply)))
        ids = [*ids, *reply]
    return ids, turns
