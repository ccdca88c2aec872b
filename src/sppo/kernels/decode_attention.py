"""Attention of one new token per sequence to the keys and values in its slot: all the attention that decoding does.

The queries that share a key head lie next to each other, so they become the rows of one product, and no key is ever
copied for each of them. On a CPU a few sequences go at a time, each lot no further than its own longest reaches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Lot = tuple[int, int, int, Tensor]
"""Neighbouring sequences: the first, the one after the last, how many columns they read, and the mask of each, [b, 1,
1, columns]."""


def lots(lengths: Sequence[int], mask_B11S: Tensor) -> list[Lot]:
    """Cuts sequences into lots that are computed together.

    Args:
        lengths: how many columns of its slot each sequence fills, the new token's included.
        mask_B11S: 0 where it does, −inf beyond.
    """
    rows = len(lengths)
    many = max(16, -(-rows // 4)) if mask_B11S.device.type == "cpu" else rows
    starts = range(0, rows, many)
    reach = [max(lengths[start : start + many]) for start in starts]
    return [
        (start, start + many, width, mask_B11S[start : start + many, ..., :width])
        for start, width in zip(starts, reach, strict=True)
    ]


def attended(query: Tensor, key: Tensor, value: Tensor, among: Sequence[Lot], scale: float) -> Tensor:
    """Attends each query to its slot.

    Args:
        query: [B, groups, heads per group, D].
        key: [B, groups, columns, D].
        value: [B, groups, columns, E].
        among: from `lots`.

    Returns:
        [B, groups, heads per group, E], contiguous.
    """
    query = query.contiguous()  # the fused kernel wants it
    out = query.new_empty(*query.shape[:-1], value.size(-1))
    for start, end, width, mask in among:
        q, k, v = query[start:end], key[start:end, :, :width], value[start:end, :, :width]
        if q.device.type != "cpu" or q.dtype != torch.float32:
            out[start:end] = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            continue
        # two plain products: the fused kernel is made for many queries, and takes up to twice the time for one in
        # float32 (in bfloat16 it is as fast, and rounds less)
        score = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, k.shape[:2])
        weight = score.mul_(scale).add_(mask).softmax(-1).flatten(0, 1)
        torch.bmm(weight, v.flatten(0, 1), out=out[start:end].flatten(0, 1))
    return out
