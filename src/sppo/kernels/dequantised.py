"""Products with a matrix that is held in eight bits, as if it were not: the matrix is made anew for each product, and
again in the backward pass. What a row comes to then depends on that row alone, in learner and engine alike.

bitsandbytes' own layer (LLM.int8, arXiv 2208.07339) also rounds what it multiplies with to eight bits, and which
columns are spared depends on the other rows of the batch: log-probabilities of sampling and learning would differ.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _Product(torch.autograd.Function):
    """x Wᵀ for a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return functional.linear(x, matrix(module, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] @ matrix(ctx.module, gradients[0].dtype), None


def matrix(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a Linear8bitLt, [outputs, inputs]: each row is 127 steps of its own size."""
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data.to(dtype) * (scale.to(dtype) / 127)[:, None]


def as_if_whole(model: Any) -> Any:
    """The model with this forward in each of its layers that bitsandbytes holds in eight bits."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.forward = partial(_forward, module)
    return model


def _forward(module: Any, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x, module)
    return y if module.bias is None else y + module.bias.to(y.dtype)
