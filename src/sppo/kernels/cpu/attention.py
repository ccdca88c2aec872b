"""Causal attention of packed sequences on a CPU, forward and backward, in compiled code (attention.c).

PyTorch's kernel is made for few long sequences: of an update of 135M parameters with 190-token sequences it took a
fifth of the time, for 3% of the operations (docs/performance.md). This one takes all sequences of a pack at once,
whatever their lengths.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .build import NoCompiler, library


class _View(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("token", ctypes.c_long), ("head", ctypes.c_long)]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("heads", "groups", "size", "sequences")),
        ("starts", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        *((name, _View) for name in "qkv"),
        *((name, ctypes.c_void_p) for name in ("out", "normaliser", "grad", "grad_q", "grad_k", "grad_v")),
    ]


@functools.cache
def _compiled(dtype: torch.dtype) -> ctypes.CDLL | None:
    try:
        lib = library("attention", dtype)
    except NoCompiler:
        return None
    long, pointer = ctypes.c_long, ctypes.c_void_p
    lib.attention.argtypes, lib.attention.restype = [ctypes.POINTER(_Job), long, long, long, pointer], None
    lib.attention_bytes.argtypes, lib.attention_bytes.restype = [long, long], long
    return lib


def fits(query: Tensor, key: Tensor, value: Tensor, sequences: int) -> bool:
    """Whether `attention` can take these, [heads, N, D], and has work for all threads."""
    parts = (query, key, value)
    return (
        all(x.device.type == "cpu" and x.dtype == query.dtype and x.stride(-1) == 1 for x in parts)
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.size(-1) % 16 == 0
        and query.size(-1) == key.size(-1)
        and key.shape == value.shape
        and query.size(0) % key.size(0) == 0
        and sequences * key.size(0) >= torch.get_num_threads()
        and _compiled(query.dtype) is not None
    )


def attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, each sequence causally within itself.

    Args:
        query: [heads, N, D]; key, value: [groups, N, D], each group for heads / groups queries in a row.
        starts: where sequences begin, and N, [sequences + 1].

    Returns:
        [N, heads, D].
    """
    out: Tensor = _Attention.apply(query, key, value, starts.to("cpu", torch.int64).contiguous(), scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
        heads, tokens, size = query.shape
        out = query.new_empty(tokens, heads, size)
        normaliser = torch.empty(tokens, heads, dtype=torch.float32)
        _run(query, key, value, starts, scale, out, normaliser)
        ctx.save_for_backward(query, key, value, starts, out, normaliser)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, starts, out, normaliser = ctx.saved_tensors
        grads = [x.new_empty(x.size(1), x.size(0), x.size(2)) for x in (query, key, value)]
        _run(query, key, value, starts, ctx.scale, out, normaliser, grad.contiguous(), grads)
        return *(g.transpose(0, 1) for g in grads), None, None


def _run(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, out: Tensor, normaliser: Tensor,
    grad: Tensor | None = None, grads: list[Tensor] | None = None,
) -> None:  # fmt: skip
    lib = _compiled(query.dtype)
    assert lib is not None
    views = [_View(x.data_ptr(), x.stride(1), x.stride(0)) for x in (query, key, value)]
    pointers = [None if x is None else x.data_ptr() for x in (grad, *(grads or (None,) * 3))]
    job = _Job(
        query.size(0), key.size(0), query.size(2), len(starts) - 1, starts.data_ptr(), scale, *views,
        out.data_ptr(), normaliser.data_ptr(), *pointers,
    )  # fmt: skip
    longest, threads = int(starts.diff().max()), torch.get_num_threads()
    room = torch.empty(threads * lib.attention_bytes(longest, query.size(2)), dtype=torch.uint8)
    lib.attention(job, grad is not None, longest, threads, room.data_ptr())
