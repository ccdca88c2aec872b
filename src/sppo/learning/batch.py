"""Judged rollouts as tensors, and micro-batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..objective.tree import Node, nodes
from ..types import Rollout


@dataclass(slots=True)
class Batch:
    """One step's rollouts: `ids_BL` holds prompt, response, padding (on the right).

    `keep_B` is True for what trains the policy: False where masked, and in the last rows, of groups that were judged and thrown away
    (`rollout.resample`). `beside_B` is True for those of them that could be graded. Whatever predicts (the critic, the sums and histories of
    earlier steps) learns from both, `graded_B`: in the kept groups alone samples differ, and of two one would be right, whatever the problem.

    `behaviour_logp_BT` is of the distribution that was sampled from; with `kept_BT`, the log of the mass that a cut (top-p and its
    kind) left, it is of the whole softmax. `group_B` numbers the prompts: samples of one prompt lie side by side. `greedy_B` is the
    reward of the prompt's greedy response, where there is one. `weight_B` undoes how a curriculum chose the prompts, where it did.

    Where responses are the leaves of trees (objective/tree.py), `nodes` are those of all trees, their leaves numbered as rows here.
    `share_B` is a response's part of its prompt's outcome: 1, or a leaf's weight.
    """

    rollouts: Sequence[Rollout]
    ids_BL: Tensor
    prompt_len_B: Tensor
    response_len_B: Tensor
    behaviour_logp_BT: Tensor
    kept_BT: Tensor
    reward_B: Tensor
    correct_B: Tensor
    keep_B: Tensor
    group_B: Tensor
    greedy_B: Tensor | None = None
    weight_B: Tensor | None = None
    nodes: Sequence[Node] = ()
    cost_BT: Tensor | None = None
    """What the KL in the reward charges each token, where the credit charges tokens (Learner.advantage); no reward here holds it."""
    share_B: Tensor = field(default_factory=lambda: torch.ones(1))
    count_BT: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    """How much each token counts in a loss: 1, or the weight of its node in the row that stands for it; else 0."""
    beside_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def graded_B(self) -> Tensor:
        """Where a verdict says something about the response, whether or not it trains the policy."""
        return self.keep_B if self.beside_B is None else self.keep_B | self.beside_B

    @property
    def tokens(self) -> int:
        """Tokens sampled; what leaves of a tree share was sampled once."""
        return sum(n.end - n.start for n in self.nodes) if self.nodes else int(self.response_len_B.sum())

    @property
    def flat_B(self) -> Tensor:
        """True where a prompt's graded samples all scored the same (or fewer than two were graded): nothing of the same group is better, [B]."""
        groups = int(self.group_B[-1]) + 1
        low_G, high_G = torch.full((groups,), torch.inf), torch.full((groups,), -torch.inf)
        group_b, score_b = self.group_B[self.keep_B], self.reward_B[self.keep_B].float()
        low_G.scatter_reduce_(0, group_b, score_b, "amin")
        high_G.scatter_reduce_(0, group_b, score_b, "amax")
        return ~(low_G < high_G)[self.group_B]

    @property
    def mask_BT(self) -> Tensor:
        """True on each response's own tokens."""
        return torch.arange(self.behaviour_logp_BT.size(1))[None] < self.response_len_B[:, None]

    @property
    def action_BL(self) -> Tensor:
        """True on the tokens that the policy wrote, [B, L]."""
        column_L = torch.arange(self.ids_BL.size(1))
        end_B = self.prompt_len_B + self.response_len_B
        return (column_L >= self.prompt_len_B[:, None]) & (column_L < end_B[:, None])

    def first(self, n: int) -> Batch:
        """Its first n rows, as wide as all of them are."""
        if n == len(self):
            return self
        cut: dict[str, Any] = {f.name: x[:n] for f in fields(self) if (x := getattr(self, f.name)) is not None}
        return replace(self, **cut)


def pack(rollouts: Sequence[Rollout], pad_id: int, beside: Sequence[Rollout] = ()) -> Batch:
    """Tensors from judged rollouts. What was sampled is what is trained on: ids, never text again.

    `beside` holds judged rollouts, in groups of a prompt, that train no policy: the last rows of the batch.
    """
    number, rollouts = len(rollouts), [*rollouts, *beside]
    prompts = torch.tensor([len(r.prompt_ids) for r in rollouts])
    responses = torch.tensor([len(r.response_ids) for r in rollouts])
    ids_BL = torch.full((len(rollouts), int((prompts + responses).max())), pad_id)
    behaviour_BT, kept_BT = torch.zeros(2, len(rollouts), int(responses.max()))
    for b, r in enumerate(rollouts):
        ids_BL[b, : len(r.prompt_ids) + len(r.response_ids)] = torch.tensor([*r.prompt_ids, *r.response_ids])
        behaviour_BT[b, : len(r.response_ids)] = torch.tensor(r.logps)
        if r.kept:
            kept_BT[b, : len(r.response_ids)] = torch.tensor(r.kept)
    verdicts = [r.verdict for r in rollouts if r.verdict is not None]
    if len(verdicts) != len(rollouts):
        raise ValueError("every rollout needs a verdict")
    greedy = [r.greedy.verdict for r in rollouts if r.greedy is not None and r.greedy.verdict is not None]
    if greedy and len(greedy) != len(rollouts):
        raise ValueError("a greedy response for every rollout, or for none")
    batch = Batch(
        rollouts,
        ids_BL,
        prompts,
        responses,
        behaviour_BT,
        kept_BT,
        torch.tensor([v.score for v in verdicts]),
        torch.tensor([v.correct for v in verdicts]),
        torch.tensor([not v.masked for v in verdicts])
        & torch.tensor([not v.masked for v in greedy] or [True]),  # without its baseline a reward says nothing
        torch.tensor([b > 0 and r.sample == 0 for b, r in enumerate(rollouts)]).cumsum(0),
        torch.tensor([v.score for v in greedy]) if greedy else None,
        torch.tensor([r.task.weight for r in rollouts]) if any(r.task.weight != 1.0 for r in rollouts) else None,
    )
    if beside:
        trains_B = torch.arange(len(rollouts)) < number
        batch.beside_B, batch.keep_B = batch.keep_B & ~trains_B, batch.keep_B & trains_B
    batch.share_B = torch.tensor([r.share for r in rollouts])
    batch.count_BT = batch.mask_BT.float()
    if any(r.forks for r in rollouts):
        batch.nodes = _forest(batch)
        batch.count_BT = torch.zeros_like(behaviour_BT)
        for node in batch.nodes:
            batch.count_BT[node.leaf, node.start : node.end] = node.weight
    return batch


def _forest(batch: Batch) -> list[Node]:
    """The nodes of all trees, each numbered after those of the trees before it."""
    out: list[Node] = []
    lengths, keep = batch.response_len_B.tolist(), batch.keep_B.tolist()
    for first, end in pairwise([*batch.group_B.diff(prepend=torch.tensor([-1])).nonzero()[:, 0].tolist(), len(batch)]):
        forks, already = [r.forks for r in batch.rollouts[first:end]], len(out)
        tree = nodes(forks, lengths[first:end], keep[first:end], first)
        out += [replace(n, above=n.above + already if n.above >= 0 else -1) for n in tree]
    return out


def micro_batches(index: Tensor, length_B: Tensor, budget: int, packed: bool = False) -> list[Tensor]:
    """Cut rows into micro-batches of similar length that hold at most `budget` tokens (or one row that is longer).

    Args:
        index: the rows to cut, [n].
        length_B: the length of every row of the batch.
        packed: whether the model computes no padding; else it counts.
    """
    parts: list[Tensor] = []
    ordered = index[torch.argsort(length_B[index], stable=True)]
    start = tokens = 0
    for end, length in enumerate(length_B[ordered].tolist()):
        tokens = tokens + length if packed else length * (end + 1 - start)
        if tokens > budget and end > start:
            parts.append(ordered[start:end])
            start, tokens = end, length
    return [*parts, ordered[start:]] if len(ordered) else []
