"""Rows of ids as a causal model computes them: packed into one row of nothing but tokens, or padded on the right
where a model cannot be packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..files import first_line
from ..kernels import attention


def padded(ids_BL: Tensor, length_B: Tensor, row_N: Tensor, position_N: Tensor) -> tuple[dict[str, Any], Tensor]:
    """A model's inputs for the first `length_B` tokens of each row as a rectangle, and where the states of N places
    lie in it, flattened."""
    width = int(length_B.max())
    return {"input_ids": ids_BL[:, :width]}, row_N * width + position_N


def packed(ids_BL: Tensor, length_B: Tensor, row_N: Tensor, position_N: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The same in one row, the sequences one after the other (kernels/attention.py)."""
    column_L = torch.arange(ids_BL.size(1), device=ids_BL.device)
    real_BL = column_L < length_B[:, None]
    inputs = {
        "input_ids": ids_BL[real_BL][None],
        "position_ids": column_L.expand_as(ids_BL)[real_BL][None],
        **attention.boundaries(length_B.tolist()),
    }
    return inputs, (length_B.cumsum(0) - length_B)[row_N] + position_N


@torch.no_grad()
def use(model: Any) -> str:
    """Let a model take packed rows, if they leave each other alone at every position of three; else returns why not,
    and leaves it as it was."""
    before = model.config._attn_implementation
    weight = next(model.parameters())
    vocabulary = model.get_input_embeddings().weight.size(0)
    ids_BL = (torch.arange(3)[:, None] * 7 + torch.arange(9) * 3 + 1).remainder(vocabulary).to(weight.device)
    length_B = torch.tensor([9, 6, 6], device=weight.device)
    row_N, position_N = (torch.arange(9, device=weight.device) < length_B[:, None]).nonzero(as_tuple=True)
    try:
        inputs, state_N = padded(ids_BL, length_B, row_N, position_N)
        apart_NV = model(use_cache=False, **inputs).logits.flatten(0, 1)[state_N].log_softmax(-1)
        attention.use(model)
        inputs, state_N = packed(ids_BL, length_B, row_N, position_N)
        packed_NV = model(use_cache=False, **inputs).logits.flatten(0, 1)[state_N].log_softmax(-1)
        if (packed_NV - apart_NV).abs().max() <= attention.TOLERANCE[weight.dtype] * apart_NV.abs().max():
            return ""
        why = "its packed sequences see each other"
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        why = first_line(error)
    model.set_attn_implementation(before)
    return why
