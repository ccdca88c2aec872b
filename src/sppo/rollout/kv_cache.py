"""Keys and values of the sequences in flight, one slot each, written in place: the cache of the continuous batch.

Slot b of every layer holds sequence b from column 0 on, each as long as it happens to be. It plugs into transformers'
cache classes, so that every decoder whose layers keep plain keys and values can use it: prompts are prefilled packed
in one row (kernels/attention.py), and a decoding step is a batch [B, 1] of the first B slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from ..memory import lazy_zeros

FIRST = 256
"""Columns to begin with on an accelerator; doubled when a sequence gets longer. On a CPU memory that no sequence has
reached costs nothing."""

Prefix = list[tuple[Tensor, Tensor]]
"""A sequence's keys and values, [heads, columns, D] each, layer by layer."""


class Slots(Cache):
    """A cache of `count` slots of up to `longest` columns."""

    def __init__(self, config: Any, count: int, longest: int, columns: int | None = None) -> None:
        """`columns` to begin with, where even on a CPU nobody knows how many will be reached."""
        self.count, self.longest, self.grows = count, longest, columns is not None
        self.columns = min(longest, max(FIRST, columns or 0))
        self.slot_N = self.column_N = torch.empty(0, dtype=torch.long)
        self.seen: tuple[int, int] | None = None  # slots and columns that attention reads; None: the new tokens alone
        super().__init__(layers=[_SlotLayer(self) for _ in DynamicCache(config=config).layers])

    def write_prompts(self, slots: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """The next pass holds whole prompts, one after the other in one row, for these slots."""
        length_B = torch.tensor(lengths)
        self.slot_N = torch.tensor(slots).repeat_interleave(length_B).to(device)
        self.column_N = torch.cat([torch.arange(n) for n in lengths]).to(device)
        self.reach(max(lengths))
        self.seen = None

    def write_next(self, length_B: Tensor, columns: int) -> None:
        """The next pass holds one token for each of the first B slots, which hold `length_B` tokens so far; with it,
        `columns` at most."""
        self.slot_N, self.column_N = torch.arange(len(length_B), device=length_B.device), length_B
        self.reach(columns)
        self.seen = (len(length_B), columns)

    def copy(self, source: int, targets: Sequence[int], columns: int) -> None:
        """Copy a slot's first columns into others (on an accelerator all of it: whole slots need one kernel for many
        layers)."""
        stores = [store for layer in self.layers for store in (layer.key_store, layer.value_store)]
        if not _lazily(stores[0]):
            torch._foreach_copy_([s[t] for s in stores for t in targets], [s[source] for s in stores for _ in targets])
            return
        where = targets[0] if len(targets) == 1 else list(targets)  # a copy of memory, where it can be
        for store in stores:
            store[where, :, :columns] = store[source, :, :columns]

    def read(self, slot: int, columns: int) -> Prefix:
        """A copy of a slot's first columns, to be written into others later."""
        return [
            (layer.key_store[slot, :, :columns].clone(), layer.value_store[slot, :, :columns].clone())
            for layer in self.layers
        ]

    def write(self, slot: int, prefix: Prefix) -> None:
        """Begin a slot with what `read` gave."""
        self.reach(prefix[0][0].size(1))
        for layer, (key, value) in zip(self.layers, prefix, strict=True):
            layer.key_store[slot, :, : key.size(1)], layer.value_store[slot, :, : key.size(1)] = key, value

    def reach(self, columns: int) -> None:
        """Grow to at least this many columns."""
        if columns > self.columns:
            self.columns = min(self.longest, max(columns, 2 * self.columns))
            for layer in self.layers:
                layer.grow(self.columns)

    def clear(self) -> None:
        """All zeros, as at first."""
        stores = [s for layer in self.layers if layer.is_initialized for s in (layer.key_store, layer.value_store)]
        if stores:
            torch._foreach_zero_(stores)

    def release(self) -> None:
        """Release all memory now: layers and table refer to each other, and would wait for the garbage collector."""
        for layer in self.layers:
            layer.key_store = layer.value_store = None
            layer.is_initialized = False

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(
            s.nbytes for layer in self.layers if layer.is_initialized for s in (layer.key_store, layer.value_store)
        )


def _lazily(states: Tensor) -> bool:
    """Whether memory costs nothing until it is written."""
    return states.device.type == "cpu"


class _SlotLayer(CacheLayerMixin):
    """One layer's slots. Unwritten columns are zeros: attention weighs them with 0, and 0 × NaN would be NaN."""

    def __init__(self, table: Slots) -> None:
        super().__init__()
        self.table = table

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        table = self.table
        lazy = _lazily(key_states)
        if lazy and not table.grows:
            table.columns = table.longest
        self.key_store, self.value_store = (
            lazy_zeros(*shape, dtype=x.dtype) if lazy else x.new_zeros(shape)
            for x in (key_states, value_states)
            for shape in [(table.count, x.size(1), table.columns, x.size(-1))]
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        table = self.table
        for store, new in ((self.key_store, key_states), (self.value_store, value_states)):
            # prompts come as [1, heads, N, D], next tokens as [B, heads, 1, D]
            store[table.slot_N, :, table.column_N] = new[0].transpose(0, 1) if table.seen is None else new[:, :, 0]
        if table.seen is None:
            return key_states, value_states
        rows, columns = table.seen
        return self.key_store[:rows, :, :columns], self.value_store[:rows, :, :columns]

    def grow(self, columns: int) -> None:
        if self.is_initialized:
            for name in ("key_store", "value_store"):
                old = getattr(self, name)
                shape = (*old.shape[:2], columns, old.size(-1))
                fresh = lazy_zeros(*shape, dtype=old.dtype) if _lazily(old) else old.new_zeros(shape)
                fresh[:, :, : old.size(2)] = old
                setattr(self, name, fresh)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1
