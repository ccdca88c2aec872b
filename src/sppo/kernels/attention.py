"""Attention over packed sequences: one row holds many, each attends to itself alone, and nothing is spent on padding.

Sequences of one length that lie next to each other share a call, so sort by length before packing. It plugs into
transformers' attention interface, so every decoder that uses it can be packed: `use(model)`, then
`model(..., **boundaries([5, 3, 3]))`. Without them the model attends as it always does (causal). Whether a model may be
packed must be decided by a test against each sequence alone: some models do more in their attention than this knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cpu import attention as compiled
from .cuda import attention as attention_cuda
from .decode_attention import attended, lots

NAME = "sppo_packed"
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Packed and separate outputs may differ by this much of the largest, for rounding; a leak is larger."""


def use(model: Any) -> None:
    """Make a model's attention layers read `boundaries`. Raises ValueError for a model without transformers'
    attention interface, or with layers of another kind: a convolution or a recurrent state would run on from one
    sequence into the next."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ValueError("its layers remember more than keys and values")
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError("its positions depend on the longest sequence beside it")
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:  # transformers only logs that
        raise ValueError("it does not use transformers' attention interface")


def boundaries(lengths: Sequence[int]) -> dict[str, Tensor]:
    """Keyword arguments that say where sequences begin and end, under the name that transformers passes to its
    attention layers."""
    return {"cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0)}


def slot_boundaries(lengths: Sequence[int]) -> dict[str, Tensor]:
    """The same for one new token per sequence, of which `lengths` tokens are in its slot by then."""
    return {"cu_seq_lens_k": torch.tensor([0, *lengths]).cumsum(0)}


def runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, length, how many) of each run of equally long sequences."""
    start = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        yield start, length, count
        start += length * count


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence to itself, or of one token per sequence to what its slot holds
    (rollout/kv_cache.py).

    Args:
        query, key, value: [1, heads, L, D]; keys and values may have fewer heads (grouped queries).
        attention_mask: for one query per row, [B, 1, 1, S]: 0 where a row's slot is filled, −inf beyond.
        sliding_window: how far back a layer looks, or None.
        cu_seq_lens_q: where sequences begin, and L, as `boundaries` makes it.
        cu_seq_lens_k: for one query per row, the same of what the slots hold.

    Returns:
        [1, L, heads, D], as transformers' attention functions do.

    Raises:
        ValueError: for attention that this does not know (a soft cap, sinks, a window in the mask alone).
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("its attention does more than a softmax")
    if sliding_window is None and _looks_no_further(module):
        raise ValueError("its attention is limited by a mask alone")
    if cu_seq_lens_k is not None and attention_mask is not None:
        return _next_token(query, key, value, attention_mask, cu_seq_lens_k, scaling, sliding_window), None
    if cu_seq_lens_q is not None:
        return _packed(query, key, value, cu_seq_lens_q, scaling, dropout, sliding_window), None
    if attention_mask is None:
        attention_mask = _band(query.size(2), sliding_window, query.device)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs,
    )  # fmt: skip


def _packed(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """Causal attention of each sequence to itself, [1, L, heads, D]; in one call where there is a kernel for it."""
    parts = query[0], key[0], value[0]
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    if window is None and dropout == 0.0 and compiled.fits(*parts, len(starts) - 1):
        return compiled.attention(*parts, starts, scale)[None]
    if dropout == 0.0 and attention_cuda.fits(*parts, window):
        return attention_cuda.attention(*parts, starts, scale, window)[None]
    out = []
    lengths: list[int] = starts.diff().tolist()
    for start, length, count in runs(lengths):
        # [heads, count × length, D] as [count, heads, length, D]
        q, k, v = (x[:, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1) for x in parts)
        band = _band(length, window, q.device)
        o = scaled_dot_product_attention(
            q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=True
        )
        out.append(o.transpose(1, 2).flatten(0, 1))  # [count × length, heads, D]
    return torch.cat(out)[None]


def _looks_no_further(module: Any) -> bool:
    """Whether the config says that this layer has a window or chunks."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[module.layer_idx] != "full_attention"
    return getattr(config, "sliding_window", None) is not None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query of a sequence sees under a sliding window, [length, length]; None: all before it."""
    if window is None or length <= window:
        return None
    back = torch.arange(length, device=device)
    return (back[:, None] >= back) & (back[:, None] - back < window)


def _next_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_B11S: Tensor,
    boundaries: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of one query per row, [B, 1, heads, D]."""
    if window is not None:
        filled_B11 = (mask_B11S == 0).sum(-1)
        column_S = torch.arange(mask_B11S.size(-1), device=query.device)
        mask_B11S = mask_B11S.masked_fill(column_S < filled_B11[..., None] - window, -torch.inf)
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.size(1), -1, size)
    scale = size**-0.5 if scaling is None else scaling
    seen = attended(grouped, key, value, lots(boundaries.diff().tolist(), mask_B11S), scale)
    return seen.view(rows, 1, heads, -1)  # values may be narrower than keys (DeepSeek)


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Packed or not, what is causal needs no mask of its own; what is padded gets the one that transformers makes."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
