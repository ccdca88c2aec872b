"""Drawing from the exact softmax by inverting its cumulative distribution, one uniform number a token.

Each sequence owns its stream of uniforms (a counter-based Philox generator keyed by its seed), so what it draws does not
depend on who shares its batch. `torch.multinomial` over a large vocabulary costs more than the model does; two levels of
sums (blocks of 256, then inside one block) cost one pass over the probabilities and give the log-probability with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 256
HEAD = 1024
"""Most of the mass is in so many tokens: the rest is sorted only for a nucleus that reaches beyond them."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which tokens may be drawn at all, in this order: the `top_k` likeliest (0: all), then the fewest of these that hold
    `top_p` of their mass, then those at least `min_p` times as likely as the likeliest. Ties with the last one stay in."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __bool__(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def sample_seed(*parts: int | str) -> int:
    """A 64-bit seed from what identifies a sample (run seed, stream, step, task, index): no state to save or lose."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """[B, count] float32 in [0, 1), row b a function of seeds[b] alone (and a prefix of any longer row)."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).clamp_(max=1 - 2**-24).float()


def draw(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, cut: Cut | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sample a token for each row.

    Temperature 0 is greedy, with log-probabilities at temperature 1. Non-finite logits raise FloatingPointError: a
    model that has broken must not be sampled from.

    Returns:
        token_B.
        logp_B: its log-probability under the whole softmax(logits / temperature).
        kept_B: the log of the mass that `cut` left, or None without a cut; it was drawn with log-probability logp − kept.
    """
    if temperature not in (0.0, 1.0):
        logits_BV = logits_BV / temperature
    peak_B1 = logits_BV.amax(-1, keepdim=True)
    weight_BV = (logits_BV - peak_B1).exp_()
    total_B1 = weight_BV.sum(-1, keepdim=True)
    if not bool(torch.isfinite(total_B1).all()):
        raise FloatingPointError("the policy's logits are not finite")
    if temperature == 0.0:
        token_B, kept_B = logits_BV.argmax(-1), None
    elif cut:
        kept_BV = weight_BV.masked_fill(weight_BV < _threshold(weight_BV, total_B1, cut), 0)
        token_B, kept_B1 = _invert(kept_BV, uniform_B[:, None])
        kept_B = (kept_B1 / total_B1).log()[:, 0].clamp(max=0)
    else:
        token_B, kept_B = _invert(weight_BV, uniform_B[:, None])[0], None
    logp_B = (logits_BV.gather(1, token_B[:, None]) - peak_B1 - total_B1.log())[:, 0]
    return token_B, logp_B, kept_B


def _invert(weight_BV: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulated weight passes `uniform` of the total, [B], and the total, [B, 1]."""
    rows, vocabulary = weight_BV.shape
    padded = torch.nn.functional.pad(weight_BV, (0, -vocabulary % BLOCK)) if vocabulary % BLOCK else weight_BV
    block_BKW = padded.view(rows, -1, BLOCK)
    block_cdf_BK = block_BKW.sum(-1).cumsum(-1)
    total_B1 = block_cdf_BK[:, -1:]
    target_B1 = _below(uniform_B1 * total_B1, total_B1)
    k_B1 = torch.searchsorted(block_cdf_BK, target_B1, right=True)
    before_B1 = torch.where(k_B1 > 0, block_cdf_BK.gather(1, (k_B1 - 1).clamp(min=0)), torch.zeros_like(target_B1))
    inner_cdf_BW = block_BKW[torch.arange(rows, device=k_B1.device), k_B1[:, 0]].cumsum(-1)
    inner_B1 = _below(target_B1 - before_B1, inner_cdf_BW[:, -1:])
    return (k_B1 * BLOCK + torch.searchsorted(inner_cdf_BW, inner_B1, right=True))[:, 0], total_B1


def _threshold(weight_BV: Tensor, total_B1: Tensor, cut: Cut) -> Tensor:
    """The least weight that stays in, [B, 1]; weights are relative to the likeliest token's 1."""
    least_B1 = torch.full_like(total_B1, cut.min_p)
    if cut.top_k == 0 and cut.top_p >= 1.0:
        return least_B1
    vocabulary = weight_BV.size(-1)
    count = min(cut.top_k or HEAD, vocabulary)
    top_BK = weight_BV.topk(count).values
    if cut.top_k:
        least_B1 = torch.maximum(least_B1, top_BK[:, -1:])
        total_B1 = weight_BV.masked_fill(weight_BV < top_BK[:, -1:], 0).sum(-1, keepdim=True)
    if cut.top_p < 1.0:
        enough_B1 = cut.top_p * total_B1
        if not cut.top_k and bool((top_BK.sum(-1, keepdim=True) < enough_B1).any()):
            top_BK = weight_BV.sort(-1, descending=True).values
        last_B1 = torch.searchsorted(top_BK.cumsum(-1), enough_B1).clamp(max=top_BK.size(-1) - 1)
        least_B1 = torch.maximum(least_B1, top_BK.gather(1, last_B1))
    return least_B1


def _below(value: Tensor, bound: Tensor) -> Tensor:
    """`value` kept in [0, bound): rounding must not select a token of probability 0 past the end."""
    return torch.minimum(value.clamp(min=0), torch.nextafter(bound, torch.zeros_like(bound)))
