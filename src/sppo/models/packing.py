"""Rows of ids as a causal model computes them: packed into one row of nothing but tokens, or padded on the right
where a model cannot be packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..files import first_line
from ..kernels import attention
from .head import Head, backbone

Rows = tuple[dict[str, Any], Tensor]


def padded(ids_BL: Tensor, length_B: Tensor, row_N: Tensor, position_N: Tensor, device: torch.device) -> Rows:
    """A model's inputs for the first `length_B` tokens of each row as a rectangle, and where the states of N places
    lie in it, flattened. All on `device`, from tensors on the CPU."""
    width = int(length_B.max())
    return {"input_ids": ids_BL[:, :width].to(device)}, (row_N * width + position_N).to(device)


def packed(ids_BL: Tensor, length_B: Tensor, row_N: Tensor, position_N: Tensor, device: torch.device) -> Rows:
    """The same in one row, the sequences one after the other (kernels/attention.py)."""
    column_L = torch.arange(ids_BL.size(1))
    real_BL = column_L < length_B[:, None]
    inputs = {
        "input_ids": ids_BL[real_BL][None].to(device),
        "position_ids": column_L.expand_as(ids_BL)[real_BL][None].to(device),
        **attention.boundaries(length_B.tolist()),
    }
    return inputs, ((length_B.cumsum(0) - length_B)[row_N] + position_N).to(device)


@torch.no_grad()
def use(model: Any, head: Head | None) -> str:
    """Let a model take packed rows, if they leave each other alone at every position of three; else returns why not,
    and leaves it as it was. `head` is its output projection, if it has one."""
    model = backbone(model)
    before = model.config._attn_implementation
    weight = model.get_input_embeddings().weight
    vocabulary = weight.size(0)
    ids_BL = (torch.arange(3)[:, None] * 7 + torch.arange(9) * 3 + 1).remainder(vocabulary)
    length_B = torch.tensor([9, 6, 6])
    row_N, position_N = (torch.arange(9) < length_B[:, None]).nonzero(as_tuple=True)
    try:
        inputs, state_N = padded(ids_BL, length_B, row_N, position_N, weight.device)
        apart = _out(model, head, inputs, state_N)
        attention.use(model)
        inputs, state_N = packed(ids_BL, length_B, row_N, position_N, weight.device)
        together = _out(model, head, inputs, state_N)
        if (together - apart).abs().max() <= attention.TOLERANCE[weight.dtype] * apart.abs().max():
            return ""
        why = "its packed sequences see each other"
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        why = first_line(error)
    model.set_attn_implementation(before)
    return why


def _out(model: Any, head: Head | None, inputs: dict[str, Any], state_N: Tensor) -> Tensor:
    """Log-probabilities, or the hidden states of a model without a head, [N, …]."""
    if head is not None:
        return head.of(inputs, state_N).log_softmax(-1)
    hidden: Tensor = model(use_cache=False, **inputs).last_hidden_state
    return hidden.flatten(0, 1)[state_N]
