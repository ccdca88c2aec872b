"""Attention over packed sequences: one row holds many, each attends to itself alone, and nothing is spent on padding.

Sequences of one length that lie next to each other share a call, so sort by length before packing. It plugs into transformers'
attention interface, so every decoder that uses it can be packed: `use(model)`, then `model(..., **boundaries([5, 3, 3]))`. Without
them the model attends as it always does (causal). A test against each sequence alone must decide whether a model may be packed:
some do more in their attention than this knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sppo_packed"


def use(model: Any) -> None:
    """Let a model's attention layers understand `lengths`. Raises ValueError for a model without transformers' attention interface."""
    model.set_attn_implementation(NAME)


def boundaries(lengths: Sequence[int]) -> dict[str, Tensor]:
    """What tells the attention layers where sequences begin and end, by the name that transformers hands on to them."""
    return {"cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0)}


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence to itself.

    Args:
        query, key, value: [1, heads, L, D]; keys and values may have fewer heads (grouped queries).
        sliding_window: how far back a layer looks, or None.
        cu_seq_lens_q: where sequences begin, and L, as `boundaries` makes it.

    Returns:
        [1, L, heads, D], as transformers' attention functions do.

    Raises:
        ValueError: for something in the attention that this does not know (a soft cap, sinks).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("this model's attention does more than a softmax; it cannot be packed")
    out = []
    lengths: list[int] = cu_seq_lens_q.diff().tolist()
    for start, length, count in runs(lengths):
        # [heads, count × length, D] as [count, heads, length, D]
        q, k, v = (
            x[0, :, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)
            for x in (query, key, value)
        )
        band = None
        if sliding_window is not None and length > sliding_window:
            back = torch.arange(length, device=q.device)
            band = (back[:, None] >= back) & (back[:, None] - back < sliding_window)
        o = scaled_dot_product_attention(
            q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=True
        )
        out.append(o.transpose(1, 2).flatten(0, 1))  # [count × length, heads, D]
    return torch.cat(out)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Packed or not, what is causal needs no mask of its own."""


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _no_mask)
