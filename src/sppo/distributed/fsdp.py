"""Modules whose weights are divided among ranks (PyTorch's `fully_shard`, FSDP2), and what they are as a whole.

At rest a parameter is a `DTensor`, of which each rank holds a part of its rows: for one that is trained in float32, whatever the model
computes in, so that it is the optimiser's own master copy. A pass puts the weights together in the model's dtype. They stay together until
`at_rest`, over all passes of an update, or go layer by layer; whoever reads or changes the parameters calls `at_rest` first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .ranks import RankMesh


def divide(
    module: nn.Module,
    layers: Iterable[nn.Module],
    whole: Iterable[nn.Parameter],
    mesh: RankMesh,
    *,
    gather: str,
    offload: bool = False,
) -> None:
    """Divide the parameters of a module among ranks, each of its `layers` by itself and then the rest.

    Args:
        whole: parameters that stay whole on every rank; the others are of one dtype.
        gather: a recipe's cluster.gather: "update", or "layer".
        offload: the parts are held in main memory, and so are their gradients.
    """
    ignored = set(whole)
    dtype = next((p.dtype for p in module.parameters() if p not in ignored), torch.float32)
    for part in (*layers, module):
        own = [p for p in part.parameters() if p not in ignored and not isinstance(p, DTensor)]
        trained = any(p.requires_grad for p in own)
        for p in own:
            if not p.untyped_storage().nbytes():  # of a copy that is being made
                p.untyped_storage().resize_(p.numel() * p.element_size())
        if trained:
            for p in own:
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        narrow = trained and torch.promote_types(dtype, torch.float32) != dtype
        fully_shard(
            part,
            mesh=mesh.devices,
            reshard_after_forward=gather == "layer" and part is not module,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=dtype if narrow else None,
                reduce_dtype=torch.float32 if narrow else None,
                cast_forward_inputs=False,
            ),
            offload_policy=_held_by_the_host(mesh) if offload and trained else OffloadPolicy(),
            ignored_params=ignored,
        )
    for part in _divided(module):
        part.set_gradient_divide_factor(1.0)  # the loss is divided by what the whole batch counts
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
        if hasattr(part, "set_reduce_scatter_unused_params"):  # an expert that only some ranks used: 0 from the others
            part.set_reduce_scatter_unused_params(True)
    module.keeps_gathered = gather == "update"  # type: ignore[assignment]
    for p in module.parameters():
        if isinstance(p, DTensor):
            p.computes_in = dtype  # type: ignore[attr-defined]


def _held_by_the_host(mesh: RankMesh) -> CPUOffloadPolicy:
    return CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda")


def _divided(module: nn.Module | None) -> list[Any]:
    return [] if module is None else [m for m in module.modules() if isinstance(m, FSDPModule)]


def is_divided(module: nn.Module | None) -> bool:
    """Whether the parameters of a module, or of a part of it, are divided among ranks."""
    return bool(_divided(module))


def at_rest(module: nn.Module | None) -> None:
    """Let go of weights that were put together: parameters are each rank's own part again, and the next pass sees what was written to
    them. Nothing for a module that is not divided."""
    for part in _divided(module):
        part.reshard()


def before_backward(module: nn.Module | None, last: bool) -> None:
    """Say whether the backward pass to come is the last of an update. Where weights stay together for an update, gradients stay with them
    until then, and are added up over ranks once; else after every pass."""
    if isinstance(module, FSDPModule) and module.keeps_gathered:
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)


def is_part(p: Tensor) -> bool:
    """Whether a parameter is divided among ranks."""
    return isinstance(p, DTensor)


def dtype_of(p: Tensor) -> torch.dtype:
    """The dtype that a parameter has in a pass."""
    return getattr(p, "computes_in", p.dtype)


def device_of(p: Tensor) -> torch.device:
    """Where a parameter is in a pass; at rest its parts may be in main memory."""
    if isinstance(p, DTensor) and p.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return p.device


def whole(p: Tensor) -> Tensor:
    """A parameter as it is in a pass, put together where it is divided: then every rank must ask for it."""
    x = p.detach()
    if not isinstance(x, DTensor):
        return x
    narrow: Any = x.to(dtype_of(p))  # before it is sent
    full: Tensor = narrow.full_tensor()
    return full


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; the tensor itself where it is not divided."""
    return x.to_local() if isinstance(x, DTensor) else x


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is to be divided as `like` is. Nothing is sent."""
    if not isinstance(like, DTensor):
        return x
    on = x.detach().to(like.device)
    return distribute_tensor(on, like.device_mesh, like.placements, src_data_rank=None).to_local()


def joined(part: Tensor, like: Tensor) -> Tensor:
    """The whole of which each rank has a part, divided as `like` is."""
    if not isinstance(like, DTensor):
        return part
    made = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made.full_tensor()


@contextlib.contextmanager
def put_together(module: nn.Module, first: bool) -> Iterator[None]:
    """Until the block ends the parameters of a module are whole and plain, on the CPU, on the rank that is the `first`; other ranks must
    take part, and run the block with their own parts."""
    at_rest(module)
    places: list[tuple[nn.Module, str, Any]] = [
        (m, name, p) for m in module.modules() for name, p in m._parameters.items() if isinstance(p, DTensor)
    ]
    found: dict[int, nn.Parameter] = {}
    for _, _, p in places:
        if id(p) not in found:
            full = whole(p)
            found[id(p)] = nn.Parameter(full.cpu(), p.requires_grad) if first else p
    try:
        for m, name, p in places:
            m._parameters[name] = found[id(p)]
        yield
    finally:
        for m, name, p in places:
            m._parameters[name] = p
