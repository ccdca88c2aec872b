"""Linear layers as peft leaves them: with low-rank adapters beside the matrix (LoRA, arXiv 2106.09685), and with a
matrix that bitsandbytes quantised. What is said here is true at the moment of the call: which adapter is active changes
between two passes.

peft's layers are known by their names, so that nothing is imported where nothing is adapted.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..memory import with_room

_ADAPTED = {f"peft.tuners.lora.{file}" for file in ("layer", "bnb")}
_QUANTISED = ("Linear4bit", "Linear8bitLt")


class LowRank(NamedTuple):
    """y = W x + scale · B (A x), for a_RK [R, K] and b_NR [N, R]."""

    a_RK: Tensor
    b_NR: Tensor
    scale: float


def is_adapted(module: Any) -> bool:
    """Whether a module is a linear layer with adapters of peft's, active or not."""
    kind = type(module)
    return kind.__module__ in _ADAPTED and kind.__name__ in ("Linear", *_QUANTISED)


def base_of(module: Any) -> Any:
    """The layer beside whose product the adapters' are; a layer without adapters itself."""
    return module.base_layer if is_adapted(module) else module


def is_quantised(linear: Any) -> bool:
    """Whether a layer's matrix is one of bitsandbytes'."""
    kind = type(linear)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__ in _QUANTISED


def is_known(module: Any) -> bool:
    """Whether a layer's product is W x, for a matrix that `dense` gives, with at most one plain low-rank product
    beside it: no DoRA or other variant, no dropout, no bias of an adapter, nothing merged."""
    base = base_of(module)
    if not (type(base) is nn.Linear or (is_quantised(base) and _is_exact(base))):
        return False
    names = active(module)
    return not names or (
        len(names) == 1
        and not module.merged
        and names[0] not in module.lora_variant
        and module.lora_B[names[0]].bias is None
        and not (module.lora_dropout[names[0]].training and type(module.lora_dropout[names[0]]) is not nn.Identity)
    )


def _is_exact(quantised: Any) -> bool:
    """Whether a quantised layer's product is that with `dense`."""
    if type(quantised).__name__ == "Linear8bitLt":
        return "forward" in quantised.__dict__  # `weights_only`
    return not getattr(quantised.weight.quant_state, "packing_format_for_cpu", False)


def active(module: Any) -> list[str]:
    """The names of a layer's adapters that take part in its product."""
    if not is_adapted(module) or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def low_rank(module: Any) -> LowRank | None:
    """What is beside a layer's product, if `is_known`; None where no adapter is active."""
    for name in active(module):
        return LowRank(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))
    return None


def dense(linear: Any, dtype: torch.dtype) -> Tensor:
    """The matrix of a layer without adapters, [N, K]; a quantised one as bitsandbytes multiplies with it on a CPU."""
    weight: Any = linear.weight
    if not is_quantised(linear):
        return weight.detach()
    if type(linear).__name__ == "Linear8bitLt":
        codes, scale_N = (weight.data, weight.SCB) if linear.state.CB is None else (linear.state.CB, linear.state.SCB)
        return codes.to(dtype, copy=True).mul_(scale_N[:, None] * (1 / 127))
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found.to(dtype)


class _Dequantised(torch.autograd.Function):
    """The product with a frozen quantised matrix, which is dequantised once more for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        return functional.linear(x, dense(linear, x.dtype), linear.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] @ dense(ctx.linear, gradients[0].dtype), None


def weights_only(model: Any) -> None:
    """From now on the quantised layers of a model multiply what they are given with their matrix, as `dense` has it.

    bitsandbytes' int8 layers also round to int8 what they are given, but for the columns in which any token beside it
    has a large number (arXiv 2208.07339): a token's log-probability would depend on what it is batched with. Its 4-bit
    layers reorder their matrix in place on some CPUs, the first time that nothing asks for a gradient, and have none
    from then on."""
    for module in model.modules():
        if is_quantised(module) and type(module).__name__ == "Linear8bitLt":
            module.forward = partial(_widened, module)
        elif is_quantised(module):
            module.support_avx512bf16_for_cpu = False


def _widened(linear: Any, x: Tensor) -> Tensor:
    return _Dequantised.apply(x, linear)


class _Adapted(torch.autograd.Function):
    """W x + bias + scale · B (A x) with a frozen W: two passes over the results instead of peft's five, and one over
    the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, a_RK: Tensor, b_NR: Tensor, scale: float
    ) -> Tensor:
        y, low = _product(x, weight_NK, bias_N), functional.linear(x, a_RK)
        y.view(-1, len(weight_NK)).addmm_(low.view(-1, len(a_RK)), b_NR.t(), alpha=scale)
        ctx.save_for_backward(x, weight_NK, a_RK, b_NR, low)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight_NK, a_RK, b_NR, low = ctx.saved_tensors
        grad_MN = gradients[0].reshape(-1, len(weight_NK))
        grad_low_MR = (grad_MN @ b_NR).mul_(ctx.scale)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_MN, weight_NK).addmm_(grad_low_MR, a_RK).view_as(x)
        if ctx.needs_input_grad[3]:
            grad_a = grad_low_MR.t() @ x.reshape(-1, x.size(-1))
        if ctx.needs_input_grad[4]:
            grad_b = (grad_MN.t() @ low.view(-1, len(a_RK))).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


def _product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """W x + bias; on a CPU with room."""
    if x.device.type != "cpu":
        return functional.linear(x, weight_NK, bias_N)
    y = with_room((*x.shape[:-1], len(weight_NK)), x.dtype, 1)
    x_MK, y_MN = x.reshape(-1, x.size(-1)), y.view(-1, len(weight_NK))
    if bias_N is None:
        torch.mm(x_MK, weight_NK.t(), out=y_MN)
    else:
        torch.addmm(bias_N, x_MK, weight_NK.t(), out=y_MN)
    return y


def adapted_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What an adapted layer computes, with fewer passes over memory. Its own forward where no adapter is active or the
    layer not `is_known`, where the matrix is trained as well, and where numbers are of several dtypes."""
    beside, base = low_rank(module), base_of(module)
    quantised = is_quantised(base)
    used = [] if beside is None else [beside.a_RK, beside.b_NR, *([] if quantised else [base.weight])]
    if (
        beside is None
        or args
        or kwargs
        or not is_known(module)
        or any(t.dtype != x.dtype for t in used)
        or any(p.requires_grad for p in base.parameters())
    ):
        return type(module).forward(module, x, *args, **kwargs)
    if not quantised:
        return _Adapted.apply(x, base.weight, base.bias, *beside)
    y, low = base(x), functional.linear(x, beside.a_RK)
    rows = y.reshape(-1, y.size(-1)).addmm(low.reshape(-1, low.size(-1)), beside.b_NR.t(), alpha=beside.scale)
    return rows.view_as(y)
