"""Which sequence holds which slot: who is admitted when, and who moves up when one has finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from .kv_cache import Slots
from .sequences import Responses

PREFILL = 4096
"""About how many prompt tokens a pass reads: this bounds memory only."""
REFILL = 16
"""Waiting prompts are admitted once a sixteenth of the slots is free: a pass for each one alone would cost more than the wait."""

Key = tuple[int, ...]
"""A prompt's ids."""
Admitted = dict[Key, list[int]]
"""Different prompts, each with the responses to it that begin now."""


class Scheduler:
    """The sequences of one call of the engine. `live[b]` is the response in slot b; the first slots are always the taken ones."""

    def __init__(self, prompts: Sequence[Sequence[int]], responses: Responses, slots: Slots, count: int) -> None:
        """`count` of the slots are used, at most."""
        self.keys: list[Key] = [tuple(p) for p in prompts]
        self.responses, self.slots, self.count = responses, slots, count
        self.waiting = self._ordered(range(len(prompts)))
        self.live: list[int] = []
        self.rows: list[int] = []  # the responses that the next logits are of,
        self.first = 0  # from which slot on
        self.finished = 0

    def _ordered(self, waiting: Iterable[int]) -> list[int]:
        """The last one begins first: the shortest, and equal ones together."""
        return sorted(waiting, key=lambda i: (len(self.keys[i]), self.keys[i]), reverse=True)

    def add(self, prompts: Sequence[Sequence[int]]) -> None:
        """More responses wait, those that come next in `responses`."""
        first = len(self.keys)
        self.keys += [tuple(p) for p in prompts]
        self.waiting = self._ordered([*self.waiting, *range(first, len(self.keys))])

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.live or self.waiting)

    def schedule(self) -> Admitted:
        """What the next pass computes: the prompts that get slots now, or, where that is empty, one more token of all that live."""
        free = self.count - len(self.live)
        if not self.waiting or free * REFILL < self.count:
            self.first, self.rows = 0, self.live
            return {}
        admitted = self._admit(free)
        self.first, self.rows = len(self.live), [i for same in admitted.values() for i in same]
        self.live += self.rows
        return admitted

    def _admit(self, count: int) -> Admitted:
        """The next ones: at most `count`, and no more different prompts than a pass should hold."""
        out: Admitted = {}
        tokens = 0
        while self.waiting and count:
            key = self.keys[self.waiting[-1]]
            tokens += 0 if key in out else len(key)
            if out and tokens > PREFILL:
                break
            out.setdefault(key, []).append(self.waiting.pop())
            count -= 1
        return out

    def goes_on(self, key: Key) -> bool:
        """Whether the next response that waits is to the same prompt."""
        return bool(self.waiting) and self.keys[self.waiting[-1]] == key

    def length(self, i: int) -> int:
        """Tokens of a response and its prompt whose keys and values its slot holds: all but the newest."""
        return len(self.keys[i]) + len(self.responses.ids[i]) - 1

    def take(self, logits_BV: Tensor) -> list[int]:
        """Give each scheduled row its token; finished sequences leave, and the last ones move into their slots. Returns which are finished."""
        gone = [self.first + b for b in self.responses.take(logits_BV, self.rows)]
        finished = [self.live[b] for b in gone]
        self.finished += len(gone)
        left = set(gone)
        remaining = len(self.live) - len(gone)
        holes = [b for b in gone if b < remaining]
        movers = [b for b in range(remaining, len(self.live)) if b not in left]
        for hole, mover in zip(holes, movers, strict=True):
            self.slots.copy(mover, [hole], self.length(self.live[mover]))
            self.live[hole] = self.live[mover]
        del self.live[remaining:]
        return finished
