"""The local engine: batched decoding of any transformers decoder, in this process, on the learner's own weights.

Prompts are left-padded (positions from the cumulated mask), keys and values are written in place into a cache of the
final size, and finished sequences leave the batch. Left out on purpose, for a later issue: refilling freed slots,
sharing a prompt's prefix between its samples, string stops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import RunFailure
from ..models.policy import Policy
from .engine import Sample, Sampling
from .sampler import draw, uniforms

SHRINK = 0.8
"""Finished sequences are dropped once the live share falls below this: dropping copies the cache, keeping wastes steps."""


def build(policy: Policy) -> LocalEngine:
    """The engine over a policy of this process; sampling sees the learner's weights directly."""
    return LocalEngine(policy)


class LocalEngine:
    """See `rollout.engine.Engine`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sync(self, policy: Policy) -> None:
        """Hold this policy's weights (the very same tensors, so there is nothing to copy)."""
        self.policy = policy

    def fingerprint(self) -> str:
        """The checksum of the weights that sampling reads."""
        return self.policy.fingerprint()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """Sample one response a prompt; see the protocol. Prompts of similar length are decoded together."""
        if any(len(p) == 0 for p in prompts):
            raise ValueError("a prompt has no tokens")
        results: list[Sample | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), sampling.batch):
            part = order[start : start + sampling.batch]
            for i, sample in zip(
                part, self._decode([prompts[i] for i in part], [seeds[i] for i in part], sampling), strict=True
            ):
                results[i] = sample
            if progress:
                progress(start + len(part))
        return [r for r in results if r is not None]

    def _decode(self, prompts: list[Sequence[int]], seeds: list[int], sampling: Sampling) -> list[Sample]:
        device, rows, width = self.policy.device, len(prompts), max(map(len, prompts))
        capacity = width + sampling.max_tokens
        mask_BS = torch.zeros(rows, capacity, dtype=torch.long)
        ids_BS = torch.full((rows, width), self.policy.pad_id)
        for b, prompt in enumerate(prompts):
            ids_BS[b, width - len(prompt) :] = torch.tensor(prompt)
            mask_BS[b, width - len(prompt) :] = 1
        mask_BS, ids_BS = mask_BS.to(device), ids_BS.to(device)
        position_B1 = mask_BS[:, :width].sum(1, keepdim=True)
        cache = preallocated_cache(self.policy.model.config, capacity)
        uniform_BT = uniforms(seeds, sampling.max_tokens).to(device)
        eos = torch.tensor(self.policy.eos_ids, device=device)

        token_BT = torch.zeros(rows, sampling.max_tokens, dtype=torch.long, device=device)
        logp_BT = torch.zeros(rows, sampling.max_tokens, device=device)
        length_B = torch.full((rows,), sampling.max_tokens, device=device)
        stopped_B = torch.zeros(rows, dtype=torch.bool, device=device)
        live = torch.arange(rows, device=device)
        logits_BV = self._logits(ids_BS, mask_BS[:, :width], (mask_BS[:, :width].cumsum(1) - 1).clamp(min=0), cache)
        for t in range(sampling.max_tokens):
            try:
                token_B, logp_B = draw(logits_BV, uniform_BT[live, t], sampling.temperature)
            except FloatingPointError as error:
                raise RunFailure(
                    f"rollouts stopped: {error}; lower training.lr and resume from the last checkpoint"
                ) from None
            token_BT[live, t], logp_BT[live, t] = token_B, logp_B.to(logp_BT.dtype)
            ended_B = torch.isin(token_B, eos) & ~stopped_B[live]
            length_B[live[ended_B]] = t + 1
            stopped_B[live[ended_B]] = True
            keep = (~stopped_B[live]).nonzero()[:, 0]
            if keep.numel() == 0 or t + 1 == sampling.max_tokens:
                break
            if keep.numel() < SHRINK * live.numel():
                cache.batch_select_indices(keep)
                live, mask_BS, position_B1, token_B = live[keep], mask_BS[keep], position_B1[keep], token_B[keep]
            mask_BS[:, width + t] = 1
            logits_BV = self._logits(token_B[:, None], mask_BS[:, : width + t + 1], position_B1, cache)
            position_B1 = position_B1 + 1
        tokens, logps, lengths, stopped = token_BT.tolist(), logp_BT.tolist(), length_B.tolist(), stopped_B.tolist()
        return [
            Sample(tokens[b][: lengths[b]], logps[b][: lengths[b]], "stop" if stopped[b] else "length")
            for b in range(rows)
        ]

    def _logits(self, ids_BS: Tensor, mask_BS: Tensor, position_BS: Tensor, cache: DynamicCache) -> Tensor:
        return self.policy.next_logits(ids_BS, attention_mask=mask_BS, position_ids=position_BS, past_key_values=cache)


class PreallocatedLayer(DynamicLayer):
    """A growing cache layer that writes into memory of its final size, instead of copying everything for each token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.is_initialized = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            rows, heads, _, size = key_states.shape
            self.key_store = key_states.new_empty(rows, heads, self.capacity, size)
            self.value_store = value_states.new_empty(rows, heads, self.capacity, value_states.size(-1))
            self.is_initialized = True
        end = self.length + key_states.size(-2)
        self.key_store[:, :, self.length : end] = key_states
        self.value_store[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_store[:, :, :end], self.value_store[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.key_store, self.value_store = self._kept(self.key_store, indices), self._kept(self.value_store, indices)
        self.keys, self.values = self.key_store[:, :, : self.length], self.value_store[:, :, : self.length]

    def _kept(self, store: Tensor, indices: Tensor) -> Tensor:
        fresh = store.new_empty(indices.numel(), *store.shape[1:])
        fresh[:, :, : self.length] = store[indices, :, : self.length]
        return fresh


def preallocated_cache(config: object, capacity: int) -> DynamicCache:
    """A cache for any decoder: plain attention layers preallocated, sliding-window and other kinds as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
