"""The output projection and its log-softmax on CUDA: products of the model's own dtype with float32 results, and one
kernel for all that is done to a chunk of logits (triton.py). The arithmetic is logprobs.py's; a chunk's logits are
the only ones there are.

Liger's and cut-cross-entropy's kernels give the loss of a target, and not the distribution's entropy beside it;
docs/performance.md compares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..elementwise import triton_is_there

CHUNK_ELEMENTS = 1 << 25
"""Logits per chunk, 128 MiB in float32: products large enough for full speed."""


def wide_products() -> bool:
    """Whether this PyTorch (2.8 and newer) multiplies bfloat16 matrices with a float32 result on CUDA."""
    return hasattr(torch.ops.aten.mm, "dtype_out")


def _wide_sums() -> bool:
    """Whether it adds such a product to a float32 matrix (2.10 and newer)."""
    return wide_products() and tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 10)


def fits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> bool:
    """Whether `TokenLogProbs` can take these."""
    return (
        bias_V is None
        and hidden_ND.is_cuda
        and hidden_ND.dtype == weight_VD.dtype
        and (hidden_ND.dtype == torch.float32 or (hidden_ND.dtype in (torch.bfloat16, torch.float16) and _wide_sums()))
        and triton_is_there()
    )


def exact_logits(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor | None = None) -> Tensor:
    """h·Wᵀ in float32, exact but for the sums' rounding: the product of two bfloat16 numbers is a float32."""
    if out_NV is None:
        out_NV = torch.empty(len(hidden_ND), len(weight_VD), dtype=torch.float32, device=hidden_ND.device)
    if hidden_ND.dtype == torch.float32:
        return torch.mm(hidden_ND, weight_VD.t(), out=out_NV)
    return torch.ops.aten.mm.dtype_out(hidden_ND, weight_VD.t(), torch.float32, out=out_NV)


class TokenLogProbs(torch.autograd.Function):
    """log softmax(h·Wᵀ)/τ at given targets, and the entropy (a diagnostic: no gradient)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        from . import triton as kernels

        hidden_ND, target_N = hidden_ND.contiguous(), target_N.contiguous()
        logp_N, entropy_N, normaliser_N = (
            torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device) for _ in range(3)
        )
        for part, room_CV in _chunks(hidden_ND, weight_VD):
            logits_CV = exact_logits(hidden_ND[part], weight_VD, room_CV)
            kernels.weigh(logits_CV, target_N[part], temperature, logp_N[part], entropy_N[part], normaliser_N[part])
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, normaliser_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        from . import triton as kernels

        hidden_ND, weight_VD, target_N, normaliser_N = ctx.saved_tensors
        grad_N = gradients[0].float().contiguous()
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        slope = None
        for part, room_CV in _chunks(hidden_ND, weight_VD):
            logits_CV = exact_logits(hidden_ND[part], weight_VD, room_CV)
            if slope is None:  # rounded once, to what the products multiply
                slope = (
                    logits_CV
                    if hidden_ND.dtype == torch.float32
                    else torch.empty_like(logits_CV, dtype=hidden_ND.dtype)
                )
            slope_CV = slope[: len(logits_CV)]
            kernels.slope(logits_CV, target_N[part], ctx.temperature, normaliser_N[part], grad_N[part], slope_CV)
            torch.mm(slope_CV, weight_VD, out=grad_hidden[part])
            if grad_weight is None:
                continue
            if hidden_ND.dtype == torch.float32:
                grad_weight.addmm_(slope_CV.t(), hidden_ND[part])
            else:
                torch.ops.aten.addmm.dtype_out(
                    grad_weight, slope_CV.t(), hidden_ND[part], torch.float32, out=grad_weight
                )
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None


def _chunks(hidden_ND: Tensor, weight_VD: Tensor) -> Any:
    """Slices of the tokens, and room for each one's logits."""
    vocabulary, tokens = len(weight_VD), len(hidden_ND)
    # from a quarter of the hidden size on, the weights' gradient, which every chunk reads and writes, costs less
    # than its product
    size = min(max(16, CHUNK_ELEMENTS // vocabulary, hidden_ND.size(1) // 4), tokens)
    room_CV = torch.empty(size, vocabulary, dtype=torch.float32, device=hidden_ND.device)
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        yield part, room_CV[: part.stop - start]
