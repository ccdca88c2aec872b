"""Responses as they grow, token by token, whatever loop computes the logits: drawn from them, or given beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RunFailure
from ..models.policy import Policy
from .engine import Sample, Sampling
from .sampler import draw, uniforms


class Responses(Protocol):
    """One response for each prompt, all empty at first."""

    ids: list[list[int]]
    longest: int

    def take(self, logits_BV: Tensor, live: Sequence[int]) -> list[int]:
        """Add a token to each of the responses `live`, [B], from the logits of what comes next; returns which rows are finished."""


class Drawn:
    """Sampled responses."""

    def __init__(
        self, policy: Policy, seeds: Sequence[int], sampling: Sampling, limits: Sequence[int] | None = None
    ) -> None:
        self.policy, self.sampling, self.longest = policy, sampling, sampling.max_tokens
        self.limits = limits
        self.ids: list[list[int]] = [[] for _ in seeds]
        self.logps: list[list[float]] = [[] for _ in seeds]
        self.kept: list[list[float]] = [[] for _ in seeds]
        self.stopped = [False] * len(seeds)
        self._uniform_BT = uniforms(seeds, sampling.max_tokens) if seeds else torch.empty(0, sampling.max_tokens)
        self._ends = ending_ids(policy, sampling.stop)
        # a token is a byte at least, so so many last tokens hold any stop string that the newest one completed
        self._tail = 2 + max((len(s.encode()) for s in sampling.stop), default=0)

    def add(self, seeds: Sequence[int], limits: Sequence[int]) -> None:
        """More responses, after those that are there."""
        first = len(self.ids)
        for _ in seeds:
            self.ids.append([])
            self.logps.append([])
            self.kept.append([])
            self.stopped.append(False)
        self.limits = [*(self.limits or []), *limits]
        fresh_BT = uniforms(seeds, self.sampling.max_tokens)
        if first + len(seeds) > len(self._uniform_BT):  # twice as many each time
            more = torch.empty(max(len(seeds), first), self.sampling.max_tokens)
            self._uniform_BT = torch.cat([self._uniform_BT, more])
        self._uniform_BT[first : first + len(seeds)] = fresh_BT

    def take(self, logits_BV: Tensor, live: Sequence[int]) -> list[int]:
        """See Responses. Raises RunFailure for logits that are not finite."""
        uniform_B = self._uniform_BT[list(live), [len(self.ids[i]) for i in live]].to(logits_BV.device)
        try:
            token_B, logp_B, kept_B = draw(logits_BV, uniform_B, self.sampling.temperature, self.sampling.cut)
        except FloatingPointError as error:
            raise RunFailure(
                f"rollouts stopped: {error}; lower training.lr and resume from the last checkpoint"
            ) from None
        if kept_B is not None:
            logp_B = logp_B - kept_B
            for i, kept in zip(live, kept_B.tolist(), strict=True):
                self.kept[i].append(kept)
        finished = []
        for b, (i, token, logp) in enumerate(zip(live, token_B.tolist(), logp_B.tolist(), strict=True)):
            self.ids[i].append(token)
            self.logps[i].append(logp)
            self.stopped[i] = token in self._ends or self._says_stop(self.ids[i])
            if self.stopped[i] or len(self.ids[i]) >= (self.limits[i] if self.limits else self.longest):
                finished.append(b)
        return finished

    def _says_stop(self, ids: list[int]) -> bool:
        stop = self.sampling.stop
        if not stop:
            return False
        tail = self.policy.text(ids[-self._tail :])
        return any(s in tail for s in stop)

    def sample(self, i: int, version: int) -> Sample:
        """A response that is over, sampled by the weights of a version."""
        return Sample(
            self.ids[i], self.logps[i], "stop" if self.stopped[i] else "length", self.kept[i], version=version
        )

    def samples(self, version: int) -> list[Sample]:
        """All of them, in the order of the prompts."""
        return [self.sample(i, version) for i in range(len(self.ids))]


class Forced:
    """Responses that are known: their tokens take the place of drawn ones, and only their log-probabilities are noted."""

    def __init__(self, responses: Sequence[Sequence[int]]) -> None:
        self.given, self.longest = responses, max(map(len, responses))
        self.ids: list[list[int]] = [[] for _ in responses]
        self.logps: list[list[float]] = [[] for _ in responses]

    def take(self, logits_BV: Tensor, live: Sequence[int]) -> list[int]:
        """See Responses."""
        logp_BV = logits_BV.log_softmax(-1)
        for b, i in enumerate(live):
            token = self.given[i][len(self.ids[i])]
            self.ids[i].append(token)
            self.logps[i].append(float(logp_BV[b, token]))
        return [b for b, i in enumerate(live) if len(self.ids[i]) == len(self.given[i])]


def ending_ids(policy: Policy, stop: Sequence[str]) -> list[int]:
    """The ids that end a response: EOS, and stop strings that are special tokens, which no text shows."""
    special = dict(zip(policy.tokenizer.all_special_tokens, policy.tokenizer.all_special_ids, strict=True))
    return [*policy.eos_ids, *(special[s] for s in stop if s in special)]


def next_inputs(lengths: dict[int, int], responses: Responses, live: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The newest token of each response, [B, 1], and how many tokens came before it; `lengths` are the prompts'."""
    last_B1 = torch.tensor([[responses.ids[i][-1]] for i in live])
    return last_B1, [lengths[i] + len(responses.ids[i]) - 1 for i in live]
