"""What a model takes of memory: its weights, what is trained of them, and what a token costs in a training pass.

Everything is counted by an outline, the model's modules without their weights, so that a plan is the same before a model is loaded
and after. An adapter (LoRA) trains little, and keeps nearly as much: its own inputs are the layers'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..kernels.cpu import decode
from ..kernels.cpu.head import KEPT, PANEL
from ..kernels.cuda.head import CHUNK_ELEMENTS as CUDA_CHUNK
from ..kernels.elementwise import compiles
from ..kernels.logprobs import CHUNK_ELEMENTS
from ..kernels.patch_layers import fusable_family
from ..models.adapter_critic import AdapterCritic
from ..models.adapters import targets_in
from ..models.critic import Critic
from ..models.head import backbone
from ..models.loading import choose_dtype, native_bfloat16, outline
from ..models.multimodal import text_parameters
from ..models.policy import Policy
from ..models.weights import parameter_count
from ..rewards.combine import parse_mixture
from ..spec import parse_spec

NF4 = 0.5 + (1 + 4 / 256) / 64
"""Bytes per weight: four bits, for each block of 64 a constant of eight bits, and for each 256 of these a float32."""
EIGHT_BIT = 2 * (1 + 4 / 256)
"""Bytes per weight of 8-bit moments: two, each with a float32 constant for each block of 256."""
REWARD_TOKENS = 8192
"""Tokens per pass of a reward model that says nothing else (rewards/model.py)."""
SMALL = 4096
"""bitsandbytes keeps the moments of tensors below so many numbers in float32."""


@dataclass(frozen=True)
class Adapter:
    """Low-rank matrices beside some layers of a frozen base."""

    rank: int
    targets: str | tuple[str, ...]
    """As a recipe's `adapter.targets`."""
    dora: bool = False
    experts: tuple[int, ...] = ()
    """Sizes of the matrices that peft puts beside experts, which are no layers."""


@dataclass(frozen=True)
class Sizes:
    """A transformer's sizes; one that its config does not name gets a usual value."""

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """By the config of a model, or of its part that reads text."""
        config = getattr(model.config, "get_text_config", lambda: model.config)()

        def number(name: str, usual: int) -> int:
            found = getattr(config, name, None)
            return found if isinstance(found, int) and found > 0 else usual

        hidden = number("hidden_size", 1024)
        heads = number("num_attention_heads", 1)
        size = number("head_dim", hidden // heads)
        inner, keys = number("intermediate_size", 4 * hidden), number("num_key_value_heads", heads) * size
        return cls(number("num_hidden_layers", 24), hidden, inner, heads * size, keys, number("vocab_size", 32_000))


@dataclass(frozen=True)
class Model:
    """A model as the plan reads it; its weights may be on the meta device."""

    model: Any
    dtype: torch.dtype
    adapter: Adapter | None = None
    quantize: str = ""
    shared: bool = False
    """Whether the base is another model's, and counted there."""

    @classmethod
    def of(cls, policy: Policy) -> Model:
        """A policy that is there."""
        adapter = None
        if policy.adapters is not None:
            settings = policy.adapters.peft.peft_config[policy.adapters.name]
            low = {name: m for name, m in policy.model.named_modules() if hasattr(m, "lora_A")}
            layers = tuple(name for name, m in low.items() if not hasattr(m, "parameter_name"))
            beside = [x for name, m in low.items() if name not in layers for x in (m.lora_A, m.lora_B)]
            experts = tuple(x[policy.adapters.name].weight.numel() for x in beside)
            adapter = Adapter(getattr(settings, "r", 0), layers, getattr(settings, "use_dora", False), experts)
        return cls(policy.model, policy.dtype, adapter, policy.base.get("quantize", ""))

    @classmethod
    def of_critic(cls, critic: Critic) -> Model:
        """A critic that is there."""
        if isinstance(critic, AdapterCritic):
            return replace(cls.of(critic.policy), shared=True)
        return cls(critic.backbone, next(critic.parameters()).dtype)

    @cached_property
    def outline(self) -> Any:
        """The model without adapters and without quantised layers: itself, or its like on the meta device."""
        if self.adapter is None and not self.quantize:
            return self.model
        if next(self.model.parameters()).is_meta:
            return self.model
        with torch.device("meta"):
            return type(self.model)(self.model.config)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The numbers that each linear layer but the head reads and gives, by name: what is quantised."""
        head = getattr(self.outline, "get_output_embeddings", lambda: None)()
        found = {
            n: m for n, m in self.outline.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head
        }
        # GPT-2's Conv1D has its matrix the other way round
        return {n: tuple(m.weight.shape[:: -1 if isinstance(m, nn.Linear) else 1]) for n, m in found.items()}

    @cached_property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """Those that get low-rank matrices. Raises RecipeError for a target that is no layer's name."""
        if self.adapter is None or not self.adapter.targets:
            return {}
        wanted = targets_in(self.outline, self.adapter.targets)
        return {n: size for n, size in self.linears.items() if any(n == w or n.endswith(f".{w}") for w in wanted)}

    @cached_property
    def parameters(self) -> int:
        """Weights of the base that read text; tied ones once."""
        return sum(p.numel() for _, p in text_parameters(self.outline))

    @property
    def size(self) -> int:
        """Bytes per number."""
        return self.dtype.itemsize

    @property
    def base(self) -> int:
        """Bytes of the base: what reads text in the dtype; or all of it, its linear layers quantised."""
        if not self.quantize:
            return self.parameters * self.size
        packed = sum(n * m for n, m in self.linears.values())
        constants = 4 * sum(out for _, out in self.linears.values())
        taken = int(NF4 * packed) if self.quantize == "nf4" else packed + constants
        return (parameter_count(self.outline) - packed) * self.size + taken

    @property
    def unpacked(self) -> tuple[int, int]:
        """Bytes of the largest quantised matrix, as a product reads it, and of all."""
        numbers = [n * m for n, m in self.linears.values()] if self.quantize else []
        return max(numbers, default=0) * self.size, sum(numbers) * self.size

    @property
    def towers(self) -> int:
        """Bytes of what reads more than text (models/multimodal.py): in main memory, in the checkpoint's dtype."""
        narrow = getattr(self.outline.config, "dtype", None)
        size = narrow.itemsize if isinstance(narrow, torch.dtype) else 4
        return 0 if self.quantize else (parameter_count(self.outline) - self.parameters) * size

    @cached_property
    def trained(self) -> int:
        """Weights with a gradient."""
        return sum(self._shapes())

    @property
    def largest(self) -> int:
        """The numbers of the largest trained tensor."""
        return max(self._shapes(), default=0)

    def _shapes(self) -> list[int]:
        """The sizes of the trained tensors: all of the model's, or an adapter's two matrices per layer (DoRA: a magnitude besides)."""
        if self.adapter is None:
            return [p.numel() for _, p in text_parameters(self.model) if p.requires_grad]
        rank, dora = self.adapter.rank, self.adapter.dora
        each = [(rank * reads, rank * gives, dora * gives) for reads, gives in self.adapted.values()]
        return [n for shapes in each for n in shapes if n] + list(self.adapter.experts)

    @property
    def narrow(self) -> bool:
        """Whether the optimiser keeps float32 masters beside the weights."""
        return self.size < 4

    def moments(self, kind: str) -> int:
        """Bytes of an optimiser's two moments."""
        if "8bit" not in kind:
            return 8 * self.trained
        return int(sum(n * (EIGHT_BIT if n >= SMALL else 8) for n in self._shapes()))

    def optimiser(self, kind: str) -> int:
        """Bytes of the moments, and of the float32 masters that are kept for narrower weights."""
        return self.moments(kind) + (4 * self.trained if self.narrow else 0)

    @property
    def beside(self) -> int:
        """Bytes of the adapter's own weights."""
        return 0 if self.adapter is None else self.trained * self.size


def activations(model: Model, device: torch.device, checkpointing: bool, elsewhere: bool = False) -> int:
    """Bytes that a training pass keeps for each token, with what its backward pass holds of one layer beside them.

    `elsewhere`: the device is not here; it has compiled layers if its kind can.
    """
    z = Sizes.of(model.outline)
    if fusable_family(model.outline) and (elsewhere or compiles(device.type, model.dtype)):
        layer = _kept_by_fused(model, z)
    else:
        layer = _kept_by_autograd(model, z.layers) or 24 * z.hidden * model.size
    backward = (3 * z.inner + 4 * z.hidden) * model.size
    return z.layers * z.hidden * model.size + layer + backward if checkpointing else z.layers * layer + backward


def _kept_by_fused(model: Model, z: Sizes) -> int:
    """Bytes for each token and layer of compiled layers: what each norm reads, queries and what they saw, keys and values, the gate, and
    what it lets through. What norms and gates give is computed again (kernels/recomputed.py)."""
    numbers = 2 * z.hidden + 2 * z.queries + 2 * z.keys + 2 * z.inner
    if (
        z.queries // model.outline.config.num_attention_heads % 16
    ):  # attention that is not compiled: what it saw, in two layouts
        numbers += z.queries
    if model.adapter is not None:
        rank, dora = model.adapter.rank, model.adapter.dora  # DoRA keeps both products, whose sum it scales
        numbers += sum(rank + dora * 2 * gives for _, gives in model.adapted.values()) // z.layers
    return numbers * model.size


def _kept_by_autograd(model: Model, layers: int, tokens: int = 16) -> int:
    """Bytes for each token and layer that PyTorch keeps of a training pass, counted on the meta device; 0 where that cannot be."""
    seen: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    try:
        with torch.device("meta"):
            hollow = type(model.outline)(model.outline.config).to(model.dtype).eval()
            if model.adapter is not None:
                _adapt(hollow, model)
            weights = {p.untyped_storage()._cdata for p in hollow.parameters()}
            inner = backbone(hollow)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = inner(input_ids=torch.ones(1, tokens, dtype=torch.long))
        return sum(n for key, n in seen.items() if key not in weights) // (tokens * layers) if out is not None else 0
    except Exception:  # a model that does more than read ids: it is planned by its size
        return 0


def _adapt(hollow: Any, model: Model) -> None:
    """Put the adapter into an outline, the base frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    assert model.adapter is not None
    hollow.requires_grad_(False)
    settings = LoraConfig(r=model.adapter.rank, target_modules=list(model.adapted), use_dora=model.adapter.dora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matrices that lie the other way round
        inject_adapter_in_model(settings, hollow, low_cpu_mem_usage=True)


def head(model: Model, device: torch.device) -> Callable[[int], int]:
    """Bytes of the output projection's passes, as a function of the tokens of a micro-batch: the matrix as the products read it and its
    gradient, and slices of the logits."""
    z, trains = Sizes.of(model.outline), model.adapter is None
    matrix = z.vocabulary * z.hidden
    if device.type == "cuda":  # the gradient is summed in float32, and rounded once
        gradient = trains * matrix * (4 + model.narrow * model.size)
        slices = 4 + model.narrow * model.size
        return lambda tokens: (
            gradient + slices * min(max(CUDA_CHUNK, z.hidden // 4 * z.vocabulary), tokens * z.vocabulary)
        )
    if model.size == 2 and native_bfloat16(device) and z.hidden % PANEL == 0:
        # packed and its gradient; logits kept for the backward pass; a slice of the vocabulary
        fixed = matrix * 2 * (1 + trains) + 32 * 2**20
        return lambda tokens: fixed + min(KEPT, tokens * z.vocabulary * 2)
    fixed = matrix * (4 * model.narrow + trains * (4 + model.narrow * model.size))
    return lambda tokens: fixed + 2 * 4 * min(CHUNK_ELEMENTS, tokens * z.vocabulary)


def packed_for_decoding(model: Model) -> int:
    """Bytes of the copy of all matrices, and of the adapters beside them, that compiled decoding on a CPU reads; 0 where it is not compiled."""
    if type(model.outline).__name__ not in decode.KINDS:
        return 0
    z = Sizes.of(model.outline)
    numbers = sum(n * m for n, m in model.linears.values()) + z.vocabulary * z.hidden
    return (numbers + (0 if model.adapter is None else model.trained)) * model.size


def pass_width(model: Model) -> int:
    """Bytes for each token of a pass without gradient: what one layer holds."""
    z = Sizes.of(model.outline)
    return (2 * z.hidden + 2 * z.queries + 2 * z.keys + 3 * z.inner) * model.size


def reward_models(use: str, device: torch.device, elsewhere: bool = False) -> list[tuple[Model, int]]:
    """The models behind a recipe's rewards (`model:FOLDER`, `steps:model=FOLDER`), each with the tokens of its passes. Raises ModelError for one that is
    not there."""
    found = []
    for spec in (parse_spec(text, "sppo.rewards") for _, _, text in parse_mixture(use)):
        named = spec.options.get("model") or (spec.words[0] if spec.name == "model" and spec.words else None)
        if spec.name in ("model", "steps") and named:
            hollow = outline(str(named), role="reward model", head=False)
            asked = str(spec.options.get("dtype", "auto"))
            dtype, _ = choose_dtype(asked, parameter_count(hollow), device, elsewhere=elsewhere)
            found.append((Model(hollow, dtype), int(spec.options.get("tokens", REWARD_TOKENS))))
    return found
