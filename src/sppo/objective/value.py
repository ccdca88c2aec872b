"""What a critic of every token learns: its value against a target, token by token."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_error(value: Tensor, target: Tensor, old: Tensor, clip: float = 0.0) -> Tensor:
    """(V − target)² (PPO, arXiv 1707.06347 eq. 9); with `clip`, PPO2's habit, which is in no equation of the paper:

        max( (V − target)²,  (V_old + clip(V − V_old, −ε, ε) − target)² )

    so that a value that has already moved by more than ε towards its target has no gradient; one that moved away keeps it.

    Args:
        value: with gradient; target, old: of the same shape, without. `old` is the value before the step's updates.
        clip: ε; 0 turns it off.
    """
    error = (value - target).square()
    if not clip:
        return error
    held = old + (value - old).clamp(-clip, clip)
    return torch.maximum(error, (held - target).square())
