"""Temporarily replaces Llama-family layer forwards with faster equivalents (elementwise.py), linear layers with
adapters likewise (low_rank.py), and on a CPU the embedding with one whose gradient is only as large as what was looked
up.

`with fused(fusable(model)):` replaces them until the block ends. `fusable` compares each replacement with the layer's
own forward first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from transformers import AttentionInterface

from .attention import NAME
from .elementwise import REGISTER, compiles, gated_unit, rms_norm, turned
from .low_rank import active, adapted_forward, is_adapted


class _Embedded(torch.autograd.Function):
    """Looks up rows of an embedding, and adds their gradient to those rows of `weight.grad` directly.

    PyTorch would make a matrix of the vocabulary's size, zeros but for a few rows, and add all of it. Rows that occur
    several times are summed in float32, and rounded once."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, module: nn.Embedding, ids: Tensor) -> Tensor:
        ctx.module, ctx.ids = module, ids
        return functional.embedding(ids, module.weight.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, pad = ctx.module.weight, ctx.module.padding_idx
        row_M, place_N = ctx.ids.flatten().unique(return_inverse=True)
        sum_MD = torch.zeros(len(row_M), weight.size(1), dtype=torch.float32)
        sum_MD.index_add_(0, place_N, gradients[0].flatten(0, -2).float())
        if pad is not None:
            sum_MD[row_M == pad] = 0
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad[row_M] = (weight.grad[row_M].float() + sum_MD).to(weight.dtype)
        return None, None, None


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype:
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, module.variance_epsilon)


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(gated_unit(module.gate_proj(x), module.up_proj(x)))


def _embedding_forward(module: Any, ids: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and module.weight.requires_grad):
        return type(module).forward(module, ids)
    return _Embedded.apply(torch.empty(0, requires_grad=True), module, ids)


def _attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    cos, sin = position_embeddings
    packed = module.config._attn_implementation == NAME
    if not packed or cos.dtype != hidden_states.dtype or cos.shape != (*hidden_states.shape[:2], module.head_dim):
        return type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
    shape = *hidden_states.shape[:-1], -1, module.head_dim
    query, key, value = (part(hidden_states).view(shape) for part in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query, key, value = (x.transpose(1, 2) for x in (turned(query, cos, sin), turned(key, cos, sin), value))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    interface = AttentionInterface().get_interface(module.config._attn_implementation, None)
    dropout = module.attention_dropout if module.training else 0.0
    seen, weights = interface(
        module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs
    )
    return module.o_proj(seen.reshape(*shape[:-2], -1)), weights


_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_FORWARDS = {
    f"{family}{kind}": forward
    for family in _FAMILIES
    for kind, forward in (("RMSNorm", _norm_forward), ("MLP", _mlp_forward), ("Attention", _attention_forward))
}


def fusable_family(model: Any) -> bool:
    """Whether a causal model's norms and gated units are of a kind that can be replaced, by its name and sizes
    alone."""
    kind, config = type(model), model.config
    if kind.__name__.removesuffix("ForCausalLM") not in _FAMILIES or not kind.__module__.startswith(
        "transformers.models."
    ):
        return False
    return config.hidden_size % REGISTER == 0 and config.intermediate_size % REGISTER == 0


def fusable(model: Any) -> list[tuple[nn.Module, Any]]:
    """Returns the norms, gated units, attentions, adapted linear layers and the embedding of a model that can be
    replaced, each with its new forward.

    Empty unless all weights are on one device and in one dtype, for which there is compiled code; what is quantised
    aside."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    kinds = {(p.device.type, p.dtype) for p in weights}
    if len(kinds) != 1 or not compiles(*next(iter(kinds))):
        return []
    found: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        kind, forward = type(module), _FORWARDS.get(type(module).__name__)
        if is_adapted(module):
            forward = adapted_forward
        elif forward is None or not kind.__module__.startswith("transformers.models."):
            continue
        if _whole_registers(module, forward) and _same(module, forward, weights[0]):
            found.append((module, forward))
    embedding = model.get_input_embeddings()
    if next(iter(kinds))[0] != "cpu":  # a GPU adds a matrix of the vocabulary's size in no time
        return found
    if type(embedding) is nn.Embedding and not (embedding.max_norm or embedding.sparse or embedding.scale_grad_by_freq):
        found.append((embedding, _embedding_forward))
    return found


def _whole_registers(module: Any, forward: Any) -> bool:
    if forward is adapted_forward:
        return True
    if forward is _norm_forward:
        return module.weight.numel() % REGISTER == 0
    if forward is _mlp_forward:
        return getattr(module.up_proj, "out_features", 1) % REGISTER == 0
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return module.head_dim % (2 * REGISTER) == 0 and window is None and module.config._attn_implementation == NAME


def _width(module: Any, forward: Any) -> int:
    """The numbers of a token that a module reads."""
    if forward is _norm_forward:
        return module.weight.numel()
    first = {_mlp_forward: "up_proj", _attention_forward: "q_proj"}.get(forward)
    return (getattr(module, first) if first else module).in_features


@torch.no_grad()
def _same(module: Any, forward: Any, like: Tensor) -> bool:
    """Whether a module's own forward gives the same for small and for large numbers: a name says little about what
    another version of transformers or peft computes. A fresh adapter adds 0, so it is shown with weights that do not.
    """
    made = torch.Generator().manual_seed(0)
    rest: tuple[Any, ...] = ()
    if forward is _attention_forward:
        angle = torch.randn(1, 4, module.head_dim // 2, generator=made).repeat(1, 1, 2)
        rest = ((angle.cos().to(like), angle.sin().to(like)), None)
    x = torch.randn(1, 4, _width(module, forward), generator=made)
    shown = {f"lora_B.{name}.weight": module.lora_B[name].weight for name in active(module)}
    shown = {name: (torch.randn(b.shape, generator=made) / 8).to(b) for name, b in shown.items()}
    for scale in (1.0, 100.0):
        given = ((scale * x).to(like), *rest)
        own = functional_call(module, shown, given)
        with fused([(module, forward)]):
            mine = functional_call(module, shown, given)
        if rest:
            mine, own = mine[0], own[0]
        error = float((mine.float() - own.float()).norm())
        if not error < (1e-5 if like.dtype == torch.float32 else 2**-7) * float(own.float().norm()):
            return False
    return True


@contextlib.contextmanager
def fused(modules: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Replace the forwards of these modules (`fusable`) until the block ends."""
    replaced = [(module, forward) for module, forward in modules if "forward" not in module.__dict__]
    try:
        for module, forward in replaced:
            module.forward = partial(forward, module)
        yield
    finally:
        for module, _ in replaced:
            module.__dict__.pop("forward", None)
