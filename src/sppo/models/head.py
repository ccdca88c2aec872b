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


class Head:
    """The head of a model. `direct`: its logits are the projection of the last hidden state, and nothing more."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.direct = _is_a_projection(model)
        self._cache: tuple[int, Tensor | None] = (-1, None)

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
            return logits if bias is None else logits + bias.float()
        weight = self.float32_weight()
        with exact_products(head.weight.dtype):
            return linear(hidden_ND.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))

    def float32_weight(self) -> Tensor:
        """The weight in float32, converted once for each version of the weights rather than once per token, and
        always in the same place: a captured step reads it there (rollout/cuda_graphs.py)."""
        weight: Tensor = self.projection.weight
        if weight.dtype in (torch.float32, torch.float64):
            return weight
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
    """The part of a causal language model below its head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


@torch.no_grad()
def _is_a_projection(model: Any) -> bool:
    """Ask the model: some scale or cap their logits (Gemma 2, Granite, Cohere). Small logits would pass through a cap
    all but unchanged, so the model is also shown large ones."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        return False
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device)[None] % head.weight.size(0)
    try:
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
    except (AttributeError, TypeError):
        return False
    mine = linear(hidden, head.weight, getattr(head, "bias", None))
    if mine.shape != logits.shape or not torch.allclose(mine.float(), logits.float(), rtol=1e-3, atol=1e-3):
        return False
    large = torch.linspace(-100, 100, logits.size(-1), device=device).expand(logits.shape).clone()
    handle = head.register_forward_hook(lambda *_: large)
    try:
        shown = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    unseen = torch.equal(shown, logits)  # a model that multiplies with the weight itself
    return unseen or torch.allclose(shown.double(), large.double(), rtol=1e-2)
