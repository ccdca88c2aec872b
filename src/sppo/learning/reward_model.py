"""Training a reward model: Bradley–Terry on preference pairs, binary cross-entropy on labels.

Pairs: −log σ(r(x, y⁺) − r(x, y⁻)) (Bradley and Terry 1952; arXiv 2203.02155, equation 1). Labels: BCE(σ(r(x, y)), label).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..distributed.mesh import Mesh
from ..errors import DataError, NonFinite
from ..models.reward_model import RewardModel
from ..tasks.base import in_split
from ..tasks.preferences import Labelled, Pair
from ..types import Task
from .optimizer import MasterAdamW, learning_rate


@dataclass(frozen=True)
class Example:
    """One row as ids: `second` is the rejected response of a pair, None for a labelled one."""

    first: list[int]
    second: list[int] | None
    label: float

    @property
    def tokens(self) -> int:
        return len(self.first) + len(self.second or ())


def preference_loss(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """−log σ(r⁺ − r⁻) for each pair, [B]."""
    return functional.softplus(rejected_B - chosen_B)


def encode(
    model: RewardModel, rows: Sequence[Pair | Labelled], max_tokens: int
) -> tuple[list[Example], list[Example], int]:
    """(training, held-out, left out) examples: a tenth of the prompts is held out by hash; too long ones are left out, never cut.

    Raises DataError when nothing is left to train on.
    """
    limit = min(max_tokens, model.context or max_tokens)
    train: list[Example] = []
    held_out: list[Example] = []
    too_long = 0
    for row in rows:
        if isinstance(row, Pair):
            example = Example(model.ids(row.prompt, row.chosen), model.ids(row.prompt, row.rejected), 1.0)
        else:
            example = Example(model.ids(row.prompt, row.response), None, row.label)
        if max(len(example.first), len(example.second or ())) > limit:
            too_long += 1
            continue
        (train if in_split(Task("", row.prompt).text, "train") else held_out).append(example)
    if not train:
        raise DataError(f"no row is left to train on: {too_long} of {len(rows)} have more than {limit} tokens")
    return train, held_out, too_long


def train_reward_model(
    model: RewardModel,
    examples: Sequence[Example],
    *,
    epochs: int,
    batch: int,
    lr: float,
    micro_tokens: int,
    seed: int,
    on_step: Callable[[int, dict[str, float]], bool],
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Train in place; returns the last metrics. A pair's two sequences share a micro-batch, because its loss needs both.

    `mesh`: the ranks that train, each of which is given the same; default: those that hold the model. It ends early when `on_step`
    returns False on any of them.

    Raises NonFinite: three updates in a row were not finite.
    """
    model.mesh = mesh = mesh or model.mesh
    optimiser = MasterAdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, mesh=mesh, of=model)
    total = updates(len(examples), epochs, batch)
    generator = torch.Generator().manual_seed(seed)
    metrics: dict[str, float] = {}
    step = bad = 0
    for _ in range(epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), batch):
            rows = [examples[i] for i in order[start : start + batch]]
            loss = right = 0.0
            parts = model.cuts([e.tokens for e in rows], micro_tokens)
            for n, part in enumerate(parts, 1):
                loss_B, right_B = losses(model, [rows[i] for i in part])
                optimiser.backward(loss_B.sum() / len(rows), last=n == len(parts))
                loss += float(loss_B.detach().sum()) / len(rows)
                right += float(right_B.sum()) / len(rows)
            rate = learning_rate(lr, step, total, warmup=min(20, total // 10), schedule="linear")
            norm = optimiser.step(rate, 1.0)
            bad = 0 if torch.isfinite(torch.tensor(norm)) else bad + 1
            if bad >= 3:
                raise NonFinite("the reward model's loss was not finite three times in a row: lower --lr")
            step += 1
            metrics = {"loss": mesh.sum(loss), "accuracy": mesh.sum(right), "lr": rate}
            if mesh.max(int(not on_step(step, metrics))):
                return metrics
    model.center = _mean_score(model, examples) if examples[0].second is not None else 0.0
    return metrics


def updates(examples: int, epochs: int, batch: int) -> int:
    """How many updates a training takes."""
    return epochs * -(-examples // batch)


def losses(model: RewardModel, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(loss, whether the model judges the row rightly), each [B]."""
    sequences = [e.first for e in rows] + [e.second for e in rows if e.second is not None]
    scores = model(sequences)
    first_B, second_B = scores[: len(rows)], scores[len(rows) :]
    if len(second_B):
        return preference_loss(first_B, second_B), (first_B > second_B).float()
    label_B = torch.tensor([e.label for e in rows], device=scores.device)
    loss_B = functional.binary_cross_entropy_with_logits(first_B, label_B, reduction="none")
    return loss_B, ((first_B > 0) == (label_B >= 0.5)).float()


@torch.no_grad()
def judge(model: RewardModel, examples: Sequence[Example], micro_tokens: int) -> tuple[float, list[float]]:
    """(mean loss, rightness of each row) without training."""
    loss = 0.0
    right = [0.0] * len(examples)
    for part in model.cuts([e.tokens for e in examples], micro_tokens):
        loss_B, right_B = losses(model, [examples[i] for i in part])
        loss += float(loss_B.sum()) / len(examples)
        for i, value in zip(part, right_B.tolist(), strict=True):
            right[i] = value
    return model.mesh.sum(loss), model.mesh.sum(torch.tensor(right, dtype=torch.float64)).tolist()


def _mean_score(model: RewardModel, examples: Sequence[Example], most: int = 512) -> float:
    """Preferences fix scores only up to a shift; with the mean at 0, σ(r) says better or worse than the usual response."""
    sequences: list[Any] = [ids for e in examples[:most] for ids in (e.first, e.second) if ids is not None]
    return float(model.scores(sequences).mean())
