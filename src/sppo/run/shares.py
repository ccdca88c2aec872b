"""What one learner rank holds of a model whose weights several hold between them (models/sharding.py), in bytes.

    at rest              float32 masters, which are the weights, and moments: divided by the shards; a frozen base likewise
    gather = "update"    all weights in the dtype of the model, and their gradients in float32, while an update lasts
    gather = "layer"     what is no layer (embeddings, the head) and two layers: weights, and gradients, in both dtypes while they are added up

Adapters, and a base that is quantised, are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..distributed.ranks import settled
from ..models.sharding import layers_of
from ..models.weights import parameter_count
from ..recipe.config import Config
from .footprint import Model


@dataclass(frozen=True)
class Shares:
    """The parts of a model on one of `shards` ranks."""

    model: Model
    shards: int
    gather: str
    offload: bool
    """Whether masters, moments and gradients are the host's."""

    def at_rest(self, optimizer: str) -> dict[str, int]:
        """Weights and optimiser, from the first step to the last."""
        model = self.model
        if model.adapter is not None:
            own = 0 if self.offload else model.optimiser(optimizer)
            return {"weights": model.base // self.shards, "adapter": model.beside, "optimiser": own}
        state = 4 * model.trained + model.moments(optimizer)
        return {"masters and moments": 0 if self.offload else state // self.shards}

    def in_a_pass(self) -> dict[str, int]:
        """Weights that are put together for it."""
        layer, rest = in_layers(self.model)
        whole = self.model.parameters if self.gather == "update" else 2 * layer + rest
        return {"weights put together": whole * self.model.size}

    def gradients(self) -> dict[str, int]:
        """What an update adds to them, beside the passes' own; that of the shard stays until the optimiser has read it."""
        model = self.model
        if model.adapter is not None:
            return {"gradients": model.trained * (model.size + (4 if model.narrow else 0))}
        layer, rest = in_layers(model)
        both = model.size + 4
        by_layer = max(2 * layer * both + rest * model.size, rest * both)  # what is no layer comes last
        before = 4 * model.trained if self.gather == "update" else by_layer
        return {"gradients before they are added up": before} | self.gradients_of_the_shard()

    def gradients_of_the_shard(self) -> dict[str, int]:
        """In float32."""
        if self.model.adapter is not None:
            return self.gradients()
        return {"gradients of the shard": 0 if self.offload else 4 * self.model.trained // self.shards}


def in_layers(model: Model) -> tuple[int, int]:
    """Parameters of the largest layer, and of all that is no layer."""
    layers = [parameter_count(layer) for layer in layers_of(model.outline)]
    return max(layers, default=0), model.parameters - sum(layers)


def shards_of(config: Config, policy: Model) -> int:
    """How many ranks hold one copy of the weights between them; 1 without a cluster."""
    section = config.cluster
    return 1 if section is None else settled(section.shards, section.learners, parameter_count(policy.outline))
