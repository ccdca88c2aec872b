"""The plain decoding loop: a left-padded batch and the cache that transformers makes. Short, slow, and right for any
decoder.

It is what the local engine falls back to for models that its slots cannot hold, and what its tests compare with. Every
different prompt is read once: with all others in one padded pass, or, where padding would go into a recurrent state,
with those of its length. All then decode together. A model whose cache is of its own kind reads each whole sequence
again for every token.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from ..files import first_line
from ..kernels.attention import TOLERANCE
from ..kernels.cpu.build import NoCompiler
from ..models.head import backbone
from ..models.policy import Policy
from ..models.weights import Weights
from .engine import Sample, Sampling
from .sequences import Drawn, Forced, Responses, next_inputs

Decode = Callable[[Sequence[Sequence[int]], Responses], None]
"""Lets the responses to prompts grow to their ends."""


class PlainEngine:
    """See `rollout.engine.Engine`; the weights are the policy's own."""

    context: int | None = None

    def __init__(self, policy: Policy) -> None:
        self.policy, self.version = policy, 0
        self.cached = True
        why = trouble(policy, self._decode)
        self.cached = not why
        self.stated = f"every token reads its whole sequence again: {why}" if why else ""

    def load(self, weights: Weights, version: int) -> None:
        """Take these weights; the policy's own lie here already, and are not copied."""
        self.policy.take(weights)
        self.version = version

    def holds(self, fingerprint: str) -> bool:
        """Whether the policy that is sampled from has these weights."""
        return self.policy.fingerprint() == fingerprint

    def close(self) -> None:
        """Nothing to release."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Sample]:
        """Sample one response per prompt."""
        drawn = Drawn(self.policy, seeds, sampling, limits)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike ones together
        for start in range(0, len(order), sampling.batch):
            self._decode(prompts, drawn, order[start : start + sampling.batch])
            if progress:
                progress(min(start + sampling.batch, len(order)))
        return drawn.samples(self.version)

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol."""
        given = Forced(responses)
        self._decode(prompts, given)
        return given.logps

    def _decode(self, prompts: Sequence[Sequence[int]], responses: Responses, live: list[int] | None = None) -> None:
        loop = decode if self.cached else decode_anew
        loop(self.policy, prompts, responses, list(range(len(prompts))) if live is None else live)


@torch.inference_mode()
def decode(policy: Policy, prompts: Sequence[Sequence[int]], responses: Responses, live: list[int]) -> None:
    """Let the responses to the prompts `live` grow to their ends; positions come from the cumulated mask."""
    lengths = {i: len(prompts[i]) for i in live}
    logits_BV, cache, mask_BS = _read(policy, [tuple(prompts[i]) for i in live])
    while True:
        finished = set(responses.take(logits_BV, live))
        if finished:
            keep = torch.tensor([b for b in range(len(live)) if b not in finished], device=policy.device)
            live = [i for b, i in enumerate(live) if b not in finished]
            if not live:
                return
            cache.reorder_cache(keep)
            mask_BS = mask_BS[keep]
        last_B1, before = next_inputs(lengths, responses, live)
        mask_BS = pad(mask_BS, (0, 1), value=1)
        position_B1 = torch.tensor(before, device=policy.device)[:, None]
        logits_BV = _next_logits(policy, cache, last_B1.to(policy.device), mask_BS, position_B1)


@torch.inference_mode()
def decode_anew(policy: Policy, prompts: Sequence[Sequence[int]], responses: Responses, live: list[int]) -> None:
    """The same without a cache: right for any causal model, and quadratic."""
    while live:
        rows = [[*prompts[i], *responses.ids[i]] for i in live]
        width = max(map(len, rows))
        ids_BL = torch.tensor([[*row, *[policy.pad_id] * (width - len(row))] for row in rows])
        last_B = torch.tensor([b * width + len(row) - 1 for b, row in enumerate(rows)])
        logits_BV = policy.scorer.head.of({"input_ids": ids_BL.to(policy.device)}, last_B.to(policy.device))
        finished = set(responses.take(logits_BV, live))
        live = [i for b, i in enumerate(live) if b not in finished]


def _read(policy: Policy, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Any, Tensor]:
    """Read every different prompt once. Returns the logits after each row's, [B, V], a cache of B rows, and which of its
    columns are a row's own, [B, S]."""
    different = sorted(set(rows), key=len)
    stateful = getattr(policy.model, "_is_stateful", False) or getattr(backbone(policy.model), "_is_stateful", False)
    parts = []
    for _, alike in groupby(different, key=lambda row: len(row) if stateful else 0):
        same = list(alike)
        width = max(map(len, same))
        mask_US = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in same], device=policy.device)
        ids_US = torch.tensor([[policy.pad_id] * (width - len(row)) + list(row) for row in same], device=policy.device)
        cache = DynamicCache(config=policy.model.config)
        position_US = (mask_US.cumsum(1) - 1).clamp(min=0)
        parts.append((_next_logits(policy, cache, ids_US, mask_US, position_US), cache, mask_US))
    caches, masks = [cache for _, cache, _ in parts], [mask for _, _, mask in parts]
    if len(parts) > 1:
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            _join(layers)
    where = {row: n for n, row in enumerate(different)}
    each_B = torch.tensor([where[row] for row in rows], device=policy.device)
    caches[0].reorder_cache(each_B)
    return torch.cat([logits for logits, _, _ in parts])[each_B], caches[0], _beside(masks, -1)[each_B]


def _join(layers: Sequence[Any]) -> None:
    """Put the rows of a layer's caches into the first one: keys and values padded on the left, states as they are."""
    first = layers[0]
    if (known := set(vars(first))) - _KNOWN:
        raise ValueError(f"its cache holds {min(known - _KNOWN)}, which the plain loop does not know")
    if getattr(first, "keys", None) is not None:
        first.keys = _beside([layer.keys for layer in layers], -2)
        first.values = _beside([layer.values for layer in layers], -2)
    if hasattr(first, "cumulative_length"):
        first.cumulative_length = max(layer.cumulative_length for layer in layers)
    for name in ("conv_states", "recurrent_states"):
        for n, state in getattr(first, name, {}).items():
            if state is not None:
                getattr(first, name)[n] = torch.cat([getattr(layer, name)[n] for layer in layers])


_KNOWN = {
    "keys", "values", "is_initialized", "dtype", "device", "sliding_window", "cumulative_length",
    "_sliding_window_tensor", "record_past", "number_of_states", "conv_states", "recurrent_states",
    "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size",
}  # fmt: skip
"""What transformers' caches of keys, values and states hold."""


def _beside(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Rows of several batches as one, each filled with zeros on the left to the longest."""
    width = max(t.size(dim) for t in tensors)
    return torch.cat([pad(t, (0, 0) * (-1 - dim) + (width - t.size(dim), 0)) for t in tensors])


def _next_logits(policy: Policy, cache: Any, ids_BS: Tensor, mask_BS: Tensor, position_BS: Tensor) -> Tensor:
    """Logits after each row, [B, V]. A model of states alone knows neither masks nor positions."""
    if "cache_params" in inspect.signature(backbone(policy.model).forward).parameters:
        return policy.next_logits(input_ids=ids_BS, cache_params=cache)
    return policy.next_logits(input_ids=ids_BS, attention_mask=mask_BS, position_ids=position_BS, past_key_values=cache)


def trouble(policy: Policy, decode: Decode, rows: int = 4, longest: int = 5) -> str:
    """Why a way of decoding does not find what the policy itself finds of a few short sequences; empty when it does."""
    vocabulary = policy.vocabulary
    longest = min(longest, (policy.context or longest) - 4)
    lengths = [max(1, longest - 2 * (b % 2) - b // 3) for b in range(rows)]
    prompts = [[(7 * b + 3 * t + 1) % vocabulary for t in range(n)] for b, n in enumerate(lengths)]
    responses = [[(5 * b + 2 * t + 2) % vocabulary for t in range(2 + b % 3)] for b in range(rows)]
    given = Forced(responses)
    try:
        decode(prompts, given)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, NoCompiler) as error:
        return first_line(error)
    theirs = policy.given_logps(prompts, responses)
    mine_N, theirs_N = (torch.tensor([x for row in found for x in row]) for found in (given.logps, theirs))
    gaps, scale = (mine_N - theirs_N).abs(), float(theirs_N.abs().max())
    if not math.isfinite(scale) or bool((gaps <= TOLERANCE[policy.dtype] * scale).all()):
        return ""  # what is not a number is the policy's trouble, and said when it is sampled from
    return f"its log-probabilities are off by {float(gaps.max()):.2g}"
