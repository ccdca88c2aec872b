"""Supervised training on worked solutions: the bootstrap of a recipe, and `sppo sft`. Loss on the response only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..distributed.mesh import Mesh
from ..errors import DataError, NonFinite
from ..models.policy import Policy
from ..recipe.sections import BootstrapSection
from ..tasks.base import TaskSource
from ..tasks.epochs import Epochs
from ..types import Task
from .batch import Share
from .optimizer import MasterAdamW, learning_rate


def supervised(
    policy: Policy,
    source: TaskSource,
    config: BootstrapSection,
    *,
    seed: int,
    micro_tokens: int,
    limit: int | None,
    on_step: Callable[[int, dict[str, float]], bool],
    offload: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Train on `solution`s by mean token log-likelihood; returns the last metrics.

    Args:
        limit: solutions longer than this many tokens, prompt included, are left out (never cut).
        offload: as `training.offload`.
        on_step: called with the number of steps done and the last one's metrics; training stops early when it returns False, on any rank.
        mesh: the ranks that train, each of which is given the same; default: those that hold the policy.

    Raises:
        DataError: no problem has a worked solution that fits.
        NonFinite: three updates in a row were not finite.
    """
    policy.mesh = mesh = mesh or policy.mesh
    optimiser = MasterAdamW(
        policy.trained.values(), betas=(0.9, 0.95), weight_decay=0.01, offload=offload, mesh=mesh, of=policy.scorer
    )
    solutions = _Solutions(policy, limit)
    order = Epochs(source, seed, solutions.refusal)
    metrics: dict[str, float] = {}
    bad = 0
    for step in range(config.steps):
        solutions.encoded.clear()
        try:
            tasks = order.sample(config.batch)
        except DataError as error:
            raise DataError(f"supervised training: {error}") from None
        loss = _gradient(policy, optimiser, [solutions.encoded[t.id] for t in tasks], micro_tokens)
        assert config.lr is not None  # resolved by Config.with_rates
        lr = learning_rate(config.lr, step, config.steps, warmup=config.warmup, schedule=config.schedule)
        norm = optimiser.step(lr, 1.0)
        bad = 0 if math.isfinite(norm) else bad + 1
        if bad >= 3:
            raise NonFinite(
                "the supervised loss or its gradient was not finite three times in a row: lower the learning rate"
            )
        metrics = {"loss": loss, "lr": lr, "passed_over": float(order.passed_over)}
        if mesh.max(int(not on_step(step + 1, metrics))):
            break
    return metrics


class _Solutions:
    """The ids of prompts and worked solutions, as they are looked at."""

    def __init__(self, policy: Policy, limit: int | None) -> None:
        self.policy, self.limit = policy, limit
        self.encoded: dict[str, tuple[list[int], list[int]]] = {}

    def refusal(self, task: Task) -> str | None:
        """Why a task cannot be learnt from, or None; its ids are kept."""
        if task.solution is None:
            return "it has no worked solution (a `solution` or `messages` column)"
        if (refused := self.policy.refuses(task)) is not None:
            return refused
        prompt, response = self.policy.prompt_ids(task), self.policy.response_ids(task.solution)
        if self.limit is not None and len(prompt) + len(response) > self.limit:
            return f"prompt and solution take {len(prompt) + len(response)} tokens, the limit is {self.limit}"
        self.encoded[task.id] = (prompt, response)
        return None


def _gradient(
    policy: Policy, optimiser: MasterAdamW, rows: Sequence[tuple[list[int], list[int]]], micro_tokens: int
) -> float:
    """Add up the gradient of the mean negative log-likelihood per token of the responses, on each rank its part; returns that mean."""
    length_B = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
    ids_BL = torch.full((len(rows), int(length_B.max())), policy.pad_id)
    action_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    for b, (prompt, response) in enumerate(rows):
        ids_BL[b, : length_B[b]] = torch.tensor(prompt + response)
        action_BL[b, len(prompt) : length_B[b]] = True
    total = 0.0
    parts = Share.of(torch.arange(len(rows)), length_B, micro_tokens, False, policy.mesh)
    for n, part in enumerate(parts, 1):
        width = int(length_B[part].max()) if len(part) else 0
        logps = policy.logps(ids_BL[part, :width], action_BL[part, :width], 1.0)
        loss = -logps.logp_BT.sum() / int(action_BL.sum())
        optimiser.backward(loss, last=n == len(parts))
        total += float(loss.detach())
    return policy.mesh.sum(total)
