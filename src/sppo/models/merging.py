"""The model below adapters as a whole, and base and adapter in one: for whatever reads no adapter, or no quantised
weights."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from ..errors import ModelError
from ..kernels.low_rank import dense, is_quantised
from .adapters import Adapters
from .policy import Policy
from .weights import Weights


def base_weights(adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """The name, as the model's own class has it, and the tensor of every weight below the adapters: tied ones once,
    quantised ones widened to the dtype that they are computed in."""
    for name, tensor in _base(adapters):
        yield _own_name(name), tensor


def merged_weights(adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """The same with the policy's adapter in it: W + s·BA, added up in float32 and rounded once to W's dtype. In
    bfloat16 that rounding distorts the update (NeMo-RL#3696). Raises ModelError for what cannot be merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, adapter = adapters.model, adapters.name
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, base in _base(adapters):
        owner, _, leaf = name.rpartition(".")
        layer = modules.get(owner.removesuffix(".base_layer"))
        if owner.endswith(".base_layer") and isinstance(layer, BaseTunerLayer):
            if shared[id(parameters[name])] > 1:
                raise ModelError(f"{_own_name(name)} is the head's weight too, which has no adapter")
            yield _own_name(name), _merged(layer, adapter, leaf, base).to(base.dtype)
        elif ".original_module." in name:
            yield (
                _own_name(name),
                parameters[name.replace(".original_module.", f".modules_to_save.{adapter}.")].detach(),
            )
        else:
            yield _own_name(name), base


@torch.no_grad()
def merge(adapters: Adapters) -> None:
    """Write `merged_weights` in the place of the weights below, one at a time, so that no second copy is held;
    `Adapters.save_base` then writes the sum. Raises ModelError where a weight is of a layer without an adapter too."""
    named = list(adapters.model.named_parameters(remove_duplicate=False))
    times = Counter(id(p) for _, p in named)
    for name, p in named:
        if ".base_layer." in name and times[id(p)] > 1:
            raise ModelError(
                f"the weight of {_own_name(name).removesuffix('.weight')} is the head's too, which has no adapter"
            )
    own = {_own_name(name): p for name, p in named if not _is_adapters(adapters, name)}
    for name, tensor in merged_weights(adapters):
        own[name].copy_(tensor)


def save_whole(adapters: Adapters, weights: Weights, folder: Path) -> None:
    """Write a model folder of these weights, in which nothing is quantised and no adapter is left."""
    model = adapters.model
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    buffers = dict(model.named_buffers())
    kept = {_own_name(n): buffers[n] for n in model.state_dict() if n in buffers and not _is_adapters(adapters, n)}
    with torch.device("meta"):
        hollow = type(model)(config)
    hollow.save_pretrained(str(folder), state_dict=kept | {name: tensor.cpu() for name, tensor in weights})


def base_folder(policy: Policy, folder: Path) -> str:
    """A folder that holds a policy's model without its adapter: the one that it was read from, or `folder`, which is
    written here."""
    assert policy.adapters is not None
    name = policy.base.get("name", "")
    if not policy.base.get("quantize"):
        if (Path(name) / "config.json").is_file():
            return name
        with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):  # a hub's, as it was fetched
            return str(snapshot_download(name, local_files_only=True))
    save_whole(policy.adapters, base_weights(policy.adapters), folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


def _base(adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """The weights below the adapters, by their names where they are."""
    model = adapters.model
    for name, p in model.named_parameters():
        if not _is_adapters(adapters, name):
            yield name, _widened(model.get_submodule(name.rpartition(".")[0]), p, model.dtype)


def _is_adapters(adapters: Adapters, name: str) -> bool:
    return any(adapter in name.split(".") for adapter in adapters.peft.peft_config)


def _own_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _widened(module: Any, parameter: Any, dtype: torch.dtype) -> Tensor:
    if not is_quantised(module) or parameter is not module.weight:
        return parameter.detach()
    if getattr(parameter, "SCB", True) is None and module.state.SCB is None:
        raise ModelError("an int8 layer of this model has lost the scales of its rows, so it cannot be widened")
    return dense(module, dtype)


@torch.no_grad()
def _merged(layer: Any, adapter: str, leaf: str, base: Tensor) -> Tensor:
    """A weight or bias of a layer with an adapter in it, in float32 at least."""
    wide = torch.promote_types(base.dtype, torch.float32)
    if layer.get_base_layer().weight.is_floating_point():
        twin = copy.deepcopy(layer).to(wide)
        twin.merge(adapter_names=[adapter])  # peft's own sum, whatever the kind of adapter
        return getattr(twin.get_base_layer(), leaf).detach()
    if leaf != "weight":
        return base
    if not hasattr(layer, "lora_A") or layer.use_dora.get(adapter):
        raise ModelError("only plain LoRA can be merged into a quantised base")
    a, b = (m[adapter].weight.to(wide) for m in (layer.lora_A, layer.lora_B))
    return base.to(wide) + layer.scaling[adapter] * (b @ a)
