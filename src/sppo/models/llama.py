"""One decoding step of a Llama-like model (Llama, SmolLM, Mistral, Qwen 2 and 3) on a CPU, without what transformers needs for more.

Between two matrix products a decoding step does next to nothing, some fifty times a layer: with few sequences or a tiny model
that is much of its time (docs/performance.md). Here activations lie feature by feature, [D, B], which is what makes the products fast
(models/narrow.py), residuals are added inside the products, and every operation is over all sequences. The weights are the
model's own tensors: there is nothing to copy and nothing to go stale. The engine compares it with the model before it uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from .logprobs import exact_products
from .narrow import ROWS, STRIDE
from .one_token import attended, lots

KINDS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def steps(model: Any) -> bool:
    """Whether `next_logits` knows how to step a model."""
    if type(model).__name__ not in KINDS:
        return False
    config = model.config
    ordinary = config.hidden_act in ("silu", "swish") and not getattr(config, "mlp_bias", False)
    window = getattr(config, "sliding_window", None) is not None
    plain = all(type(m) is torch.nn.Linear for m in model.modules() if isinstance(m, torch.nn.Linear))
    weights = {(p.dtype, p.device.type) for p in model.parameters()}
    return ordinary and not window and plain and weights in ({(torch.float32, "cpu")}, {(torch.bfloat16, "cpu")})


def next_logits(model: Any, head_VD: Tensor, slots: Any, ids_B: Tensor, length_B: Tensor, columns: int) -> Tensor:
    """Float32 logits after one more token of each sequence, [B, V].

    Args:
        head_VD: the output projection in float32.
        slots: the keys and values of the sequences (rollout/slots.py); those of the new tokens are written into it.
        ids_B: the new tokens.
        length_B: how many tokens of each sequence are in its slot already: also the new token's position.
        columns: the longest sequence, new token included.
    """
    config, rows = model.config, len(ids_B)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    spare = -rows % STRIDE if STRIDE // 2 < rows < ROWS else 0
    if spare:  # products of a multiple of eight columns are faster than of a few less
        ids_B = torch.cat([ids_B, ids_B[:1].expand(spare)])
    position_B = torch.cat([length_B, length_B[:1].expand(spare)]) if spare else length_B
    cos_1B, sin_1B = _turns(model.model.rotary_emb, position_B, size, model.dtype)
    beyond_BS = torch.arange(columns) > length_B[:, None]
    mask_BS = torch.zeros(beyond_BS.shape, dtype=model.dtype).masked_fill_(beyond_BS, -torch.inf)
    among = lots((length_B + 1).tolist(), mask_BS[:, None, None])
    slots.write_next(length_B, columns)
    h_DB = model.model.embed_tokens.weight[ids_B].t().contiguous()
    turned_DB = h_DB.new_empty((heads + 2 * groups) * size, rows + spare)
    split = [heads * size, groups * size, groups * size]
    for layer, cache in zip(model.model.layers, slots.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        x_DB = _normed(h_DB, layer.input_layernorm)
        for part, projection in zip(
            turned_DB.split(split), (attention.q_proj, attention.k_proj, attention.v_proj), strict=True
        ):
            torch.mm(projection.weight, x_DB, out=part)
            if projection.bias is not None:
                part += projection.bias[:, None]
        q_HSB, k_GSB = (part.view(-1, size, rows + spare) for part in turned_DB.split(split)[:2])
        if hasattr(attention, "q_norm"):
            q_HSB.copy_(_normed(q_HSB, attention.q_norm))
            k_GSB.copy_(_normed(k_GSB, attention.k_norm))
        both = turned_DB[: split[0] + split[1]].view(-1, 2, size // 2, rows + spare)
        swapped = both.flip(1)
        both.mul_(cos_1B).addcmul_(swapped, sin_1B)
        v_GSB = turned_DB.split(split)[2].view(groups, size, -1)
        key, value = cache.update(
            k_GSB[..., :rows].permute(2, 0, 1)[:, :, None], v_GSB[..., :rows].permute(2, 0, 1)[:, :, None]
        )
        q_BGRS = q_HSB[..., :rows].permute(2, 0, 1).unflatten(1, (groups, -1))
        seen_DB = pad(attended(q_BGRS, key, value, among, attention.scaling).flatten(1), (0, 0, 0, spare)).t()
        h_DB.addmm_(attention.o_proj.weight, seen_DB)
        if attention.o_proj.bias is not None:
            h_DB += attention.o_proj.bias[:, None]
        x_DB = _normed(h_DB, layer.post_attention_layernorm)
        gate_DB = silu(torch.mm(mlp.gate_proj.weight, x_DB), inplace=True)
        h_DB.addmm_(mlp.down_proj.weight, gate_DB.mul_(torch.mm(mlp.up_proj.weight, x_DB)))
    with exact_products(h_DB.dtype):
        return torch.mm(head_VD, _normed(h_DB, model.model.norm).to(head_VD.dtype)).t()[:rows]


def _normed(x: Tensor, norm: Any) -> Tensor:
    """RMS norm over the last dimension but one, in float32 and rounded where transformers rounds."""
    wide = x.float()
    rms = torch.linalg.vecdot(wide, wide, dim=-2).div_(x.size(-2)).add_(norm.variance_epsilon).rsqrt_()
    return (wide * rms.unsqueeze(-2)).to(x.dtype).mul_(norm.weight[:, None])


def _turns(rotary: Any, position_B: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines, [1, 1, size / 2, B], and signed sines, [1, 2, size / 2, B], of a rotary embedding."""
    cos_1BS, sin_1BS = rotary(torch.empty(0, dtype=dtype), position_B[None])
    cos, sin = cos_1BS[0, :, : size // 2].t(), sin_1BS[0, :, : size // 2].t()
    return cos.contiguous()[None, None], torch.stack([-sin, sin])[None]
