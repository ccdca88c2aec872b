"""Matrix products of few rows, which is what decoding is made of.

`linear(x, W)` of 64 rows asks the CPU's BLAS for 64 × N outputs row by row. Asked for the same product as N × 64, it runs 1.1 to
1.5 times as fast in float32, up to three times for a few rows and a vocabulary (measured with MKL on AVX2; docs/performance.md),
but only if the 64 is a multiple of 8. The result is the same matrix, lying transposed in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

ROWS = 128
"""Above so many rows it no longer pays."""
STRIDE = 8


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, faster for few rows of float32 on a CPU. For inference: the result is no contiguous tensor."""
    rows = x.numel() // x.size(-1)
    if rows > ROWS or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return linear(x, weight, bias)
    x_NK = x.reshape(rows, -1)
    if rows % STRIDE and rows > STRIDE // 2:
        x_NK = pad(x_NK, (0, 0, 0, -rows % STRIDE))
    out_NK = torch.mm(weight, x_NK.t()).t()[:rows]
    if bias is not None:
        out_NK += bias
    return out_NK.view(*x.shape[:-1], weight.size(0))


@contextlib.contextmanager
def narrow_products(model: Any) -> Iterator[None]:
    """Let every plain linear layer of a model compute like this until the block ends. Not for training: the learner's old and
    current log-probabilities must come from one and the same arithmetic."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return narrow_linear(x, layer.weight, layer.bias)
