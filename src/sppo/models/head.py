"""The output projection of a causal language model, with float32 logits whatever the model's dtype: in bfloat16 a
logit of 20 is only known to 0.06."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.cuda.attention import HALF
from ..kernels.cuda.head import exact_logits, wide_products
from ..kernels.logprobs import exact_products
from ..objective.ratio import wide

LINEAR, CAPPED, SMALL = 1.0, 3e4, 1e-3
"""Projections whose logits show a scale, a cap's height, and a scale under a cap."""


class Head:
    """The head of a model. `direct`: its logits are a function of the last hidden state's projection z that was found
    by asking the model: `scale`·z, or `cap`·tanh(`scale`·z / `cap`). Any other head is the model's own affair."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache: tuple[int, Tensor | None] = (-1, None)
        self.keeps = (
            True  # a float32 copy, until the weight changes, which weights that are put together again do not show
        )
        self.scale: float = 1.0
        self.cap: float | None = None
        found = _asked(self)
        self.direct = found is not None
        if found is not None:
            self.scale, self.cap = found

    @property
    def projection(self) -> Any:
        """The model's own module."""
        return self.model.get_output_embeddings()

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        return getattr(self.projection, "bias", None)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits of hidden states, [N, V], for sampling: without gradient. Only where the head is `direct`."""
        head, bias = self.projection, self.bias
        if hidden_ND.is_cuda and hidden_ND.dtype in HALF and wide_products():
            logits = exact_logits(hidden_ND, head.weight)
            return _after(logits if bias is None else logits + bias.float(), self.scale, self.cap)
        weight = self.float32_weight()
        with exact_products(head.weight.dtype):
            z = linear(hidden_ND.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        return _after(z, self.scale, self.cap)

    def of(self, inputs: dict[str, Any], state_N: Tensor) -> Tensor:
        """Logits after a whole model's inputs at the wanted places of its flattened rows, [N, V], without gradient."""
        if self.direct:
            hidden = backbone(self.model)(use_cache=False, **inputs).last_hidden_state
            return self.logits(hidden.flatten(0, 1)[state_N])
        logits: Tensor = self.model(use_cache=False, **inputs).logits
        return logits.flatten(0, 1)[state_N]

    def float32_weight(self) -> Tensor:
        """The weight in float32, converted once for each version of the weights rather than once per token, and
        always in the same place: a captured step reads it there (rollout/cuda_graphs.py)."""
        weight: Tensor = self.projection.weight
        if weight.dtype in (torch.float32, torch.float64):
            return weight
        if not self.keeps:
            return weight.float()
        version, cached = self._cache
        if cached is None or version != weight._version:
            with torch.inference_mode(False), torch.no_grad():  # so that it may be written to in any mode
                if cached is None or cached.shape != weight.shape or cached.device != weight.device:
                    cached = torch.empty_like(weight, dtype=torch.float32)
                cached.copy_(weight)
            self._cache = (weight._version, cached)
        return cached

    def forget(self) -> None:
        """Drop the float32 copy of the weight."""
        self._cache = (-1, None)

    @contextlib.contextmanager
    def wide(self) -> Iterator[None]:
        """Until the block ends the model's own projection gives float32, and with it whatever the model does to its
        logits (caps, scales). A head that is no plain linear layer stays as it is."""
        head = self.projection
        if not isinstance(head, torch.nn.Linear) or head.weight.dtype in (torch.float32, torch.float64):
            yield
            return
        head.forward = partial(self._wide_product, head)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del head.forward

    def _wide_product(self, head: Any, hidden: Tensor) -> Tensor:
        weight = head.weight.float() if torch.is_grad_enabled() else self.float32_weight()
        bias = None if head.bias is None else head.bias.float()
        with exact_products(head.weight.dtype):
            return linear(hidden.float(), weight, bias)


def backbone(model: Any) -> Any:
    """The part of a causal language model below its head; of a model that reads more than text, its decoder of
    text."""
    if not hasattr(model, "get_decoder"):
        return model.base_model
    while (inner := model.get_decoder()) is not model:  # a wrapper's decoder may have a head of its own (Llama 4)
        model = inner
    return model.model if hasattr(model, "lm_head") else model  # Llama 4 finds no decoder in its causal LM


def _after(z: Tensor, scale: float, cap: float | None) -> Tensor:
    """What a head does to its projection, in place."""
    if cap is not None:
        return z.mul_(scale / cap).tanh_().mul_(cap)
    return z if scale == 1.0 else z.mul_(scale)


@torch.no_grad()
def _asked(head: Head) -> tuple[float, float | None] | None:
    """Scale and cap, by asking the model (Gemma 2, Granite, Cohere); None where its logits are anything else. Its own
    may be too small to feel a cap, so it is also shown other projections than its own."""
    model, projection = head.model, head.projection
    if projection is None or not hasattr(projection, "weight"):
        return None
    ids = torch.arange(4, device=projection.weight.device)[None] % projection.weight.size(0)
    given: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
        z = torch.linspace(-100, 100, logits.size(-1), device=ids.device, dtype=wide(logits).dtype)
        z = z.expand(logits.shape).clone()
        z[..., :3] = z.new_tensor([LINEAR, CAPPED, SMALL])[: z.size(-1)]
        shown = _shown(model, ids, z)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    finally:
        handle.remove()
    if shown.dtype == logits.dtype and torch.equal(shown, logits):  # it multiplies with the weight itself
        read, scale, cap = 1.0, 1.0, None
    else:
        read = _ratio(given[0], hidden)
        rounding = 1e-2 if shown.dtype in HALF else 1e-5
        scale, cap = _curve(shown[0, 0, :3].double().tolist(), rounding)
        if not scale > 0 or not _near(_after(z.clone(), scale, cap), shown, max(rounding, 1e-3)):
            return None
    if read <= 0 or (read != 1.0 and head.bias is not None):
        return None
    own = wide(linear(hidden, projection.weight, head.bias).clone())
    rounding = 2e-2 if hidden.dtype in HALF else 1e-3
    same = own.shape == logits.shape and _near(_after(own, read * scale, cap), logits, rounding)
    return (read * scale, cap) if same else None


def _shown(model: Any, ids: Tensor, z: Tensor) -> Tensor:
    """The model's logits where its projection gives z, in float32 whatever the model's dtype."""
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: z.clone())
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    finally:
        handle.remove()


def _ratio(read: Tensor, hidden: Tensor) -> float:
    """The factor between the last hidden state and what the projection reads (MiniCPM); 0 where there is none."""
    if read.shape != hidden.shape:
        return 0.0
    ratio = float((read.double() * hidden.double()).sum() / hidden.double().square().sum())
    return _snapped(ratio, 1e-5) if _near(read, ratio * hidden.double(), 1e-2) else 0.0


def _curve(shown: list[float], rounding: float) -> tuple[float, float | None]:
    """Scale and cap, from logits of the projections LINEAR, CAPPED and SMALL."""
    linear, capped, small = shown
    scale = _snapped(small / SMALL, rounding)
    if abs(capped - scale * CAPPED) < max(rounding, 1e-3) * abs(scale) * CAPPED:
        return _snapped(linear / LINEAR, rounding), None
    return scale, capped


def _snapped(value: float, rounding: float) -> float:
    """One instead of a measured number that rounding alone tells from it."""
    return 1.0 if abs(value - 1) < rounding else value


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
