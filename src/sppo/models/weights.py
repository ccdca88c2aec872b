"""The weights of a model as a whole: how many, in which order they travel, and whether two models have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed.fsdp import local, part_of, whole

Weights = Iterable[tuple[str, Tensor]]
"""Names and whole tensors, in the order of `weights_of`."""

LANES = 8 * 4096
"""Bytes that a fingerprint adds up beside each other."""


def weights_of(parameters: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The name and the whole tensor of every parameter, in order of name. The tensors are the model's own, or put
    together where they are sharded."""
    for name, p in sorted(parameters.items()):
        yield name, whole(p)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in a dtype, as `from_pretrained(dtype=…)` gives it: what it computes for itself,
    such as the frequencies of its rotary embedding, keeps its own (in bfloat16 they would turn every position by
    another angle than in the published model)."""
    kept = {
        (module, name): module._buffers[name]
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    }
    model = model.to(dtype=dtype)
    for (module, name), buffer in kept.items():
        module._buffers[name] = buffer
    return model


@torch.no_grad()
def write(parameters: Mapping[str, Any], weights: Weights) -> None:
    """Copy weights into tensors of these names; what lies there already is not copied. Raises ValueError for names or
    shapes that are not theirs."""
    missing = dict(parameters)
    for name, tensor in weights:
        own = missing.pop(name, None)
        if own is None or own.shape != tensor.shape:
            raise ValueError(f"the model has no weight {name} of shape {tuple(tensor.shape)}")
        mine, given = local(own), part_of(tensor, own)
        if mine.data_ptr() != given.data_ptr():
            mine.copy_(given)
    if missing:
        raise ValueError(f"no {min(missing)} among the given weights")


def fingerprint(weights: Weights, beside: str = "") -> str:
    """A hash of all weights at about memory speed, the same on every device: 32 hexadecimal digits. `beside` is the
    fingerprint of other weights, to be covered too.

    Bytes are taken as rows of 4,096 lanes of eight bytes. Each word is multiplied by an odd number of its row's own,
    its upper half is folded into its lower one, and each lane is summed modulo 2⁶⁴; names and lanes go through
    BLAKE2b. Per word that is one-to-one, so weights that differ in one word of a lane never have the same sum; moved
    or swapped blocks, and any other change that was not made for it, have with a chance of about 2⁻³² a lane or less.
    The multipliers are public: who wants two policies of one fingerprint can construct them. Files are vouched for by
    SHA-256 (audit/chain.py).
    """
    total = hashlib.blake2b(beside.encode(), digest_size=16)
    for name, tensor in weights:
        flat = tensor.reshape(-1)
        if flat.storage_offset() * flat.element_size() % 8:  # eight bytes must be whole
            flat = flat.clone()
        bits = flat.view(torch.uint8)
        whole = len(bits) - len(bits) % LANES
        total.update(f"{name}:{len(bits)}:".encode())
        total.update(_lanes(bits[:whole].view(torch.int64).view(-1, LANES // 8)).cpu().numpy().tobytes())
        total.update(bits[whole:].cpu().numpy().tobytes())
    return total.hexdigest()


def _lanes(word_RL: Tensor) -> Tensor:
    """Σ over rows of fold(word · odd multiplier of the row), [L] of int64, in blocks that stay in a processor's
    cache."""
    lane_L = word_RL.new_zeros(word_RL.size(1))
    odd_R = _odd(word_RL.size(0), word_RL.device)
    rows = 2048 if word_RL.is_cuda else 16
    for first in range(0, word_RL.size(0), rows):
        mixed = word_RL[first : first + rows] * odd_R[first : first + rows, None]
        half = mixed.view(torch.int32)
        half[:, ::2] ^= half[:, 1::2]  # so that the highest bits, which a product cannot carry up any more, count twice
        lane_L += mixed.sum(0)
    return lane_L


def _odd(rows: int, device: torch.device) -> Tensor:
    """An odd pseudo-random multiplier for each row (SplitMix64 of its number), [R] of int64."""
    x = (torch.arange(1, rows + 1, device=device) * -0x61C8864680B583EB).contiguous()
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1


def sha256(weights: Weights) -> str:
    """SHA-256 of every weight with its name, dtype and shape. Two equal policies, bit for bit, are equal here."""
    total = hashlib.sha256()
    for name, tensor in weights:
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def parameter_count(model: torch.nn.Module) -> int:
    """Weights of a model; tied ones count once, and those in four bits one by one."""
    packed = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in packed)


def counted(parameters: int) -> str:
    """A number of parameters as people say it: 135M, 7.6B."""
    return f"{parameters / 1e6:.3g}M" if parameters < 1e9 else f"{parameters / 1e9:.3g}B"
