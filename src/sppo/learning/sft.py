"""Supervised training on worked solutions: the bootstrap of a recipe, and `sppo sft`. Loss on the response only."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import DataError, NonFinite
from ..models.policy import Policy
from ..recipe.sections import BootstrapSection
from ..tasks.base import TaskSource
from ..tasks.epochs import Epochs
from ..types import Task
from .batch import micro_batches
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
) -> dict[str, float]:
    """Train on `solution`s by mean token log-likelihood; returns the last metrics.

    Args:
        limit: solutions longer than this many tokens, prompt included, are left out (never cut).
        on_step: called with the number of steps done and the last one's metrics; training stops early when it returns False.

    Raises:
        DataError: no problem has a worked solution that fits.
        NonFinite: three updates in a row were not finite.
    """
    optimiser = MasterAdamW(policy.model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    encoded: dict[str, tuple[list[int], list[int]]] = {}

    def unusable(task: Task) -> str | None:
        if task.solution is None:
            return "it has no worked solution (a `solution` or `messages` column)"
        if (refused := policy.refuses(task)) is not None:
            return refused
        prompt, response = policy.prompt_ids(task), policy.response_ids(task.solution)
        if limit is not None and len(prompt) + len(response) > limit:
            return f"prompt and solution take {len(prompt) + len(response)} tokens, the limit is {limit}"
        encoded[task.id] = (prompt, response)
        return None

    order = Epochs(source, seed, unusable)
    metrics: dict[str, float] = {}
    bad = 0
    for step in range(config.steps):
        encoded.clear()
        try:
            tasks = order.sample(config.batch)
        except DataError as error:
            raise DataError(f"supervised training: {error}") from None
        rows = [encoded[t.id] for t in tasks]
        prompt_len_B = torch.tensor([len(p) for p, _ in rows])
        response_len_B = torch.tensor([len(r) for _, r in rows])
        length_B = prompt_len_B + response_len_B
        ids_BL = torch.full((len(rows), int(length_B.max())), policy.pad_id)
        for b, (prompt, response) in enumerate(rows):
            ids_BL[b, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        tokens = int(response_len_B.sum())
        total = 0.0
        for part in micro_batches(torch.arange(len(rows)), length_B, micro_tokens):
            width = int(length_B[part].max())
            logps = policy.response_logps(ids_BL[part, :width], prompt_len_B[part], response_len_B[part], 1.0)
            loss = -logps.logp_BT.sum() / tokens
            optimiser.backward(loss)
            total += float(loss.detach())
        assert config.lr is not None  # resolved by Config.with_rates
        lr = learning_rate(config.lr, step, config.steps, warmup=config.warmup, schedule=config.schedule)
        norm = optimiser.step(lr, 1.0)
        bad = 0 if torch.isfinite(torch.tensor(norm)) else bad + 1
        if bad >= 3:
            raise NonFinite(
                "the supervised loss or its gradient was not finite three times in a row: lower the learning rate"
            )
        metrics = {"loss": total, "lr": lr, "passed_over": float(order.passed_over)}
        if not on_step(step + 1, metrics):
            break
    return metrics
