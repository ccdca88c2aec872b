"""Weights on their way from the learner to those who sample: broadcast tensor by tensor, without files.

A channel is a process group of its own beside the learner's: rank 0 sends, the others receive. Whoever joins or leaves makes a new one, under a
new name, in a store that outlives both ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

Layout = Sequence[tuple[str, tuple[int, ...], torch.dtype]]
"""Name, shape and dtype of each weight, in the order in which they travel."""


@dataclass(frozen=True)
class Meeting:
    """Where the ends of a channel find each other."""

    host: str
    port: int
    name: str
    size: int
    timeout: float
    """Seconds, of one exchange."""

    def store(self) -> PrefixStore:
        """What the ends have in common."""
        limit = timedelta(seconds=self.timeout)
        return PrefixStore(
            self.name, TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=limit)
        )


class Channel:
    """One end. Raises RuntimeError where another one is lost, or late."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.group: Any = ProcessGroupGloo(meeting.store(), rank, meeting.size, timedelta(seconds=meeting.timeout))

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send whole tensors, in their order."""
        for _, tensor in weights:
            self._broadcast(tensor.detach().cpu().contiguous())

    def receive(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are sent, each as it comes; all must be taken."""
        for name, shape, dtype in layout:
            tensor = torch.empty(shape, dtype=dtype)
            self._broadcast(tensor)
            yield name, tensor

    def _broadcast(self, tensor: Tensor) -> None:
        if tensor.numel():
            self.group.broadcast(tensor.view(-1).view(torch.uint8), 0).wait()
