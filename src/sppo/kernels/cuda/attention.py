"""Causal attention of packed sequences on CUDA, forward and backward: one call for all sequences of a pack, whatever
their lengths, of the kernels that PyTorch ships (FlashAttention-2 in bfloat16 and float16, the memory-efficient one
in float32).

The public `scaled_dot_product_attention` takes sequences of one length per call: 64 of different lengths would be 64
calls per layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

deterministic: Any = torch.utils.deterministic
HALF = (torch.bfloat16, torch.float16)
CAUSAL = 1
"""The memory-efficient kernel's number for it."""


def fits(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
    """Whether `attention` can take these, [heads, N, D]."""
    return (
        all(x.is_cuda and x.dtype == query.dtype for x in (query, key, value))
        and (
            torch.backends.cuda.is_flash_attention_available()
            if query.dtype in HALF
            else query.dtype == torch.float32 and window is None
        )
        and query.size(-1) % 8 == 0
        and query.size(-1) <= 256
        and query.size(-1) == key.size(-1) == value.size(-1)
        and query.size(0) % key.size(0) == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int | None) -> Tensor:
    """softmax(scale · q kᵀ) v, each sequence causally within itself, no further back than `window` keys.

    Args:
        query: [heads, N, D]; key, value: [groups, N, D], each group for heads / groups queries in a row.
        starts: where sequences begin, and N, [sequences + 1].

    Returns:
        [N, heads, D].
    """
    longest = int(starts.diff().max())
    on_device = starts.to(query.device, torch.int32, non_blocking=True)
    parts = [x.transpose(0, 1) for x in (query, key, value)]  # [N, heads, D], as they lie in memory
    if query.dtype in HALF:
        return _Flash.apply(*parts, on_device, longest, scale, window)
    shared = query.size(0) // key.size(0)
    parts[1:] = (x.repeat_interleave(shared, 1) for x in parts[1:])
    return _Efficient.apply(*(x[None] for x in parts), on_device, longest, scale)[0]


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Sums in a fixed order: a resumed run must find the same bits."""
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # not with warn_only: these kernels would only warn
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        deterministic.fill_uninitialized_memory = fill


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        longest: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        ctx.rest = (longest, longest, 0.0, True)
        ctx.options = {"scale": scale, "window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
        out, normaliser, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, starts, starts, *ctx.rest, False, **ctx.options
        )
        ctx.save_for_backward(query, key, value, out, normaliser, starts, state, unused)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, out, normaliser, starts, state, unused = ctx.saved_tensors
        with _reproducible():
            grads = torch.ops.aten._flash_attention_backward(
                gradients[0].contiguous(), query, key, value, out, normaliser, starts, starts, *ctx.rest, state, unused,
                **ctx.options,
            )  # fmt: skip
        return *grads, None, None, None, None


class _Efficient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
    ) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        ctx.scale = scale
        out, normaliser, seed, offset, *ctx.longest = torch.ops.aten._efficient_attention_forward(
            query, key, value, None, starts, starts, longest, longest, 0.0, CAUSAL, True, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, normaliser, starts, seed, offset)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, out, normaliser, starts, seed, offset = ctx.saved_tensors
        with _reproducible():
            *grads, _ = torch.ops.aten._efficient_attention_backward(
                gradients[0].contiguous(), query, key, value, None, out, starts, starts, *ctx.longest, normaliser, 0.0,
                seed, offset, CAUSAL, False, scale=ctx.scale,
            )  # fmt: skip
        return *grads, None, None, None
