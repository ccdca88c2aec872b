"""How the learner's weights reach vLLM at every sync, and the proof that it computes with them.

Either way has a `folder` and `options` for the engine to start with, the `request` that goes with every prompt, `send`,
and `held`, which looks at what the engine multiplies with. vLLM's CPU build packs matrices away where nobody can read
them; a product with the identity brings them out again, exactly.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.adapters import Adapters
from ..models.merging import base_folder, base_weights, merged_weights
from ..models.policy import Policy
from ..models.weights import Weights

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has room for; a lower one is filled up with zeros."""


class CannotSend(Exception):
    """Why an adapter cannot be sent alone."""


class Whole:
    """All weights are pushed into the running engine; those under an adapter, merged with it."""

    options: Mapping[str, Any] = {}
    request: Any = None

    def __init__(self, policy: Policy, folder: Path, why_merged: str = "") -> None:
        self.policy, self.checksum = policy, 0
        self.tied = bool(getattr(policy.model.config, "tie_word_embeddings", False))
        self.stated = "weights of its own"
        if policy.adapters is None:
            policy.save(folder)
            self.folder, self.checksum = str(folder), checksum([tensor for _, tensor in policy.weights()])
        else:
            self.folder = base_folder(policy, folder)
            self.stated += (
                f", base and adapter merged ({why_merged}), which rounds the update to the weights' dtype "
                "(NeMo-RL#3696): the canary measures how far that goes"
            )

    def send(self, llm: Any, given: Weights) -> None:
        """Push weights; an adapter's are taken over by the policy, and go merged. Raises ModelError where it cannot be
        merged."""
        self.checksum = 0
        weights = given
        if self.policy.adapters is not None:
            self.policy.take(given)
            weights = merged_weights(self.policy.adapters)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._counted(weights)})
        if self.tied:
            llm.apply_model(_tie_again)

    def _counted(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.checksum = (self.checksum + checksum([tensor])) % 2**64
            yield name, tensor

    def held(self, llm: Any) -> bool:
        """Whether the engine multiplies with what was sent: vLLM fuses and reorders matrices, so a checksum is compared
        that does not depend on that."""
        return bool(llm.apply_model(checksum_inside)[0] == self.checksum)


class AdapterOnly:
    """The engine keeps the base that it starts with, and gets the adapter at every sync, under a new number: one of a
    number that it knows would be taken for the old one."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        """Raises CannotSend for an adapter that is more than LoRA."""
        assert policy.adapters is not None
        self.policy, self.adapters, self.into = policy, policy.adapters, folder
        if other := [name for name in policy.trained if ".lora_A." not in name and ".lora_B." not in name]:
            raise CannotSend(f"vLLM adds low-rank products only, and {other[0]} is trained")
        rank = max(a.size(0) for name, a in policy.trained.items() if ".lora_A." in name)
        if rank > RANKS[-1]:
            raise CannotSend(f"vLLM has room for ranks up to {RANKS[-1]}, and this is {rank}")
        self.options: Mapping[str, Any] = {
            "enable_lora": True, "max_loras": 1, "max_cpu_loras": 1,
            "max_lora_rank": next(room for room in RANKS if room >= rank),
            "lora_target_modules": sorted({n.partition(".lora_")[0].rpartition(".")[2] for n in policy.trained}),
        }  # fmt: skip
        self.folder = base_folder(policy, folder / "base")
        self.request: Any = None
        self.number = self.checksum = 0
        self.stated = "a base of its own, and the adapter alone is sent at each sync"
        if kind := policy.base.get("quantize"):
            self.stated += f" (the base is {kind}, widened here"
            self.stated += "; its layers round what they read too, and these do not)" if kind == "int8" else ")"

    def send(self, llm: Any, given: Weights) -> None:
        """Write the adapter, let the engine read it, and remove it. Raises CannotSend where vLLM does not take the
        first one."""
        from vllm.lora.request import LoRARequest

        self.policy.take(given)
        first, self.number = self.number == 0, self.number + 1
        folder = self.into / f"adapter-{self.number}"
        self.adapters.save(folder, self.adapters.name, {"name": self.folder} | self.policy.base)
        self.request = LoRARequest(folder.name, self.number, str(folder))
        self.checksum = checksum(_as_vllm_keeps(self.adapters))
        try:
            llm.llm_engine.add_lora(self.request)
        except (ValueError, RuntimeError) as error:
            if not first:
                raise
            raise CannotSend(f"vLLM does not take the adapter: {error}") from error
        finally:
            shutil.rmtree(folder)
        if first:
            base = checksum([tensor for _, tensor in base_weights(self.adapters)])
            if llm.apply_model(checksum_inside)[0] != base or not self.held(llm):
                raise CannotSend("vLLM holds other numbers than base and adapter have")

    def held(self, llm: Any) -> bool:
        """Whether the engine multiplies with this adapter and no other; its base was looked at when it started."""
        return bool(llm.apply_model(_adapter_inside)[0] == (self.checksum, [self.number]))


def _tie_again(model: Any) -> None:
    """vLLM 0.32 leaves an output matrix that is tied to the embedding as it was when weights are reloaded (on a CPU:
    a packed copy of it), and goes on sampling from it. The checksum found that."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embedding = next(m for m in model.modules() if type(m) is VocabParallelEmbedding)
    for head in (m for m in model.modules() if isinstance(m, ParallelLMHead)):
        head.weight = embedding.weight
        if hasattr(head, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


CHUNK = 1 << 20


def checksum(tensors: Sequence[Tensor]) -> int:
    """A 64-bit sum over the bits of all elements, zeros counting nothing: the same however they are fused, ordered or
    padded with zeros, and another (short of a contrived tie) when any value changes."""
    total = 0
    for tensor in tensors:
        flat = (tensor.detach() + 0.0).reshape(-1)  # −0 becomes 0, as it does in any sum
        bits = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
        for part in bits.split(CHUNK):
            b = part.long()
            total += int((b * b * 0x9E3779B97F4A7C1 + b * 0x2545F4914F6CDD1).sum())
    return total % 2**64


def checksum_inside(model: Any) -> int | str:
    """The checksum of a vLLM model's weights; a word where an output matrix is not the embedding that it should be
    tied to."""
    tensors: list[Tensor] = []
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel() and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                tensors.append(parameter)
        weight = getattr(module, "weight", None)
        around = hasattr(module, "base_layer")  # an adapter's layer around this one, which comes by itself
        if hasattr(module, "cpu_linear") and weight is not None and not around:
            used = _multiplied_with(module, weight)
            if weight.numel() == 0:
                tensors.append(used)
            elif not torch.equal(used, weight):
                return "tied weights differ"
    return checksum(tensors)


@torch.inference_mode()
def _multiplied_with(module: Any, weight: Tensor) -> Tensor:
    """The matrix that a linear layer of vLLM's CPU build really uses, [outputs, inputs]: its product with the
    identity."""
    inputs = getattr(module, "input_size_per_partition", None) or module.embedding_dim
    return module.cpu_linear(torch.eye(inputs, dtype=weight.dtype), weight, None).t()


def _adapter_inside(model: Any) -> tuple[int, list[int]]:
    """The checksum of the low-rank matrices that a vLLM model multiplies with, and the numbers of their adapters."""
    manager = model.lora_manager
    tensors: list[Tensor] = []
    for layer in manager.modules.values():
        for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
            tensors += stacked if isinstance(stacked, tuple | list) else [stacked]
    return checksum(tensors), [number for number in manager.lora_index_to_id if number is not None]


def _as_vllm_keeps(adapters: Adapters) -> list[Tensor]:
    """An adapter's matrices, the second of each pair with its factor."""
    found, name = [], adapters.name
    layers: list[Any] = [layer for layer in adapters.layers if name in getattr(layer, "lora_A", ())]
    for layer in layers:
        found += [layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]]
    return found
