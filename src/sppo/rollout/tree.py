"""Tree rollouts: a response goes on in several ways where, at the end of a segment, the policy is unsure what comes next.

How many children a prefix has depends on that prefix alone: on the entropy of the whole distribution that comes next, on its length, and on
its share of the budget, which the prefix settles too. It never depends on the token drawn, on a value, or on what siblings did. So the
leaves, weighted by the product of 1 / children along their path, are unbiased samples of responses (objective/tree.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.policy import Policy
from ..rewards.steps import SPLITS
from ..types import Fork
from .collect import sample_seed
from .engine import Branching, Sample, Sampling
from .sampler import uniforms
from .sequences import Drawn

TAIL = 8
"""So many of the newest tokens tell whether the last of them ended a segment."""


@dataclass(slots=True)
class _Path:
    """What is known of a response that grows in a tree."""

    root: int
    seed: int
    forks: tuple[Fork, ...]
    left: int
    """Tokens that everything below the last fork may take."""
    since: int
    """The length at the last fork."""


class Growing(Drawn):
    """Sampled responses that fork."""

    def __init__(self, policy: Policy, seeds: Sequence[int], sampling: Sampling, branching: Branching) -> None:
        super().__init__(policy, seeds, sampling)
        self.branching = branching
        self.paths = [_Path(i, seed, (), branching.budget, 0) for i, seed in enumerate(seeds)]
        self.finished_share = 0.0
        """How many of the trees are finished, in parts of trees."""
        self._ended = [True] * len(seeds)  # a prompt's end is a segment's end
        self._separator = re.compile(SPLITS.get(branching.segments, ""))
        self._may_end: dict[int, bool] = {}

    def take(self, logits_BV: Tensor, live: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """See Responses; the forks are (row, the new response), which shares all but its newest token with the row's."""
        forked = self._fork(logits_BV, live)
        if forked:
            logits_BV = torch.cat([logits_BV, logits_BV[[b for b, _ in forked]]])
        grown = [*live, *(i for _, i in forked)]
        finished, _ = super().take(logits_BV, grown)
        for i in grown:
            self._ended[i] = self._ends_segment(self.ids[i])
        self.finished_share += sum(1 / math.prod(k for _, _, k in self.paths[grown[b]].forks) for b in finished)
        over = set(finished)
        return (
            [b for b in finished if b < len(live)],
            [fork for n, fork in enumerate(forked, len(live)) if n not in over],
        )

    def trees(self) -> list[list[Sample]]:
        """Each prompt's leaves, in the order of their forks."""
        out: list[list[Sample]] = [[] for _ in range(1 + max(p.root for p in self.paths))]
        for path, sample in zip(self.paths, self.samples(0), strict=True):
            out[path.root].append(replace(sample, forks=path.forks))
        return [sorted(leaves, key=lambda s: s.forks) for leaves in out]

    def _fork(self, logits_BV: Tensor, live: Sequence[int]) -> list[tuple[int, int]]:
        """Make the children of the prefixes that have some: (row, response)."""
        count = self.branching.children
        open_rows = [b for b, i in enumerate(live) if self._ended[i] and self._affords(i, count)]
        if not open_rows:
            return []
        logp_NV = (logits_BV[open_rows].float() / self.sampling.temperature).log_softmax(-1)
        entropy_N = -(logp_NV.exp() * logp_NV.clamp(min=-1e4)).sum(-1)
        forked = []
        for b, entropy in zip(open_rows, entropy_N.tolist(), strict=True):
            if entropy < self.branching.entropy:
                continue
            i = live[b]
            path, length = self.paths[i], len(self.ids[i])
            left = (path.left - (length - path.since)) // count
            for k in range(1, count):
                forked.append((b, len(self.ids)))
                seed = sample_seed(path.seed, "fork", length, k)
                self.paths.append(_Path(path.root, seed, (*path.forks, (length, k, count)), left, length))
                self.ids.append(list(self.ids[i]))
                self.logps.append(list(self.logps[i]))
                self.kept.append(list(self.kept[i]))
                self.stopped.append(False)
                self._ended.append(False)
            path.forks, path.left, path.since = (*path.forks, (length, 0, count)), left, length
        if forked:
            seeds = [self.paths[i].seed for _, i in forked]
            self._uniform_BT = torch.cat([self._uniform_BT, uniforms(seeds, self.longest)])
        return forked

    def _affords(self, i: int, count: int) -> bool:
        """Whether so many children, each as long as it may get, stay within the prefix's share of the budget, and of the leaves."""
        path, length = self.paths[i], len(self.ids[i])
        if count * math.prod(k for _, _, k in path.forks) > self.branching.leaves:
            return False
        return (path.left - (length - path.since)) // count >= self.longest - length

    def _ends_segment(self, ids: Sequence[int]) -> bool:
        """Whether the newest token completed a separator."""
        if self.branching.segments == "tokens":
            return True
        newest = ids[-1]
        if newest not in self._may_end:
            # alone, some tokenizers decode a token without the space that it begins with; its name shows it
            raw = str(self.policy.tokenizer.convert_ids_to_tokens(newest))
            self._may_end[newest] = re.search(r"[;\s]", self.policy.text([newest])) is not None or raw[:1] in "▁ĠĊ<"
        if not self._may_end[newest]:
            return False
        before, tail = len(self.policy.text(ids[-TAIL:-1])), self.policy.text(ids[-TAIL:])
        return any(m.end() > before for m in self._separator.finditer(tail))
