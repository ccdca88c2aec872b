"""Triton kernels (PyTorch's CUDA builds bring Triton): the head's softmax (head.py), and norms, gated units and
rotations (../elementwise.py). One program per row; sums in float32, results rounded once.

Import it only where Triton is; `TRITON_INTERPRET=1` runs the same code on a CPU, which is how it is tested without a
GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096
"""Logits that a program holds at once."""


@triton.jit
def _weigh(logits, target, scale, logp, entropy, normaliser, size, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * size
    # each lane keeps its own peak, Σ exp(x − peak) and Σ exp(x − peak)·x; lanes are joined at the end
    peak = tl.full([WIDTH], -1e30, tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    moment = tl.zeros([WIDTH], tl.float32)
    for start in range(0, size, WIDTH):
        column = start + tl.arange(0, WIDTH)
        x = tl.load(logits + column, mask=column < size, other=float("-inf")) * scale
        higher = tl.maximum(peak, x)
        shrink, weight = tl.exp(peak - higher), tl.exp(x - higher)
        total = total * shrink + weight
        moment = moment * shrink + weight * tl.where(column < size, x, 0.0)
        peak = higher
    top = tl.max(peak, 0)
    shrink = tl.exp(peak - top)
    z = tl.sum(total * shrink, 0)
    log_z = top + tl.log(z)
    tl.store(logp + row, tl.load(logits + tl.load(target + row)) * scale - log_z)
    tl.store(entropy + row, log_z - tl.sum(moment * shrink, 0) / z)
    tl.store(normaliser + row, log_z)


@triton.jit
def _slope(logits, target, scale, normaliser, grad, out, size, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = row.to(tl.int64) * size + column
    x = tl.load(logits + at, mask=column < size, other=float("-inf")) * scale
    softmax = tl.exp(x - tl.load(normaliser + row))
    slope = tl.load(grad + row) * scale * (tl.where(column == tl.load(target + row), 1.0, 0.0) - softmax)
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=column < size)


@triton.jit
def _norm(x, weight, epsilon, y, scale, size, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    at = row.to(tl.int64) * size + column
    value = tl.load(x + at, mask=column < size, other=0.0).to(tl.float32)
    rate = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / size + epsilon)
    by = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(y + at, (by * (value * rate)).to(y.dtype.element_ty), mask=column < size)
    tl.store(scale + row, rate)


@triton.jit
def _norm_back(x, weight, scale, grad, rows, grad_x, grad_weight, size, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    by = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * size + column
        rate = tl.load(scale + row)
        unit = tl.load(x + at, mask=column < size, other=0.0).to(tl.float32) * rate
        slope = tl.load(grad + at, mask=column < size, other=0.0).to(tl.float32)
        total += slope * unit
        slope *= by
        slope = rate * (slope - unit * (tl.sum(slope * unit, 0) / size))
        tl.store(grad_x + at, slope.to(grad_x.dtype.element_ty), mask=column < size)
    tl.store(grad_weight + tl.program_id(0) * size + column, total, mask=column < size)


@triton.jit
def _gated(gate, up, out, count, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _gated_back(gate, up, grad, grad_gate, grad_up, count, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    slope = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    opened = tl.sigmoid(g)
    by_gate = slope * u * opened * (1.0 + g * (1.0 - opened))
    tl.store(grad_gate + at, by_gate.to(grad_gate.dtype.element_ty), mask=at < count)
    tl.store(grad_up + at, (slope * g * opened).to(grad_up.dtype.element_ty), mask=at < count)


@triton.jit
def _turned(x, cos, sin, heads, half, out, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    real = (head < heads) & (column < half)
    at = (row * heads + head) * 2 * half + column
    first = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, mask=real, other=0.0).to(tl.float32)
    angle = row * 2 * half + column
    within = column < half
    cos_1 = tl.load(cos + angle, mask=within, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + half, mask=within, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=within, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + half, mask=within, other=0.0).to(tl.float32)
    if BACK:  # the transpose
        cross_1, cross_2 = sin_2 * second, -sin_1 * first
    else:
        cross_1, cross_2 = -sin_1 * second, sin_2 * first
    tl.store(out + at, (cos_1 * first + cross_1).to(out.dtype.element_ty), mask=real)
    tl.store(out + at + half, (cos_2 * second + cross_2).to(out.dtype.element_ty), mask=real)


def weigh(
    logits_CV: Tensor, target_C: Tensor, temperature: float, logp_C: Tensor, entropy_C: Tensor, normaliser_C: Tensor
) -> None:
    """Fill in log π of the targets, the entropies and log Σ exp of float32 logits / temperature."""
    size = logits_CV.size(1)
    _weigh[(len(logits_CV),)](
        logits_CV, target_C, 1 / temperature, logp_C, entropy_C, normaliser_C, size, WIDTH=WIDTH, num_warps=8
    )


def slope(
    logits_CV: Tensor, target_C: Tensor, temperature: float, normaliser_C: Tensor, grad_C: Tensor, out_CV: Tensor
) -> None:
    """Fill in the gradient of the logits from that of log π."""
    rows, size = logits_CV.shape
    _slope[(rows, triton.cdiv(size, WIDTH))](
        logits_CV, target_C, 1 / temperature, normaliser_C, grad_C, out_CV, size, WIDTH=WIDTH, num_warps=8
    )


def norm(x_ND: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The RMS norm of each row, and what it was multiplied by, [N]."""
    rows, size = x_ND.shape
    y_ND, scale_N = torch.empty_like(x_ND), torch.empty(rows, dtype=torch.float32, device=x_ND.device)
    _norm[(rows,)](x_ND, weight_D, epsilon, y_ND, scale_N, size, WIDTH=triton.next_power_of_2(size))
    return y_ND, scale_N


def norm_back(x_ND: Tensor, weight_D: Tensor, scale_N: Tensor, grad_ND: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of the weights, [D] in float32."""
    rows, size = x_ND.shape
    programs = min(programs, rows)
    grad_x_ND = torch.empty_like(x_ND)
    grad_weight = torch.empty(programs, size, dtype=torch.float32, device=x_ND.device)
    _norm_back[(programs,)](
        x_ND, weight_D, scale_N, grad_ND, rows, grad_x_ND, grad_weight, size, WIDTH=triton.next_power_of_2(size)
    )
    return grad_x_ND, grad_weight.sum(0)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    out, count = torch.empty_like(gate), gate.numel()
    _gated[(triton.cdiv(count, 1024),)](gate, up, out, count, WIDTH=1024)
    return out


def gated_back(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both."""
    grad_gate, grad_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    _gated_back[(triton.cdiv(count, 1024),)](gate, up, grad, grad_gate, grad_up, count, WIDTH=1024)
    return grad_gate, grad_up


def turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x, [..., heads, D], by its token's angles, [..., D]."""
    out, (heads, size) = torch.empty_like(x), x.shape[-2:]
    _turned[(cos.numel() // size,)](
        x, cos, sin, heads, size // 2, out, BACK=back,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(size // 2),
    )  # fmt: skip
    return out
