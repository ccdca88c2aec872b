"""Drawing from the exact softmax by inverting its cumulative distribution, one uniform number a token.

Each sequence owns its stream of uniforms (a counter-based Philox generator keyed by its seed), so what it draws does not
depend on who shares its batch. `torch.multinomial` over a large vocabulary costs more than the model does; two levels of
sums (blocks of 256, then inside one block) cost one pass over the probabilities and give the log-probability with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 256


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """[B, count] float32 in [0, 1), row b a function of seeds[b] alone (and a prefix of any longer row)."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).clamp_(max=1 - 2**-24).float()


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample a token for each row, and its log-probability under softmax(logits / temperature).

    Temperature 0 is greedy, with log-probabilities at temperature 1. Non-finite logits raise FloatingPointError: a
    model that has broken must not be sampled from.
    """
    if temperature not in (0.0, 1.0):
        logits_BV = logits_BV / temperature
    peak_B1 = logits_BV.amax(-1, keepdim=True)
    weight_BV = (logits_BV - peak_B1).exp_()
    rows, vocabulary = weight_BV.shape
    padded = torch.nn.functional.pad(weight_BV, (0, -vocabulary % BLOCK)) if vocabulary % BLOCK else weight_BV
    block_BKW = padded.view(rows, -1, BLOCK)
    block_cdf_BK = block_BKW.sum(-1).cumsum(-1)
    total_B1 = block_cdf_BK[:, -1:]
    if not bool(torch.isfinite(total_B1).all()):
        raise FloatingPointError("the policy's logits are not finite")
    if temperature == 0.0:
        token_B = logits_BV.argmax(-1)
    else:
        target_B1 = _below(uniform_B[:, None] * total_B1, total_B1)
        k_B1 = torch.searchsorted(block_cdf_BK, target_B1, right=True)
        before_B1 = torch.where(k_B1 > 0, block_cdf_BK.gather(1, (k_B1 - 1).clamp(min=0)), torch.zeros_like(target_B1))
        inner_cdf_BW = block_BKW[torch.arange(rows, device=k_B1.device), k_B1[:, 0]].cumsum(-1)
        inner_B1 = _below(target_B1 - before_B1, inner_cdf_BW[:, -1:])
        token_B = (k_B1 * BLOCK + torch.searchsorted(inner_cdf_BW, inner_B1, right=True))[:, 0]
    logp_B = (logits_BV.gather(1, token_B[:, None]) - peak_B1 - total_B1.log())[:, 0]
    return token_B, logp_B


def _below(value: Tensor, bound: Tensor) -> Tensor:
    """`value` kept in [0, bound): rounding must not select a token of probability 0 past the end."""
    return torch.minimum(value.clamp(min=0), torch.nextafter(bound, torch.zeros_like(bound)))
