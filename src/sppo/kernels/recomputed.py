"""What a training pass does not keep: results that its backward pass computes again from what is kept anyway.

A product keeps what it reads. Of a Llama-like layer a third of all that is kept are the results of norms and gated units, each
one pass over memory away from what these keep themselves; they are the same bits when they are computed again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_results: ContextVar[dict[int, _Result] | None] = ContextVar("results", default=None)


class _Again(NamedTuple):
    """How to compute a tensor; `versions` are those of the inputs when it was computed first."""

    compute: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, compute: Callable[..., Tensor], inputs: tuple[Any, ...]) -> _Again:
        inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        return cls(compute, inputs, _versions(inputs))

    def __call__(self) -> Tensor:
        if _versions(self.inputs) != self.versions:
            raise RuntimeError("what a backward pass computes again has been modified in place since the forward pass")
        return self.compute(*self.inputs)


class _Result(NamedTuple):
    """A tensor that can be computed again, while it lives."""

    tensor: weakref.ref[Tensor]
    again: _Again


def _versions(inputs: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(x._version for x in inputs if isinstance(x, Tensor))


def recomputable(result: Tensor, compute: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Say of a result that `compute(*inputs)` gives the same bits, and that the backward pass needs its inputs anyway. Returns the
    result."""
    results = _results.get()
    if results is not None and result.requires_grad:
        at = result.data_ptr()
        gone = weakref.ref(result, lambda _: results.pop(at, None))  # else its inputs would stay to the end of the pass
        results[at] = _Result(gone, _Again.of(compute, inputs))
    return result


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Until the block ends no graph of PyTorch's keeps what is `recomputable`."""
    results: dict[int, _Result] = {}

    def pack(kept: Tensor) -> Any:
        found = results.get(kept.data_ptr())
        result = None if found is None else found.tensor()
        whole = result is not None and kept.numel() == result.numel() and kept.dtype == result.dtype
        if found is None or not whole or not kept.is_contiguous() or kept._version:
            return kept
        return found.again, kept.shape

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        again, shape = packed
        return again().view(shape)

    token = _results.set(results)
    try:
        with saved_tensors_hooks(pack, unpack) if torch.is_grad_enabled() else contextlib.nullcontext():
            yield
    finally:
        _results.reset(token)
