"""One decoding step through slots: computed as it comes, or on CUDA captured once as a graph and replayed.

A step of a small model is some hundred kernels of a few microseconds each: launched one by one they take ten times as
long as they run. A graph is launched as one, but always for the same shapes at the same addresses, so rows and
columns are rounded up, and slots and graphs outlive a call of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import attention as packed
from ..kernels.low_rank import active
from ..models.policy import Policy
from .kv_cache import FIRST, Slots

KEPT = 1 / 16
"""Of the device's memory, what slots may hold on to while nothing is sampled."""


def next_logits(policy: Policy, slots: Slots, last_B1: Tensor, length_B: Tensor, filled: Sequence[int]) -> Tensor:
    """The logits after one more token of the first B slots, [B, V].

    Args:
        last_B1: the tokens.
        length_B: how many came before.
        filled: at least one more each, known beforehand: how far attention reads.
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


def rows_of(count: int, most: int) -> int:
    """The fewest rows that steps are captured for and that `count` fit into: powers of two, from 16 on those between,
    and `most`."""
    power = 1 << max(count - 1, 0).bit_length()
    between = power * 3 // 4
    return min(between if power >= 32 and between >= count else power, most)


def columns_of(count: int, most: int) -> int:
    """The same for columns: powers of two, and `most`."""
    return min(max(FIRST, 1 << (count - 1).bit_length()), most)


class _Step(NamedTuple):
    inputs_2B: Tensor  # the newest tokens, and how many came before
    graph: Any


class Captured:
    """Captured steps, and the slots that they are of. The weights are read where they lie, so new ones need no new
    graph."""

    def __init__(self) -> None:
        self.slots: Slots | None = None
        self._policy: Policy | None = None
        self._lie: tuple[Any, ...] = ()
        self._most = (0, 0)
        self._reached = 0
        self._steps: dict[tuple[int, int], _Step] = {}
        self._logits_BV: Tensor | None = None
        self._pool: Any = None
        self._stream: Any = None

    def slots_for(self, policy: Policy, count: int, longest: int) -> Slots:
        """Returns a cache of at least this size, reusing the current one. What is computed in it depends on these two
        numbers alone, not on what was there."""
        weights, layers = policy.model.parameters(), policy.model.modules()
        lie = *(p.data_ptr() for p in weights), *(name for layer in layers for name in active(layer))
        self._most = (count, -(-longest // FIRST) * FIRST)
        rows, columns = self._most
        enough = self.slots is not None and self.slots.count >= rows and self.slots.longest >= columns
        if self.slots is None or not enough or self._policy is not policy or self._lie != lie:
            self.forget()
            self._policy, self._lie, self.slots = policy, lie, Slots(policy.model.config, rows, columns)
        else:
            self.slots.clear()
        return self.slots

    def forget(self) -> None:
        """Release slots and graphs."""
        self._forget_steps()
        self._policy = self.slots = None

    def _forget_steps(self) -> None:
        self._steps.clear()
        self._logits_BV = self._pool = None  # the pool went with the last of its graphs

    def settle(self) -> None:
        """After a call: keep the cache only where it is small."""
        if self.slots is not None and self.slots.bytes > KEPT * _device_bytes():
            self.forget()

    def next_logits(self, last_B1: Tensor, before: Sequence[int]) -> Tensor:
        """The logits after one more token of the first B slots, [B, V], good until the next call."""
        assert self._policy is not None
        assert self.slots is not None
        rows, columns = rows_of(len(before), self._most[0]), columns_of(max(before) + 1, self._most[1])
        self.slots.reach(columns)
        if self._reached != self.slots.columns:  # they lie elsewhere now
            self._forget_steps()
            self._reached = self.slots.columns
        blank = [0] * (rows - len(before))  # of free slots, whose first column is written for nothing
        inputs_2B = torch.tensor([[*last_B1[:, 0].tolist(), *blank], [*before, *blank]])
        step = self._steps.get((rows, columns))
        if step is None:
            step = self._steps[rows, columns] = self._capture(inputs_2B.to(self._policy.device), columns)
        else:
            step.inputs_2B.copy_(inputs_2B)
        step.graph.replay()
        assert self._logits_BV is not None
        return self._logits_BV[: len(before)]

    def _run(self, inputs_2B: Tensor, columns: int) -> None:
        """A step, its logits into the room that all steps share."""
        assert self._policy is not None
        assert self.slots is not None
        last_B, length_B = inputs_2B
        logits_BV = next_logits(self._policy, self.slots, last_B[:, None], length_B, [columns] * len(last_B))
        if self._logits_BV is None:
            self._logits_BV = logits_BV.new_empty(self.slots.count, logits_BV.size(1))
        self._logits_BV[: len(last_B)].copy_(logits_BV)

    def _capture(self, inputs_2B: Tensor, columns: int) -> _Step:
        now = torch.cuda.current_stream()
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(
            self._stream
        ):  # what is compiled, chosen or allocated the first time must not be captured
            for _ in range(2):
                self._run(inputs_2B, columns)
        now.wait_stream(self._stream)
        self._pool = (
            self._pool or torch.cuda.graph_pool_handle()
        )  # one step at a time runs, so they may share their room
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._run(inputs_2B, columns)
        except BaseException:
            torch.cuda.set_stream(now)  # where capturing fails PyTorch stays on the other
            raise
        return _Step(inputs_2B, graph)
