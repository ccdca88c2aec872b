"""AdamW on float32 master weights, its moments in float32 or eight bits, and learning rates that are functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.fsdp import at_rest, before_backward, dtype_of, is_part, joined, local, part_of
from ..distributed.mesh import Mesh
from ..errors import RecipeError
from ..memory import give_back
from ..models.loading import first_line

TOGETHER = 32
"""Gradients that are converted at once: on CUDA by one kernel, and no more than these are held twice."""


class MasterAdamW:
    """AdamW whose state and weights are float32 whatever the model's dtype.

    A bfloat16 weight near 1 moves in steps of 0.008, so updates of 1e-6 would vanish: they accumulate in the float32
    master copy, and the model gets its rounding. For a float32 model the master *is* the model's parameter, and nothing
    is copied.

    `kind` is a recipe's `training.optimizer`: the moments of `adamw-8bit` (bitsandbytes, block-wise, arXiv 2110.02861)
    take 2 bytes a weight instead of 8; the `paged` one may move them to the host's memory.

    `offload` is `training.offload`: masters, sums of gradients and moments are in main memory, and the CPU computes the
    step. Each gradient goes there as the backward pass makes it, so the device never holds more than one of them.

    Of several ranks (`mesh`) each adds up its own micro-batches, and a step begins with the sum over all. The weights of a
    module that is divided among them (`of`; distributed/fsdp.py) are masters themselves, and a rank updates its part.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        kind: str = "adamw",
        offload: bool = False,
        mesh: Mesh | None = None,
        of: nn.Module | None = None,
    ) -> None:
        """`of` is the module whose passes use the parameters, which may be divided among ranks. Raises RecipeError for a `kind` that
        such parts cannot be trained with."""
        self.offload, self.mesh, self.of = offload, mesh or Mesh(), of
        at_rest(of)
        self.tight = False  # memory is: what a backward pass freed goes back at once
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [self._master(p) for p in self.parameters]
        pairs = list(zip(self.parameters, self.masters, strict=True))
        self._parts = [(p, m) for p, m in pairs if is_part(p)]
        self._apart = [(p, m) for p, m in pairs if m is not p and not is_part(p)]
        if self._parts and kind != "adamw":
            raise RecipeError(
                f"training.optimizer = {kind!r} rounds moments in blocks that must be whole, and cluster.shards divides the weights "
                "among ranks: use 'adamw', or set cluster.shards = 1"
            )
        self._copied = self._versions()
        made = optimiser_class(kind, self.masters[0].device)
        self.inner = made(self.masters, lr=0.0, betas=betas, weight_decay=weight_decay)

    def _master(self, p: nn.Parameter) -> nn.Parameter:
        if is_part(p):
            return nn.Parameter(local(p.detach()))  # the same memory
        wide = torch.promote_types(p.dtype, torch.float32)
        if self.offload:
            return nn.Parameter(p.detach().to("cpu", wide, copy=True))
        return p if p.dtype == wide else nn.Parameter(p.detach().to(wide))

    def _take(self) -> None:
        """Take over what else was written to weights that are as exact as their masters, such as a critic's base
        rate."""
        with torch.no_grad():
            for (p, master), now, copied in zip(self._apart, self._versions(), self._copied, strict=True):
                if p.dtype == master.dtype and now != copied:
                    master.copy_(p)

    def _versions(self) -> list[int]:
        return [p._version for p, _ in self._apart]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in (*self.parameters, *self.masters):
            p.grad = None

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of one micro-batch's loss to what is there. Sums are float32 whatever the model's dtype: a
        bfloat16 `grad` has 8 bits, and each further micro-batch would be rounded to the size of the sum so far.

        On a GPU each gradient goes into its sum as soon as it is made, so that all of them are never held beside the
        sums. On a CPU the next micro-batch, or the step, moves them: an embedding's gradient comes in two parts there
        (kernels/patch_layers.py), and one micro-batch alone needs no sums.

        `last`: no further micro-batch is certain to follow before the step. Until then the gradients of weights that are divided
        among ranks need not be added up over these.
        """
        self._set_aside()
        before_backward(self.of, last)
        pairs = self._apart if self.offload else [(p, m) for p, m in self._apart if p.is_cuda]
        hooks = [p.register_post_accumulate_grad_hook(partial(_bring, master)) for p, master in pairs]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        if self.tight:
            give_back()

    def gradients(self) -> list[Tensor]:
        """All that was added up since the last step, over all ranks, one for each trained parameter that has any; float32 (float64 for
        such a model)."""
        self._set_aside()
        self._fill_in()
        found = [(p, m.grad) for p, m in zip(self.parameters, self.masters, strict=True) if m.grad is not None]
        return [joined(grad, p) if is_part(p) else self.mesh.sum(grad) for p, grad in found]

    def _fill_in(self) -> None:
        """Where other ranks have a gradient of a whole parameter and this one has none, give it 0."""
        if self.mesh.size == 1:
            return
        has = self.mesh.max(torch.tensor([m.grad is not None for m in self.masters]).int()).tolist()
        for master, some in zip(self.masters, has, strict=True):
            if some and master.grad is None:
                master.grad = torch.zeros_like(master)

    def _reduce(self) -> None:
        """Make sums of micro-batches sums of all ranks'. Those of divided parameters are already."""
        if self.mesh.size == 1:
            return
        self._fill_in()
        whole = [m for p, m in zip(self.parameters, self.masters, strict=True) if m.grad is not None and not is_part(p)]
        for master in whole:
            assert master.grad is not None
            master.grad = master.grad.contiguous()
        self.mesh.add_up([m.grad for m in whole if m.grad is not None])

    def _set_aside(self) -> None:
        """Move what the model's parameters hold to the sums of their masters, where these are other tensors."""
        for p, master in self._parts:
            if p.grad is not None:
                grad = local(p.grad)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                p.grad = None
        given = [(p, m) for p, m in self._apart if p.grad is not None]
        for p, master in given:
            if self.offload or master.grad is not None:
                _bring(master, p)
        fresh = [(p, m) for p, m in given if p.grad is not None]
        for start in range(0, len(fresh), TOGETHER):
            some = fresh[start : start + TOGETHER]
            wide = [torch.empty_like(m) for _, m in some]
            torch._foreach_copy_(wide, [p.grad for p, _ in some if p.grad is not None])
            for (p, master), grad in zip(some, wide, strict=True):
                p.grad, master.grad = None, grad

    def step(self, lr: float, max_norm: float) -> float:
        """Clip to a global norm and update. Returns the norm before clipping; when it is not finite, nothing is updated."""
        self._set_aside()
        self._reduce()
        norm = self._clip(max_norm)
        if math.isfinite(norm):
            self._take()
            for group in self.inner.param_groups:
                group["lr"] = lr
            self.inner.step()
            self._round()
        self.zero_grad()
        at_rest(self.of)  # the next pass must see the new weights
        return norm

    def _clip(self, max_norm: float) -> float:
        if not self._parts:
            return float(nn.utils.clip_grad_norm_(self.masters, max_norm))
        parts = [m.grad for _, m in self._parts if m.grad is not None]
        whole = [
            m.grad for p, m in zip(self.parameters, self.masters, strict=True) if m.grad is not None and not is_part(p)
        ]
        copies = self.mesh.size // self.mesh.shards
        norm = math.sqrt(self.mesh.sum(_square(parts)) / copies + _square(whole))
        if math.isfinite(norm):
            for grads in (parts, whole):
                if grads:
                    torch._foreach_mul_(grads, min(1.0, max_norm / (norm + 1e-6)))
        return norm

    @torch.no_grad()
    def _round(self) -> None:
        """Round the masters to the model's weights."""
        if self.offload:
            for p, master in self._apart:
                p.copy_(_staged(master, p.dtype, pinned=p.is_cuda), non_blocking=True)
        elif self._apart:
            torch._foreach_copy_([p for p, _ in self._apart], [m for _, m in self._apart])
        self._copied = self._versions()

    def state_dict(self) -> dict[str, Any]:
        """Moments, and the masters that are more exact than the model's own weights: the same with `offload` and
        without, and from any number of ranks. All of them must ask for it; of what is divided only the first has the tensors."""
        at_rest(self.of)
        inner = self.inner.state_dict()
        if self._parts:
            moments = dict(inner["state"])
            for i, (p, m) in enumerate(zip(self.parameters, self.masters, strict=True)):
                if i in moments and is_part(p):
                    moments[i] = {k: self._gathered(x, p) if _like(x, m) else x for k, x in moments[i].items()}
            inner = inner | {"state": moments}
        pairs = zip(self.parameters, self.masters, strict=True)
        return {"inner": inner, "masters": [self._gathered(m.detach(), p) for p, m in pairs if dtype_of(p) != m.dtype]}

    def _gathered(self, x: Tensor, p: Tensor) -> Tensor | None:
        """The whole of what belongs to a parameter, in the first rank's main memory; `x` itself where it is not divided."""
        if not is_part(p):
            return x
        full = joined(x, p)
        return full.cpu() if self.mesh.rank == 0 else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back, bit for bit; the model has its saved weights already."""
        at_rest(self.of)
        inner = state["inner"]
        if self.mesh.size > 1:
            pairs = enumerate(self.parameters)
            inner = inner | {"state": {i: _own(inner["state"][i], p) for i, p in pairs if i in inner["state"]}}
        self.inner.load_state_dict(inner)
        saved = iter(state["masters"])
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=True):
                if dtype_of(p) != master.dtype:
                    master.copy_(part_of(next(saved), p))
                elif master is not p and not is_part(p):
                    master.copy_(p)


def _like(x: Any, p: Tensor) -> bool:
    """Whether something in a parameter's state is as large as it: a moment, and no count of steps."""
    return isinstance(x, Tensor) and x.shape == p.shape


def _own(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """A rank's part of a parameter's state, in memory of its own: what is given may be other ranks' too, or far larger."""
    tensors = {k: x for k, x in state.items() if isinstance(x, Tensor)}
    return state | {k: (part_of(x, p) if _like(x, p) else x).clone() for k, x in tensors.items()}


def _square(grads: list[Tensor]) -> float:
    """The sum of all squares."""
    return float(torch.stack(torch._foreach_norm(grads)).double().square().sum()) if grads else 0.0


@torch.no_grad()
def _bring(master: nn.Parameter, p: Tensor) -> None:
    """Add a parameter's gradient to its master's sum, and free it."""
    assert p.grad is not None
    grad = p.grad if p.device == master.device else _staged(p.grad, p.dtype, pinned=p.is_cuda)
    if master.grad is None:
        master.grad = grad.to(master.dtype, copy=True)
    else:
        master.grad.add_(grad)  # converted as it is read
    p.grad = None


def _staged(x: Tensor, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """A copy in main memory to be transferred: pinned, at several times the speed. (What stays there is not: pinned
    memory comes in powers of two.)"""
    return torch.empty(x.shape, dtype=dtype, pin_memory=pinned).copy_(x)


def optimiser_class(kind: str, device: torch.device) -> Any:
    """The class behind `training.optimizer`. Raises RecipeError when it cannot be had here."""
    if kind == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    if kind.startswith("paged") and device.type != "cuda":
        raise RecipeError(
            "training.optimizer = 'paged-adamw-8bit' pages out of a GPU's memory, and there is none; use 'adamw-8bit'"
        )
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise RecipeError(
            f"training.optimizer = {kind!r} needs bitsandbytes ({first_line(error)}): pip install 'sppo[adapters]'"
        ) from None
    return optim.PagedAdamW8bit if kind.startswith("paged") else optim.AdamW8bit


def learning_rate(peak: float, step: int, total: int, *, warmup: int, schedule: str) -> float:
    """The rate at `step` of `total`: linear warm-up, then constant, or linear or cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak
