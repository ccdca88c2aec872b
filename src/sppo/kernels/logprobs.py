"""Log-probabilities of given tokens, in chunks: no tensor of tokens × vocabulary is ever held.

The output projection and the log-softmax give float32 whatever the model's dtype: in bfloat16 a logit of 20 is only
known to 0.06, and that error would go straight into every importance ratio. The chunk's logits are computed again in
the backward pass, so the peak is one chunk instead of all tokens (a 49,152-word vocabulary costs 192 KiB per token
and copy).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..objective.ratio import wide
from .cpu import head
from .cuda import head as head_cuda

CHUNK_ELEMENTS = 1 << 23
"""Logits per chunk, 32 MiB in float32: enough tokens for full matmul speed, small enough to stay near the cache."""


def chunk_size(vocabulary: int) -> int:
    """Tokens per chunk."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Float32 matrix products of bfloat16 values at the speed of bfloat16 (CPUs that have it; elsewhere nothing
    changes).

    The product of two bfloat16 numbers is exact in float32 and the sums are kept in float32, so a projection of a
    bfloat16 model's hidden states loses nothing. A float32 gradient that enters is rounded once, as everywhere in
    such a model.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # PyTorch 2.9 and newer
    if matmul is None or dtype != torch.bfloat16:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _After(NamedTuple):
    """What follows the projection: z/τ, or (c/τ)·tanh(s·z/c) under a soft cap c of logits scaled by s."""

    temperature: float
    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.cap:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def slope(self, logits: Tensor, room: Tensor) -> Tensor:
        """A cap's derivative at what `apply_` gave, times the temperature; written into `room`."""
        assert self.cap is not None
        tanh = torch.mul(logits, self.temperature / self.cap, out=room[: len(logits)])
        return tanh.square_().neg_().add_(1).mul_(self.scale)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(f(h·Wᵀ + b)) at given targets, and the entropy (a diagnostic: no gradient). `after` is f."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, after: _After
    ) -> tuple[Tensor, Tensor]:
        weight, bias = wide(weight_VD), None if bias_V is None else wide(bias_V)
        logps, entropies, normalisers = [], [], []
        size = chunk_size(weight.size(0))
        logits_CV, weights_CV = _chunks(hidden_ND, weight, size, 2)
        for h, target in zip(hidden_ND.split(size), target_N.split(size), strict=True):
            with exact_products(weight_VD.dtype):
                logits = after.apply_(_logits(h, weight, bias, logits_CV))
            # log Z and the entropy log Z − Σ p·logit without a temporary of the logits' size (logsumexp and vecdot
            # make one each)
            top = logits.amax(-1)
            weights = torch.sub(logits, top[:, None], out=weights_CV[: len(h)]).exp_()
            total = weights.sum(-1)
            normaliser = top + total.log()
            logps.append(logits.gather(-1, target[:, None])[:, 0] - normaliser)
            entropies.append(normaliser - weights.mul_(logits).sum(-1) / total)
            normalisers.append(normaliser)
        normaliser_N = torch.cat(normalisers)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, normaliser_N)
        ctx.after = after
        entropy_N = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logps), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden_ND, weight_VD, bias_V, target_N, normaliser_N = ctx.saved_tensors
        grad_N, after = gradients[0], ctx.after
        weight, bias = wide(weight_VD), None if bias_V is None else wide(bias_V)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        size = chunk_size(weight.size(0))
        logits_CV, *rest = _chunks(hidden_ND, weight, size, 2 if after.cap else 1)
        for start in range(0, hidden_ND.size(0), size):
            part = slice(start, start + size)
            h, g = wide(hidden_ND[part]), grad_N[part]
            with exact_products(weight_VD.dtype):
                logits = after.apply_(_logits(h, weight, bias, logits_CV))
            slopes = [after.slope(logits, room) for room in rest]
            softmax = logits.sub_(normaliser_N[part, None]).exp_()
            # d logp / d logit = onehot − softmax
            grad_logits = softmax.mul_(-g[:, None])
            grad_logits.scatter_add_(1, target_N[part, None], g[:, None])
            grad_logits.div_(after.temperature)
            for slope in slopes:
                grad_logits.mul_(slope)
            with exact_products(weight_VD.dtype):
                # rounded once, to what the product multiplies anyway: twice as fast as a float32 product
                grad_hidden[part] = grad_logits.to(hidden_ND.dtype) @ weight_VD.to(hidden_ND.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, h)
            if grad_bias is not None:
                grad_bias.add_(grad_logits.sum(0))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
            None,
            None,
        )


class _CompiledTokenLogProbs(torch.autograd.Function):
    """The same in cpu/head.c, for inputs that `head.fits`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, temperature: float, keep: bool
    ) -> tuple[Tensor, Tensor]:
        compiled = head.Head(weight_VD, temperature)
        kept = compiled.room(len(hidden_ND)) if keep else None
        logp_N, entropy_N, normaliser_N = compiled.forward(hidden_ND, target_N, kept)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, normaliser_N)
        ctx.kept = kept
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden_ND, weight_VD, target_N, normaliser_N = ctx.saved_tensors
        compiled, kept = head.Head(weight_VD, ctx.temperature), ctx.kept
        grads = compiled.backward(hidden_ND, target_N, normaliser_N, gradients[0], ctx.needs_input_grad[1], kept)
        if kept is not None:  # the room goes to the next forward pass; a second backward pass computes the logits again
            ctx.kept = None
            compiled.spare(kept)
        return *grads, None, None, None


def _chunks(hidden_ND: Tensor, weight_VD: Tensor, size: int, count: int) -> Tensor:
    """Room for `count` chunks of logits, held from the first chunk to the last: malloc finds an aligned block's old
    place too small for its successor, so a block for each chunk made the heap grow with the response (1.3 GiB at
    4,096 tokens)."""
    return weight_VD.new_empty(count, min(size, len(hidden_ND)), weight_VD.size(0))


def _logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, room_CV: Tensor) -> Tensor:
    logits = torch.mm(wide(hidden_ND), weight_VD.t(), out=room_CV[: len(hidden_ND)])
    if bias_V is not None:
        logits += bias_V
    return logits


def token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    temperature: float,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log π(target | hidden) at a sampling temperature, and the entropy of each distribution (nats, no gradient).

    Args:
        hidden_ND: [N, D] final hidden states, one for each token to score (the state *before* that token).
        weight_VD, bias_V: the output projection.
        target_N: [N] token ids.
        temperature: divides the logits, exactly as in the rollout.
        scale, cap: of a model whose logits are scale·z, or cap·tanh(scale·z / cap), of the projection z.

    Returns:
        logp_N and entropy_N, float32 (float64 for float64 input).
    """
    if hidden_ND.size(0) == 0:
        empty = wide(hidden_ND).sum(1)
        return empty, empty.detach()
    if cap:
        return _TokenLogProbs.apply(hidden_ND, weight_VD, bias_V, target_N, _After(temperature, scale, cap))
    temperature /= scale
    if head.fits(hidden_ND, weight_VD, bias_V):
        keep = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
        return _CompiledTokenLogProbs.apply(hidden_ND, weight_VD, target_N, temperature, keep)
    if head_cuda.fits(hidden_ND, weight_VD, bias_V):
        return head_cuda.TokenLogProbs.apply(hidden_ND, weight_VD, target_N, temperature)
    return _TokenLogProbs.apply(hidden_ND, weight_VD, bias_V, target_N, _After(temperature))


def token_logps_from_logits(logits_NV: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The plain version, from logits: for models whose head does more than a projection, and the tests' oracle."""
    logp_NV = torch.log_softmax(wide(logits_NV) / temperature, -1)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1).detach()
    return logp_NV.gather(-1, target_N[:, None])[:, 0], entropy_N
