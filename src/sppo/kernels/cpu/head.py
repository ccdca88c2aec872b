"""The output projection and its log-softmax on a CPU with native bfloat16, in compiled code (head.c): logits are used
in the registers in which they are summed. For the backward pass the logits that fit into `KEPT` bytes are kept, in
two bytes each, and the others computed again.

PyTorch's products of bfloat16 numbers with a float32 result run at half the speed of those with a bfloat16 one, and a
logit in bfloat16 would be wrong by up to 0.4 (docs/performance.md). The arithmetic is logprobs.py's.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .build import NoCompiler, library

PART = 2048
"""Tokens of a forward pass, at most: memory only."""
KEPT = 1 << 27
"""Bytes of logits that a forward pass leaves to its backward pass: a quarter of what the head computes is computed
once less, and memory stays flat."""
RANGE = (-30.0, 60.0)
"""Where log Σ exp must lie for kept logits (head.c's FIXED) to be right wherever they matter."""
PANEL = 64
"""Hidden sizes must be a multiple of it, so that every row is whole registers."""


_spare: list[Tensor] = []


class _Head(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "head", "weight", "target")),
        *((name, ctypes.c_long) for name in ("N", "D", "V", "threads")),
        ("scale", ctypes.c_float),
        *(
            (name, ctypes.c_void_p)
            for name in ("logp", "entropy", "normaliser", "grad", "grad_hidden", "grad_weight", "kept")
        ),
        *((name, ctypes.c_long) for name in ("keeps", "across")),
    ]


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    try:
        lib = library("head", torch.bfloat16)
    except NoCompiler:
        return None
    long, pointer, head = ctypes.c_long, ctypes.c_void_p, ctypes.POINTER(_Head)
    lib.pack.argtypes, lib.pack.restype = [pointer, long, long, long, long, pointer], None
    lib.head_forward.argtypes, lib.head_forward.restype = [head, pointer], None
    lib.head_backward.argtypes, lib.head_backward.restype = [head, pointer], None
    lib.head_bytes.argtypes, lib.head_bytes.restype = [head], long
    lib.lanes.restype = lib.pair.restype = long
    return lib


def fits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> bool:
    """Whether the compiled code can take these and is the faster way: bfloat16 on a processor that multiplies it."""
    return (
        bias_V is None
        and all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in (hidden_ND, weight_VD))
        and hidden_ND.size(1) % PANEL == 0
        and (lib := _compiled()) is not None
        and lib.pair() == 2  # numbers of bfloat16 that one instruction multiplies
    )


class Head:
    """One projection [V, D] as it is now, at a temperature."""

    def __init__(self, weight_VD: Tensor, temperature: float) -> None:
        lib = _compiled()
        assert lib is not None
        self._library, self.threads, self.temperature = lib, torch.get_num_threads(), temperature
        self.size, self.hidden = weight_VD.shape
        self._weight = weight_VD.detach().contiguous()
        self._packed = self._pack(self._weight)

    def room(self, tokens: int) -> Tensor | None:
        """A buffer for the logits that are kept of these tokens; None where none is."""
        lanes = self._library.lanes()
        panels = -(-self.size // lanes)
        count = min(tokens, KEPT // (2 * panels * lanes))
        if not count:
            return None
        size = panels * count * lanes
        block = _spare.pop() if _spare and len(_spare[0]) >= size else torch.empty(KEPT // 2, dtype=torch.int16)
        return block[:size].view(panels, count, lanes)

    @staticmethod
    def spare(kept: Tensor) -> None:
        """Give a buffer back: fresh pages for it would cost a fifth of the next forward pass."""
        if kept._base is not None:
            _spare[:] = [kept._base]

    def forward(self, hidden_ND: Tensor, target_N: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """log π of the targets, entropy, and log Σ exp(logits), float32 [N] each. `kept`, see `room`, is filled in."""
        if not 0 <= int(target_N.min()) <= int(target_N.max()) < self.size:
            raise IndexError(f"a target is beyond the head's {self.size} rows")
        hidden_ND, target_N = hidden_ND.contiguous(), target_N.to(torch.int64).contiguous()
        found = [torch.empty(len(hidden_ND), dtype=torch.float32) for _ in range(3)]
        room = torch.empty(self.threads * min(PART, len(hidden_ND)), 3, self._library.lanes(), dtype=torch.float32)
        for start in range(0, len(hidden_ND), PART):
            part = slice(start, start + PART)
            logp, entropy, normaliser = (x[part] for x in found)
            job = self._job(hidden_ND[part], target_N[part], logp=logp, entropy=entropy, normaliser=normaliser)
            if kept is not None and start < kept.size(1):
                job.kept, job.keeps, job.across = kept[:, start:].data_ptr(), kept.size(1) - start, kept.size(1)
            self._library.head_forward(job, room.data_ptr())
        logp_N, entropy_N, normaliser_N = found
        return logp_N, entropy_N, normaliser_N

    def backward(
        self,
        hidden_ND: Tensor,
        target_N: Tensor,
        normaliser_N: Tensor,
        grad_N: Tensor,
        with_weight: bool = True,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of the hidden states and of the weights, in bfloat16, from that of log π; `kept` as `forward`
        left it."""
        hidden_ND, target_N = hidden_ND.contiguous(), target_N.to(torch.int64).contiguous()
        grad_N, normaliser_N = grad_N.float().contiguous(), normaliser_N.contiguous()
        grad_hidden = torch.empty(hidden_ND.shape, dtype=torch.float32)
        outputs = {"grad_hidden": grad_hidden}
        if with_weight:
            outputs["grad_weight"] = torch.empty_like(self._weight)
        job = self._job(hidden_ND, target_N, normaliser=normaliser_N, grad=grad_N, **outputs)
        low, high = RANGE
        if kept is not None and low < float(normaliser_N.min()) and float(normaliser_N.max()) < high:
            job.kept, job.keeps, job.across = kept.data_ptr(), kept.size(1), kept.size(1)
        memory = torch.empty(self._library.head_bytes(job), dtype=torch.uint8)
        self._library.head_backward(job, memory.data_ptr())
        return grad_hidden.to(hidden_ND.dtype), outputs.get("grad_weight")

    def _job(self, hidden_ND: Tensor, target_N: Tensor, **tensors: Tensor) -> Any:
        return _Head(
            hidden_ND.data_ptr(), self._packed.data_ptr(), self._weight.data_ptr(), target_N.data_ptr(),
            len(hidden_ND), self.hidden, self.size, self.threads,
            1.0 / self.temperature, **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )  # fmt: skip

    def _pack(self, x_NK: Tensor) -> Tensor:
        """A matrix as products.h multiplies with it."""
        lanes, pair = self._library.lanes(), self._library.pair()
        count, k = x_NK.shape
        packed = x_NK.new_empty(-(-count // lanes), -(-k // pair), lanes, pair)
        self._library.pack(x_NK.data_ptr(), count, k, 1, self.threads, packed.data_ptr())
        return packed
