"""Judged rollouts as tensors, and micro-batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.mesh import Mesh
from ..types import Rollout


@dataclass(slots=True)
class Batch:
    """One step's rollouts. Axes: B rows, L positions of whole trajectories, T tokens that the policy wrote (its actions).

    `ids_BL` holds each trajectory and padding on the right; `action_BL` is True on what the policy wrote. Tensors over T hold the actions of a
    row side by side, whatever stood between them.

    `keep_B` is True for what trains the policy: False where masked, and in the last rows, of groups that were judged and thrown away
    (`rollout.resample`). `beside_B` is True for those of them that could be graded. Whatever predicts (the critic, the sums and histories of
    earlier steps) learns from both, `graded_B`: in the kept groups alone samples differ, and of two one would be right, whatever the problem.

    `behaviour_logp_BT` is of the distribution that was sampled from; with `kept_BT`, the log of the mass that a cut (top-p and its
    kind) left, it is of the whole softmax. `group_B` numbers the prompts: samples of one prompt lie side by side. `greedy_B` is the
    reward of the prompt's greedy response, where there is one. `weight_B` undoes how a curriculum chose the prompts, where it did.
    """

    rollouts: Sequence[Rollout]
    ids_BL: Tensor
    action_BL: Tensor
    length_B: Tensor
    behaviour_logp_BT: Tensor
    kept_BT: Tensor
    reward_B: Tensor
    correct_B: Tensor
    keep_B: Tensor
    group_B: Tensor
    greedy_B: Tensor | None = None
    weight_B: Tensor | None = None
    cost_BT: Tensor | None = None
    """What the KL in the reward charges each token, where the credit charges tokens (Learner.advantage); no reward here holds it."""
    beside_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def prompt_len_B(self) -> Tensor:
        """How many tokens come before the first one that the policy wrote, [B]."""
        return self.action_BL.int().argmax(1)

    @property
    def response_len_B(self) -> Tensor:
        """How many tokens the policy wrote, [B]."""
        return self.action_BL.sum(1)

    @property
    def graded_B(self) -> Tensor:
        """Where a verdict says something about the response, whether or not it trains the policy."""
        return self.keep_B if self.beside_B is None else self.keep_B | self.beside_B

    @property
    def tokens(self) -> int:
        """Tokens sampled."""
        return int(self.action_BL.sum())

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

    def first(self, n: int) -> Batch:
        """Its first n rows, as wide as all of them are."""
        if n == len(self):
            return self
        cut: dict[str, Any] = {f.name: x[:n] for f in fields(self) if (x := getattr(self, f.name)) is not None}
        return replace(self, **cut)

    def rows(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """`ids_bL` and `action_bL` of some rows, no wider than they need."""
        width = int(self.length_B[part].max()) if len(part) else 0
        return self.ids_BL[part, :width], self.action_BL[part, :width]


def pack(rollouts: Sequence[Rollout], pad_id: int, beside: Sequence[Rollout] = ()) -> Batch:
    """Tensors from judged rollouts. What was sampled is what is trained on: ids, never text again.

    `beside` holds judged rollouts, in groups of a prompt, that train no policy: the last rows of the batch.
    """
    number, rollouts = len(rollouts), [*rollouts, *beside]
    length_B = torch.tensor([r.turns[-1][1] for r in rollouts])  # nothing after the last action is read
    actions = [len(r.logps) for r in rollouts]
    ids_BL = torch.full((len(rollouts), int(length_B.max())), pad_id)
    action_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    behaviour_BT, kept_BT = torch.zeros(2, len(rollouts), max(actions))
    for b, (r, n) in enumerate(zip(rollouts, actions, strict=True)):
        length = r.turns[-1][1]
        ids_BL[b, :length] = torch.tensor(r.ids[:length])
        for start, end in r.turns:
            action_BL[b, start:end] = True
        behaviour_BT[b, :n] = torch.tensor(r.logps)
        if r.kept:
            kept_BT[b, :n] = torch.tensor(r.kept)
    if actions != action_BL.sum(1).tolist():
        raise ValueError("every token that the policy wrote needs a log-probability")
    verdicts = [r.verdict for r in rollouts if r.verdict is not None]
    if len(verdicts) != len(rollouts):
        raise ValueError("every rollout needs a verdict")
    greedy = [r.greedy.verdict for r in rollouts if r.greedy is not None and r.greedy.verdict is not None]
    if greedy and len(greedy) != len(rollouts):
        raise ValueError("a greedy response for every rollout, or for none")
    keep_B = torch.tensor([not v.masked for v in verdicts])
    if greedy:  # without its baseline a reward says nothing
        keep_B &= torch.tensor([not v.masked for v in greedy])
    batch = Batch(
        rollouts,
        ids_BL,
        action_BL,
        length_B,
        behaviour_BT,
        kept_BT,
        torch.tensor([v.score for v in verdicts]),
        torch.tensor([v.correct for v in verdicts]),
        keep_B,
        torch.tensor([b > 0 and r.sample == 0 for b, r in enumerate(rollouts)]).cumsum(0),
        torch.tensor([v.score for v in greedy]) if greedy else None,
        torch.tensor([r.task.weight for r in rollouts]) if any(r.task.weight != 1.0 for r in rollouts) else None,
    )
    if beside:
        trains_B = torch.arange(len(rollouts)) < number
        batch.beside_B, batch.keep_B = batch.keep_B & ~trains_B, batch.keep_B & trains_B
    return batch


class Share(list[Tensor]):
    """The micro-batches that this rank computes of rows that make one sum; `rows` are all of these, by length. With one rank it computes
    all of them."""

    def __init__(self, rows: Tensor, parts: Iterable[Tensor]) -> None:
        super().__init__(parts)
        self.rows = rows

    @property
    def mine(self) -> Tensor:
        """The rows that this rank computes."""
        return torch.cat([*self, self.rows[:0]])

    @classmethod
    def of(cls, index: Tensor, length_B: Tensor, budget: int, packed: bool, mesh: Mesh) -> Share:
        """Deal out rows to ranks; see `micro_batches`. A micro-batch of no rows is for ranks that must compute as often as others."""
        ordered = index[torch.argsort(length_B[index], stable=True)]
        parts = mesh.dealt(ordered, lambda rows: micro_batches(rows, length_B, budget, packed), lambda: index[:0])
        return cls(ordered, parts)


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
