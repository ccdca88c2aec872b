"""Several ranks over torch.distributed: gloo between CPUs, NCCL between GPUs.

Sums are taken in the order of ranks, by whoever holds all parts of an element, and never by a library's own reduction: they are the same
bits on every rank and in every repetition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import RecipeError
from .mesh import Mesh, T

_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13
TOGETHER = 1 << 24
"""Numbers that are added up in one exchange: 64 MiB in float32."""
SMALL = 1 << 12
"""Numbers up to which every rank adds up all of them itself: one exchange instead of two."""
LARGE = 1_000_000_000
"""Parameters from which weights are divided among ranks, unless cluster.shards says otherwise."""


class RankMesh(Mesh):
    """One rank of several. All of them must make the same calls in the same order."""

    def __init__(self, rank: int, size: int, device: torch.device, shards: int) -> None:
        """`shards` may be 0, undecided: see `settle`."""
        self.rank, self.size, self.device, self.shards = rank, size, device, shards
        self._devices: DeviceMesh | None = None

    def settle(self, parameters: int) -> None:
        """Decide how many ranks hold one copy of weights, where the recipe leaves it open: all from `LARGE` parameters on, else one."""
        self.shards = settled(self.shards, self.size, parameters)

    @property
    def devices(self) -> DeviceMesh:
        """The ranks as `fully_shard` wants them: in one dimension, or copies × shards."""
        if self._devices is None:
            copies = self.size // self.shards
            shape, names = ((copies, self.shards), ("copies", "shards")) if copies > 1 else ((self.size,), ("shards",))
            self._devices = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self._devices

    def sum(self, x: T) -> T:
        """See `Mesh`."""
        if isinstance(x, Tensor):
            return self._total(x.detach())
        kind = torch.float64 if isinstance(x, float) else torch.int64
        return type(x)(self._total(torch.tensor([x], dtype=kind)).item())

    def max(self, x: T) -> T:
        """See `Mesh`."""
        if isinstance(x, Tensor):
            return self._all(x.detach()).amax(0)
        kind = torch.float64 if isinstance(x, float) else torch.int64
        return type(x)(self._all(torch.tensor([x], dtype=kind)).amax().item())

    def dealt(self, ordered: Any, cut: Callable[[Any], list[Any]], empty: Callable[[], Any]) -> list[Any]:
        """See `Mesh`. Nothing is sent: every rank cuts every rank's rows."""
        each = [cut(ordered[rank :: self.size]) for rank in range(self.size)]
        mine = each[self.rank]
        if self.shards > 1:
            mine = [*mine, *(empty() for _ in range(max(map(len, each)) - len(mine)))]
        return mine

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Mesh`; float64, which all ranks can agree on where some have nothing."""
        mine_n = (
            torch.cat([p.double().cpu().flatten() for p in parts]) if parts else torch.zeros(0, dtype=torch.float64)
        )
        count_R = self._all(torch.tensor([len(mine_n)]))[:, 0]
        padded = mine_n.new_zeros(int(count_R.max()))
        padded[: len(mine_n)] = mine_n
        all_RN = self._all(padded)
        return torch.cat([x_N[:n] for x_N, n in zip(all_RN, count_R.tolist(), strict=True)])

    def fill(self, x: Tensor, mine: Tensor, rows: Tensor) -> None:
        """See `Mesh`."""
        own = torch.zeros_like(x)
        own[mine] = x[mine]
        x[rows] = self._total(own)[rows]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """See `Mesh`. Tensors are contiguous; what is sent at once is at most `TOGETHER` numbers."""
        waiting: list[Tensor] = []
        for x in tensors:
            for piece in x.view(-1).split(TOGETHER):
                same = waiting and (piece.dtype, piece.device) == (waiting[0].dtype, waiting[0].device)
                if waiting and (not same or sum(map(len, waiting)) + len(piece) > TOGETHER):
                    self._add_up_now(waiting)
                    waiting = []
                waiting.append(piece)
        if waiting:
            self._add_up_now(waiting)

    def _add_up_now(self, pieces: list[Tensor]) -> None:
        total = self._total(torch.cat(pieces))
        for piece, sum_n in zip(pieces, total.split([len(p) for p in pieces]), strict=True):
            piece.copy_(sum_n)

    def _all(self, x: Tensor) -> Tensor:
        """Every rank's `x`, [ranks, …]."""
        out = x.new_empty(self.size, x.numel())
        if x.numel():
            _gather(out.view(-1), x.contiguous().view(-1))
        return out.view(self.size, *x.shape)

    def _total(self, x: Tensor) -> Tensor:
        """The sum in the order of ranks. Of many numbers each rank adds up its share, and gives it to the others."""
        if x.numel() <= SMALL:
            return _in_order(self._all(x))
        flat = x.contiguous().view(-1)
        share = -(-len(flat) // self.size)
        padded = torch.cat([flat, flat.new_zeros(share * self.size - len(flat))])
        parts = torch.empty_like(padded)
        dist.all_to_all_single(parts, padded)
        _gather(padded, _in_order(parts.view(self.size, share)))
        return padded[: len(flat)].view(x.shape)

    def close(self) -> None:
        """Leave the others; the mesh cannot be used any more."""
        dist.destroy_process_group()


def _in_order(x_R: Tensor) -> Tensor:
    out = x_R[0].clone()
    for x in x_R[1:]:
        out += x
    return out


def join(
    rank: int,
    size: int,
    init_method: str | dist.Store,
    timeout: float,
    device: torch.device | str = "cpu",
    shards: int = 1,
) -> Mesh:
    """Become rank `rank` of `size`; returns once all have come. A single one gets the mesh of one process.

    Args:
        init_method: where ranks meet, as torch.distributed has it: `tcp://host:port`, `file:///path` or `env://`; or a store that all can reach.
        timeout: seconds that a rank waits for the others in one exchange before it fails.
        device: where this rank computes.
        shards: a recipe's cluster.shards.

    Raises RecipeError where `shards` does not divide `size`.
    """
    device = torch.device(device)
    check_shards(shards, size)
    if size == 1:
        return Mesh()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    where: dict[str, Any] = {"init_method" if isinstance(init_method, str) else "store": init_method}
    dist.init_process_group(backend, **where, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    return RankMesh(rank, size, device, shards)


def settled(shards: int, size: int, parameters: int) -> int:
    """How many of `size` ranks hold one copy of so many weights; `shards` is what the recipe says, 0 where it leaves that open."""
    return shards or (size if parameters >= LARGE else 1)


def check_shards(shards: int, learners: int) -> None:
    """Raises RecipeError where so many ranks cannot hold one copy of the weights between them."""
    if shards and learners % shards:
        raise RecipeError(
            f"cluster.shards = {shards} must divide cluster.learners = {learners}: every copy of the weights is held by as many ranks"
        )
