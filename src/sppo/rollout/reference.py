"""The plain decoding loop: a left-padded batch and the cache that transformers makes. Short, slow, and right for any
decoder.

It is what the local engine falls back to for models that its slots cannot hold, and what its tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from transformers import DynamicCache

from ..models.policy import Policy
from ..models.weights import Weights
from .engine import Sample, Sampling
from .sequences import Drawn, Forced, Responses, next_inputs


class PlainEngine:
    """See `rollout.engine.Engine`; the weights are the policy's own."""

    stated = ""
    context: int | None = None

    def __init__(self, policy: Policy) -> None:
        self.policy, self.version = policy, 0

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
        done = 0
        for part in self._parts(prompts, sampling.batch):
            decode(self.policy, prompts, drawn, part)
            done += len(part)
            if progress:
                progress(done)
        return drawn.samples(self.version)

    def _parts(self, prompts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
        """Prompts of similar length are decoded together; of the same length, where padding would go into a recurrent
        state."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        stateful = getattr(self.policy.model, "_is_stateful", False)
        for _, alike in groupby(order, key=lambda i: len(prompts[i]) if stateful else 0):
            same = list(alike)
            yield from (same[start : start + batch] for start in range(0, len(same), batch))

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol."""
        given = Forced(responses)
        for part in self._parts(prompts, len(prompts)):
            decode(self.policy, prompts, given, part)
        return given.logps


@torch.inference_mode()
def decode(policy: Policy, prompts: Sequence[Sequence[int]], responses: Responses, live: list[int]) -> None:
    """Let the responses to the prompts `live` grow to their ends; positions come from the cumulated mask."""
    lengths = {i: len(prompts[i]) for i in live}
    width = max(lengths.values())
    mask_BS = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in live]).to(policy.device)
    ids_BS = torch.tensor([[policy.pad_id] * (width - len(prompts[i])) + [*prompts[i]] for i in live]).to(policy.device)
    position_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=policy.model.config)
    while live:
        logits_BV = policy.next_logits(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=position_BS, past_key_values=cache
        )
        finished = set(responses.take(logits_BV, live))
        if finished:
            keep = torch.tensor([b for b in range(len(live)) if b not in finished], device=policy.device)
            live = [i for b, i in enumerate(live) if b not in finished]
            if not live:
                break
            cache.reorder_cache(keep)
            mask_BS = mask_BS[keep]
        last_B1, before = next_inputs(lengths, responses, live)
        ids_BS, position_BS = last_B1.to(policy.device), torch.tensor(before, device=policy.device)[:, None]
        mask_BS = torch.nn.functional.pad(mask_BS, (0, 1), value=1)
