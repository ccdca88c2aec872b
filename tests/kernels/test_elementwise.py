"""Norms, gated units and rotations in compiled code against PyTorch's own."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sppo.kernels.elementwise import gated_unit, rms_norm, turned

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def off(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return float((mine.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (2, 5, 3, 64)])
def test_a_norm_and_its_gradients(compiled_for, dtype, shape):
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape)).to(dtype).requires_grad_(), torch.randn(shape[-1]).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    y.backward(grad)
    a, w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = w * a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-5)
    exact.backward(grad.double())
    assert y.dtype == dtype
    assert y.shape == x.shape
    for mine, theirs in ((y, exact), (x.grad, a.grad), (weight.grad, w.grad)):
        assert off(mine.detach(), theirs.detach()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_unit_and_its_gradients(compiled_for, dtype):
    torch.manual_seed(0)
    gate, up, grad = ((4 * torch.randn(5, 48)).to(dtype) for _ in range(3))
    gate[0, :3] = torch.tensor([90.0, -90.0, 0.0])
    gate, up = gate.requires_grad_(), up.requires_grad_()
    gated_unit(gate, up).backward(grad)
    a, b = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    exact = silu(a) * b
    exact.backward(grad.double())
    assert off(gated_unit(gate, up).detach(), exact.detach()) < TOLERANCE[dtype]
    assert off(gate.grad, a.grad) < TOLERANCE[dtype]
    assert off(up.grad, b.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_and_its_gradient(compiled_for, dtype):
    torch.manual_seed(0)
    x, grad = (torch.randn(1, 7, 3, 64).to(dtype) for _ in range(2))
    angle = torch.randn(1, 7, 32).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # as a projection's view may lie
    y = turned(x, cos, sin)
    y.backward(grad)
    a = x.detach().double().requires_grad_()
    exact, _ = apply_rotary_pos_emb(a, a, cos.double(), sin.double(), unsqueeze_dim=2)
    exact.backward(grad.double())
    assert off(y.detach(), exact.detach()) < TOLERANCE[dtype]
    assert off(x.grad, a.grad) < TOLERANCE[dtype]
    if dtype == torch.bfloat16:  # rounded where transformers rounds
        assert torch.equal(y, apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0])


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(2, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    (first,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
