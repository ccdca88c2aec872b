"""One decoding step through slots: computed as it comes, or on CUDA captured once as a graph and replayed.

A step of a small model is some hundred kernels of a few microseconds each: launched one by one they take ten times as long as they run. A
graph is launched as one, but always for the same shapes at the same addresses, so rows and columns are rounded up, and slots and
graphs outlive a call of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import packed
from ..models.policy import Policy
from .slots import FIRST, Slots

KEPT = 1 / 16
"""Of the device's memory, what slots may hold on to while nothing is sampled."""


def next_logits(policy: Policy, slots: Slots, last_B1: Tensor, length_B: Tensor, filled: Sequence[int]) -> Tensor:
    """The logits after one more token of the first B slots, [B, V].

    Args:
        last_B1: the tokens.
        length_B: how many came before.
        filled: at least as many and one each, known beforehand: how far attention reads.
    """
    columns = max(filled)
    slots.write_next(length_B, columns)
    beyond_BS = torch.arange(columns, device=length_B.device) > length_B[:, None]
    mask_BS = torch.zeros(beyond_BS.shape, dtype=policy.dtype, device=length_B.device)
    mask_BS = mask_BS.masked_fill_(beyond_BS, -torch.inf)
    return policy.next_logits(
        input_ids=last_B1, position_ids=length_B[:, None], attention_mask=mask_BS[:, None, None], past_key_values=slots,
        **packed.slot_boundaries(filled),
    )  # fmt: skip


def _device_bytes() -> int:
    return torch.cuda.mem_get_info()[1]


def rows_of(count: int) -> int:
    """The least number of rows that a step is captured for and that holds so many: powers of two, and from 16 on those between."""
    power = 1 << max(count - 1, 0).bit_length()
    between = power * 3 // 4
    return between if power >= 32 and between >= count else power


def columns_of(count: int) -> int:
    """The same for columns."""
    return max(FIRST, 1 << (count - 1).bit_length())


@dataclass
class _Step:
    inputs_2B: Tensor  # the newest tokens, and how many came before
    logits_BV: Tensor
    graph: Any


class Captured:
    """Captured steps, and the slots that they are of. The weights are read where they lie, so new ones need no new graph."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.slots: Slots | None = None
        self._steps: dict[tuple[int, int], _Step] = {}
        self._reached = 0
        self._pool: Any = None

    def slots_for(self, policy: Policy, count: int, longest: int) -> Slots:
        """Room for so many sequences of at most so many tokens: what is there, if that is enough."""
        rows, columns = rows_of(count), columns_of(longest)
        if (
            self.slots is not None
            and self.policy is policy
            and self.slots.count >= rows
            and self.slots.longest >= columns
        ):
            return self.slots
        self.forget()  # and not as many rows as before times as many columns as now: nobody asked for so much memory
        self.policy, self.slots = policy, Slots(policy.model.config, rows, columns)
        return self.slots

    def forget(self) -> None:
        """Let go of slots and graphs."""
        self._forget_steps()
        self.policy = self.slots = None

    def _forget_steps(self) -> None:
        self._steps.clear()
        self._pool = None  # it went with the last of its graphs

    def settle(self) -> None:
        """After a call: hold on to what is small."""
        if self.slots is not None and self.slots.bytes > KEPT * _device_bytes():
            self.forget()

    def next_logits(self, last_B1: Tensor, before: Sequence[int]) -> Tensor:
        """The logits after one more token of the first B slots, [B, V], good until the next call."""
        assert self.policy is not None
        assert self.slots is not None
        rows, columns = rows_of(len(before)), columns_of(max(before) + 1)
        self.slots.reach(columns)
        if self._reached != self.slots.columns:  # they lie elsewhere now
            self._forget_steps()
            self._reached = self.slots.columns
        blank = [0] * (rows - len(before))  # of free slots, whose first column is written for nothing
        inputs_2B = torch.tensor([[*last_B1[:, 0].tolist(), *blank], [*before, *blank]])
        step = self._steps.get((rows, columns))
        if step is None:
            step = self._steps[rows, columns] = self._capture(inputs_2B.to(self.policy.device), columns)
        else:
            step.inputs_2B.copy_(inputs_2B)
        step.graph.replay()
        return step.logits_BV[: len(before)]

    def _run(self, inputs_2B: Tensor, columns: int) -> Tensor:
        assert self.policy is not None
        assert self.slots is not None
        last_B, length_B = inputs_2B
        return next_logits(self.policy, self.slots, last_B[:, None], length_B, [columns] * len(last_B))

    def _capture(self, inputs_2B: Tensor, columns: int) -> _Step:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is compiled, chosen or allocated the first time must not be captured
            for _ in range(2):
                self._run(inputs_2B, columns)
        torch.cuda.current_stream().wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # one step at a time runs, so they may share their room
            logits_BV = self._run(inputs_2B, columns)
        return _Step(inputs_2B, logits_BV, graph)
