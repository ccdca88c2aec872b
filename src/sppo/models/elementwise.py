"""RMS norms and gated units (SwiGLU) of an update on a CPU, one call each way in compiled code (elementwise.c).

In PyTorch each is several operations forward and more backward, all of which write what the next one reads; a tenth of an update in bfloat16
(docs/performance.md). `fused(model)` lends them to the layers whose own arithmetic they reproduce, which is tried before they are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import NoCompiler, library

REGISTER = 16
"""Floats of the widest register: rows are whole ones."""


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
    for function in (lib.norm_forward, lib.norm_backward, lib.gated_forward, lib.gated_backward):
        function.restype = None
    return lib


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    found = _compiled(dtype)
    assert found is not None
    return found


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        x, weight_D = x.contiguous(), weight_D.contiguous()
        size = x.size(-1)
        y, scale_N = torch.empty_like(x), torch.empty(x.numel() // size, dtype=torch.float32)
        _library(x.dtype).norm_forward(
            x.data_ptr(), weight_D.data_ptr(), len(scale_N), size, epsilon, y.data_ptr(), scale_N.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight_D, scale_N)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight_D, scale_N = ctx.saved_tensors
        grad, threads = gradients[0].contiguous(), torch.get_num_threads()
        grad_x, grad_weight = torch.empty_like(x), torch.zeros(threads, x.size(-1), dtype=torch.float32)
        _library(x.dtype).norm_backward(
            x.data_ptr(), weight_D.data_ptr(), grad.data_ptr(), scale_N.data_ptr(), len(scale_N), x.size(-1), grad_x.data_ptr(),
            grad_weight.data_ptr(), threads,
        )  # fmt: skip
        return grad_x, grad_weight.sum(0).to(weight_D.dtype), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _library(gate.dtype).gated_forward(
            gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr(), torch.get_num_threads()
        )
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gate, up = ctx.saved_tensors
        grad = gradients[0].contiguous()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _library(gate.dtype).gated_backward(
            gate.data_ptr(), up.data_ptr(), grad.data_ptr(), gate.numel(), grad_gate.data_ptr(), grad_up.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_gate, grad_up


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """weight · x / √(mean x² + ε) over the last axis, whose size is a multiple of `REGISTER`; float32 or bfloat16 on the CPU."""
    return _Norm.apply(x, weight_D, epsilon)


def gated_unit(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of two tensors of one shape, a multiple of `REGISTER` numbers."""
    return _Gated.apply(gate, up)


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(gated_unit(module.gate_proj(x), module.up_proj(x)))


def fusable(model: Any) -> list[tuple[nn.Module, Any]]:
    """The norms and gated units of a model that this file computes as they do themselves, each with its forward."""
    found: list[tuple[nn.Module, Any]] = []
    known: dict[type, bool] = {}
    for module in model.modules():
        kind, has = type(module), set(dict(module.named_children())) | set(dict(module.named_parameters(recurse=False)))
        if not kind.__module__.startswith("transformers.models."):
            continue
        if kind.__name__.endswith("RMSNorm") and has == {"weight"} and hasattr(module, "variance_epsilon"):
            forward, width = _norm_forward, module.weight.numel()
        elif kind.__name__.endswith("MLP") and has == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            forward, width = _mlp_forward, getattr(module.up_proj, "out_features", 1)
        else:
            continue
        weights = list(module.parameters())
        plain = all(p.device.type == "cpu" and p.dtype == weights[0].dtype for p in weights)
        if plain and width % REGISTER == 0 and _compiled(weights[0].dtype) is not None:
            if kind not in known:
                known[kind] = _same(module, forward)
            if known[kind]:
                found.append((module, forward))
    return found


@torch.no_grad()
def _same(module: Any, forward: Any) -> bool:
    """Whether a module's own forward finds the same: what it is called says little about what it does."""
    first = module.weight if hasattr(module, "weight") else module.gate_proj.weight
    made = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(5, first.size(-1), generator=made)).to(first.dtype)
    mine, own = forward(module, x).float(), module(x).float()
    return bool(((mine - own).norm() <= (1e-5 if first.dtype == torch.float32 else 2**-7) * own.norm()).all())


@contextlib.contextmanager
def fused(modules: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Let these (`fusable`) compute so until the block ends."""
    lent = [module for module, _ in modules if "forward" not in module.__dict__]
    for module, forward in modules:
        if "forward" not in module.__dict__:
            module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in lent:
            del module.forward
