"""Modules that read rows of tokens: for hidden states, and for log-probabilities. The scorer's forward pass is all of
`Policy.logps`, the head's product included: whatever wraps a module finds its hooks here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..kernels.logprobs import token_logps, token_logps_from_logits
from ..kernels.low_rank import weights_only
from ..kernels.patch_layers import fusable, fused
from ..kernels.recomputed import recomputing
from . import packing
from .actions import Actions
from .adapters import Adapters
from .head import Head, backbone


class ActionLogps(NamedTuple):
    """Log-probabilities and entropies (nats, without gradient) of action tokens, [B, T], zeros beyond a row's own;
    the mask is bool."""

    logp_BT: Tensor
    entropy_BT: Tensor
    mask_BT: Tensor


def nothing_of(module: Any, *more: Any) -> Any:
    """What a module's forward pass gives for no rows at all: the first none of what it gives for one. A rank that has no rows left
    computes as much as the others wait for, and its gradient is 0."""
    found = module.forward(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[False, True]]), *more)
    return ActionLogps(*(x[:0].clone() for x in found)) if isinstance(found, ActionLogps) else found[:0].clone()


class Reader(nn.Module):
    """A transformer that is asked for its last hidden states. Dropout is off in every pass, so that the same weights
    always give the same numbers.

    Rows are packed where the model allows it (`packs`); else `unpacked_why` says why they are padded.
    """

    def __init__(self, model: Any, adapters: Adapters | None = None, *, head: bool = False, fast: bool = True) -> None:
        """`head`: its logits are wanted too. `fast`: packed and with fused layers, which round in another order than
        transformers' own passes."""
        super().__init__()
        self.model, self.adapters = model, adapters
        self.adapter = adapters.name if adapters else None  # the one that these passes use
        self.eval()
        weights_only(model)
        self.head = Head(model) if head else None
        self.unpacked_why = packing.use(model, self.head) if fast else "it is to compute as transformers does"
        self.packs = not self.unpacked_why
        self.fusable = (
            fusable(backbone(model)) if fast else []
        )  # found now: later a wrapper may hold parts of them only
        self._checkpointed: list[Any] = []

    def states(self, ids_BL: Tensor, actions: Actions) -> Tensor:
        """The last hidden states before N action tokens, [N, D]; `ids_BL` is on the CPU."""
        inputs, state_N = self._rows(ids_BL, actions)
        with self.computing():
            hidden: Tensor = backbone(self.model)(use_cache=False, **inputs).last_hidden_state
        return hidden.flatten(0, 1)[state_N]

    def _rows(self, ids_BL: Tensor, actions: Actions) -> packing.Rows:
        rows = packing.packed if self.packs else packing.padded
        device = self.model.get_input_embeddings().weight.device
        return rows(ids_BL, actions.before_B, actions.row_N, actions.position_N - 1, device)

    def under(self, adapter: str | None) -> Self:
        """The same over the same weights, with another adapter, or with none."""
        kind = next(
            kind for kind in type(self).__mro__ if kind.__module__ == __name__
        )  # a wrapper's class cannot be copied
        other: Self = object.__new__(kind)
        other.__dict__.update(self.__dict__)
        other.adapter = adapter
        return other

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Until the block ends the model computes as it does for this reader."""
        with self._pass(), recomputing(), self._checkpointing():
            yield

    @contextlib.contextmanager
    def _pass(self) -> Iterator[None]:
        """How every pass is computed, those of the backward pass over again too."""
        with (
            fused(self.fusable),
            contextlib.nullcontext() if self.adapters is None else self.adapters.using(self.adapter),
        ):
            yield

    def checkpoint_activations(self, on: bool = True) -> bool:
        """From now on training passes keep only the layers' inputs, and compute the layers again in the backward
        pass. Returns whether the model has layers for it."""
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._checkpointed = layers if on else []
        return bool(layers)

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """transformers' own switch works in training mode only, where dropout is on; so the layers are wrapped here,
        while gradients are wanted."""
        layers = self._checkpointed if torch.is_grad_enabled() else []
        for layer in layers:
            layer.forward = partial(checkpoint, partial(self._again, layer.forward), use_reentrant=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _again(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """A layer as it was computed the first time: by the backward pass the replaced forwards are gone."""
        with self._pass():
            return forward(*args, **kwargs)


class Scorer(Reader):
    """A causal language model, asked for the log-probabilities of given tokens: old and current ones come from the
    same function."""

    head: Head

    def __init__(self, model: Any, adapters: Adapters | None = None) -> None:
        super().__init__(model, adapters, head=True)

    def forward(self, ids_BL: Tensor, action_BL: Tensor, temperature: float | None) -> Any:
        """See `Policy.logps`. The state at position t−1 scores the token at position t; only action tokens meet the
        vocabulary. Without a temperature: the hidden states before N action tokens, [N, D]."""
        if not len(ids_BL):
            return nothing_of(self, temperature)
        # rows are laid out on the CPU, where batches are: an accelerator would be waited for at every step of it
        ids_BL, actions = ids_BL.cpu(), Actions.of(action_BL.cpu())
        if temperature is None:
            return self.states(ids_BL, actions)
        target_N = ids_BL[actions.row_N, actions.position_N]
        if self.head.direct:
            hidden_ND, head = self.states(ids_BL, actions), self.head
            target_N = target_N.to(hidden_ND.device)
            weight, bias = head.projection.weight, head.bias
            logp_N, entropy_N = token_logps(hidden_ND, weight, bias, target_N, temperature, head.scale, head.cap)
        else:
            inputs, state_N = self._rows(ids_BL, actions)
            with self.computing(), self.head.wide():
                logits_NV = self._logits_at(inputs, state_N)
            logp_N, entropy_N = token_logps_from_logits(logits_NV, target_N.to(logits_NV.device), temperature)
        actions = actions.to(logp_N.device)
        return ActionLogps(actions.spread(logp_N), actions.spread(entropy_N), actions.mask_BT)

    def _logits_at(self, inputs: dict[str, Any], state_N: Tensor) -> Tensor:
        """Logits of the wanted positions, [N, V]; the head sees no others where the model lets them be chosen."""
        if self.packs:
            logits_NV = self.model(use_cache=False, logits_to_keep=state_N, **inputs).logits[0]
            if len(logits_NV) == len(state_N):
                return logits_NV
        else:
            logits_NV = self.model(use_cache=False, **inputs).logits.flatten(0, 1)
        return logits_NV[state_N]
