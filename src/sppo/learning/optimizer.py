"""AdamW on float32 master weights, its moments in float32 or eight bits, and learning rates that are functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        kind: str = "adamw",
        offload: bool = False,
    ) -> None:
        self.offload = offload
        self.tight = False  # memory is: what a backward pass freed goes back at once
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [self._master(p) for p in self.parameters]
        self._apart = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        self._copied = self._versions()
        made = optimiser_class(kind, self.masters[0].device)
        self.inner = made(self.masters, lr=0.0, betas=betas, weight_decay=weight_decay)

    def _master(self, p: nn.Parameter) -> nn.Parameter:
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

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's loss to what is there. Sums are float32 whatever the model's dtype: a
        bfloat16 `grad` has 8 bits, and each further micro-batch would be rounded to the size of the sum so far.

        On a GPU each gradient goes into its sum as soon as it is made, so that all of them are never held beside the
        sums. On a CPU the next micro-batch, or the step, moves them: an embedding's gradient comes in two parts there
        (kernels/patch_layers.py), and one micro-batch alone needs no sums.
        """
        self._set_aside()
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
        """All that was added up since the last step, one for each trained parameter that has any; float32 (float64 for such a model)."""
        self._set_aside()
        return [m.grad for m in self.masters if m.grad is not None]

    def _set_aside(self) -> None:
        """Move what the model's parameters hold to the sums of their masters, where these are other tensors."""
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
        norm = float(nn.utils.clip_grad_norm_(self.masters, max_norm))
        if math.isfinite(norm):
            self._take()
            for group in self.inner.param_groups:
                group["lr"] = lr
            self.inner.step()
            self._round()
        self.zero_grad()
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
        without."""
        return {"inner": self.inner.state_dict(), "masters": [m.detach() for p, m in self._apart if p.dtype != m.dtype]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back, bit for bit; the model has its saved weights already."""
        self.inner.load_state_dict(state["inner"])
        saved = iter(state["masters"])
        with torch.no_grad():
            for p, master in self._apart:
                master.copy_(p if p.dtype == master.dtype else next(saved))


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
