"""Autograd functions for RMS norms, gated units (SwiGLU) and rotations (RoPE): bindings of cpu/elementwise.c on a
CPU, kernels of cuda/triton.py on CUDA.

In PyTorch each is several operations forward and more backward, which write what the next one reads: a tenth of an
update in bfloat16 (docs/performance.md). patch_layers.py puts them into a model's layers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import with_room
from .cpu.build import NoCompiler, library
from .recomputed import recomputable

REGISTER = 16
"""Floats of a CPU's widest register: rows are whole ones."""
PROGRAMS = 512
"""Programs that share a norm's backward pass on CUDA: each adds up the weights' gradient of its rows."""


@functools.cache
def _compiled(dtype: torch.dtype) -> ctypes.CDLL | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        lib = library("elementwise", dtype)
    except NoCompiler:
        return None
    long, pointer = ctypes.c_long, ctypes.c_void_p
    lib.norm_forward.argtypes = [pointer, pointer, long, long, ctypes.c_float, pointer, pointer, long]
    lib.norm_backward.argtypes = [*[pointer] * 4, long, long, pointer, pointer, long]
    lib.gated_forward.argtypes = [pointer, pointer, long, pointer, long]
    lib.gated_backward.argtypes = [*[pointer] * 3, long, pointer, pointer, long]
    lib.turned.argtypes = [*[pointer] * 3, *[long] * 4, pointer, long]
    for function in (lib.norm_forward, lib.norm_backward, lib.gated_forward, lib.gated_backward, lib.turned):
        function.restype = None
    return lib


def compiles(device: str, dtype: torch.dtype) -> bool:
    """Whether there is compiled code for tensors of a dtype on a type of device."""
    if device == "cuda":
        return dtype in (torch.float32, torch.bfloat16, torch.float16) and triton_is_there()
    return device == "cpu" and _compiled(dtype) is not None


@functools.cache
def triton_is_there() -> bool:
    """Whether cuda/triton.py runs on this GPU: PyTorch's CUDA builds for Linux bring Triton, which needs a C compiler
    and Python's headers."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        one = torch.ones(1, 32, device="cuda")
        _kernels().norm(one, one[0], 1e-5)
        torch.cuda.synchronize()
    except Exception:  # whatever Triton lacks here
        return False
    return True


@functools.cache
def _kernels() -> Any:
    from .cuda import triton as kernels  # not where there is no Triton

    return kernels


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    found = _compiled(dtype)
    assert found is not None
    return found


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        y, scale_N = _run_norm(x, weight_D, epsilon)
        ctx.save_for_backward(x, weight_D, scale_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight_D, scale_N = ctx.saved_tensors
        grad, threads = gradients[0].contiguous(), torch.get_num_threads()
        if x.is_cuda:
            flat = (len(scale_N), x.size(-1))
            grad_x, grad_D = _kernels().norm_back(x.view(flat), weight_D, scale_N, grad.view(flat), PROGRAMS)
            return grad_x.view_as(x), grad_D.to(weight_D.dtype), None
        grad_x, grad_weight = torch.empty_like(x), torch.zeros(threads, x.size(-1), dtype=torch.float32)
        _library(x.dtype).norm_backward(
            x.data_ptr(), weight_D.data_ptr(), grad.data_ptr(), scale_N.data_ptr(), len(scale_N), x.size(-1),
            grad_x.data_ptr(), grad_weight.data_ptr(), threads,
        )  # fmt: skip
        return grad_x, grad_weight.sum(0).to(weight_D.dtype), None


def _run_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The result, like x, and 1 / √(mean x² + ε) of each row."""
    size = x.size(-1)
    if x.is_cuda:
        y_ND, scale_N = _kernels().norm(x.view(-1, size), weight_D, epsilon)
        return y_ND.view_as(x), scale_N
    y, scale_N = with_room(x.shape, x.dtype, 2), torch.empty(x.numel() // size, dtype=torch.float32)
    _library(x.dtype).norm_forward(
        x.data_ptr(), weight_D.data_ptr(), len(scale_N), size, epsilon, y.data_ptr(), scale_N.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, scale_N


def _normed(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    return _run_norm(x, weight_D, epsilon)[0]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _run_gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        gate, up = ctx.saved_tensors
        grad = gradients[0].contiguous()
        if gate.is_cuda:
            return _kernels().gated_back(gate, up, grad)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _library(gate.dtype).gated_backward(
            gate.data_ptr(), up.data_ptr(), grad.data_ptr(), gate.numel(), grad_gate.data_ptr(), grad_up.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_gate, grad_up


def _run_gated(gate: Tensor, up: Tensor) -> Tensor:
    if gate.is_cuda:
        return _kernels().gated(gate, up)
    out = with_room(gate.shape, gate.dtype, 2)
    _library(gate.dtype).gated_forward(
        gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr(), torch.get_num_threads()
    )
    return out


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _run_turned(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return _run_turned(gradients[0], cos, sin, True), None, None


def _run_turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x = x.contiguous()
    if x.is_cuda:
        return _kernels().turned(x, cos, sin, back)
    out, (heads, size) = torch.empty_like(x), x.shape[-2:]
    _library(x.dtype).turned(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.numel() // size, heads, size, back, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """weight · x / √(mean x² + ε) over the last axis, whose size is a multiple of `REGISTER`."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    return recomputable(_Norm.apply(x, weight_D, epsilon), _normed, x, weight_D, epsilon)


def gated_unit(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of two tensors of one shape, a multiple of `REGISTER` numbers."""
    gate, up = gate.contiguous(), up.contiguous()
    return recomputable(_Gated.apply(gate, up), _run_gated, gate, up)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x, [B, N, heads, D], rotated by its token's angles (RoPE, arXiv 2104.09864), as transformers'
    `apply_rotary_pos_emb` does; D is a multiple of twice `REGISTER`. cos, sin: [B, N, D], without gradient."""
    return _Turned.apply(x, cos, sin)
