"""AdamW on float32 master weights, its moments in float32 or eight bits, and learning rates that are functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..models.loading import first_line

TOGETHER = 32
"""Gradients that are converted at once: on CUDA by one kernel, and no more than these are held twice."""


class MasterAdamW:
    """AdamW whose state and weights are float32 whatever the model's dtype.

    A bfloat16 weight near 1 moves in steps of 0.008, so updates of 1e-6 would vanish: they accumulate in the float32 master
    copy, and the model gets its rounding. For a float32 model the master *is* the model's parameter, and nothing is copied.

    `kind` is a recipe's `training.optimizer`: the moments of `adamw-8bit` (bitsandbytes, block-wise, arXiv 2110.02861) take 2 bytes a
    weight instead of 8; the `paged` one may move them to the host's memory.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        kind: str = "adamw",
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else nn.Parameter(p.detach().float())
            for p in self.parameters
        ]
        self._apart = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        made = optimiser_class(kind, self.masters[0].device)
        self.inner = made(self.masters, lr=0.0, betas=betas, weight_decay=weight_decay)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in (*self.parameters, *self.masters):
            p.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's loss to what is there. Sums are float32 whatever the model's dtype: a bfloat16 `grad` has 8 bits,
        and each further micro-batch would be rounded to the size of the sum so far. One micro-batch alone costs nothing more.
        """
        self._set_aside()
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """All that was added up since the last step, one for each trained parameter that has any; float32 (float64 for such a model)."""
        self._set_aside()
        return [m.grad for m in self.masters if m.grad is not None]

    def _set_aside(self) -> None:
        """Move what the model's narrow parameters hold to their masters' sums."""
        given = [(p, m) for p, m in self._apart if p.grad is not None]
        for p, master in given:
            if master.grad is not None:
                assert p.grad is not None
                master.grad.add_(p.grad)  # converted as it is read
                p.grad = None
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
            for group in self.inner.param_groups:
                group["lr"] = lr
            self.inner.step()
            if self._apart:
                with torch.no_grad():
                    torch._foreach_copy_([p for p, _ in self._apart], [m for _, m in self._apart])
        self.zero_grad()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Moments, and the masters where they are not the model's own weights."""
        return {"inner": self.inner.state_dict(), "masters": [m.detach() for _, m in self._apart]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back, bit for bit."""
        self.inner.load_state_dict(state["inner"])
        with torch.no_grad():
            for (_, master), saved in zip(self._apart, state["masters"], strict=True):
                master.copy_(saved)


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
