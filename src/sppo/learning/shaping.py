"""What is taken from rewards before a baseline is: the penalty of responses that are too long (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..objective.advantage import overlong_penalty
from ..recipe.sections import RolloutSection
from .batch import Batch


def less_overlong(batch: Batch, rollout: RolloutSection) -> tuple[Batch, Tensor, dict[str, Any]]:
    """The batch with its greedy rewards less their penalty, the rewards less theirs, [B], and metrics; all as they are without `overlong`."""
    if not rollout.overlong:
        return batch, batch.reward_B, {}
    limit = rollout.max_tokens, rollout.overlong
    penalty_B = overlong_penalty(batch.response_len_B, *limit)
    mean = float(penalty_B[batch.keep_B].mean()) if batch.keep_B.any() else None
    reward_B = batch.reward_B - penalty_B
    if batch.greedy_B is not None:
        length_B = torch.tensor([len(x.greedy.response_ids) for x in batch.rollouts if x.greedy is not None])
        batch = replace(batch, greedy_B=batch.greedy_B - overlong_penalty(length_B, *limit))
    return batch, reward_B, {"reward/overlong": mean}
