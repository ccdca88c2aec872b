"""The memory that a run needs, by arithmetic before it starts, and `training.micro_tokens`, chosen by it.

Phases follow each other, and each frees what it took: the need is what stays all the time plus the largest phase. Response lengths are
unknown beforehand: every response counts at its limit, every prompt at the mean length of some. Weights may be on the meta device.

    stays     the process, weights, float32 masters, the optimiser's moments, the reference, the critic with its own, an engine's copy
    sampling  weights packed for the compiled decoder, keys and values, logits, a pass over prompts
    update    gradients, their float32 sums where there are several micro-batches, one micro-batch's activations, the head
    step      gradients, and the same in float32

Left out: what other processes take (jails, verifiers).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ..errors import ModelError
from ..kernels.cpu import decode
from ..kernels.cpu.head import KEPT, PANEL
from ..kernels.elementwise import compiles
from ..kernels.logprobs import CHUNK_ELEMENTS
from ..kernels.patch_layers import fusable_family
from ..memory import free_memory
from ..models.loading import native_bfloat16
from ..models.weights import parameter_count
from ..recipe.config import Config
from ..recipe.sections import MICRO_TOKENS
from ..rollout.scheduler import PREFILL
from ..spec import parse_spec
from ..tasks.base import TaskSource
from ..types import Task

GIB = 2**30
ACTIVATIONS = GIB
"""Bytes of activations beyond which a larger micro-batch makes no CPU faster (docs/performance.md)."""
LEAST = 256
"""The smallest micro-batch that is chosen, in tokens."""
PROCESS = 600 * 2**20
"""Python, PyTorch, transformers and datasets by themselves, with the workspace of matrix products, about."""
FRAGMENTS = 1.15
"""Bytes of a CPU's heap per byte that a micro-batch holds: tensors of changing sizes leave holes."""
MALLOC = 2 * GIB
"""The most that malloc keeps (memory.py)."""
PROCESS_CUDA = 600 * 2**20
"""What a CUDA context takes of a GPU."""


@dataclass(frozen=True)
class Model:
    """A model as the plan reads it; its weights may be on the meta device."""

    model: Any
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        """Weights; tied ones once."""
        return parameter_count(self.model)

    @property
    def trained(self) -> int:
        """Weights with a gradient."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def size(self) -> int:
        """Bytes per number."""
        return self.dtype.itemsize

    def moments(self, kind: str) -> int:
        """Bytes of an optimiser's moments and of the float32 masters that it keeps for narrower weights."""
        return self.trained * ((2 if "8bit" in kind else 8) + (0 if self.size >= 4 else 4))


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
class Plan:
    """Bytes by purpose: what stays, and the phases, one after the other."""

    stays: dict[str, int]
    phases: dict[str, dict[str, int]]
    micro_tokens: int
    capacity: int
    """What the run may take: what is free here with what this process has already, or `run.memory`."""
    kept: int = 0
    """What malloc keeps of a CPU's freed memory where there is plenty."""
    roomy = 2.5
    """Memory is plenty from this multiple of the need on."""

    @property
    def largest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.stays.values()) + sum(self.phases[self.largest].values())

    @property
    def fits(self) -> bool:
        """Whether the peak is below what there is."""
        return self.total < self.capacity

    @property
    def tight(self) -> bool:
        """Whether freed memory should go back at once: it is kept, and found again without page faults, where there is plenty."""
        return self.roomy * self.total > self.capacity

    def parts(self) -> dict[str, int]:
        """All that is held at the peak, and the total; with the freed memory that malloc keeps, where there is plenty."""
        kept = {} if self.tight else {"freed memory that is kept": self.kept}
        return {**self.stays, **self.phases[self.largest], **kept, "total": self.total + sum(kept.values())}

    def stated(self) -> str:
        """A sentence for the start of a run; a warning where it does not fit."""
        need, has = f"{self.total / GIB:.1f} GiB", f"{self.capacity / GIB:.1f} GiB"
        if self.fits:
            return f"micro-batches of {self.micro_tokens:,} tokens; about {need} of memory needed, {has} can be had"
        parts = {name: size for name, size in self.parts().items() if name not in ("total", "the process")}
        most = max(parts, key=parts.__getitem__)
        return (
            f"warning: this run needs about {need} of memory and {has} can be had: it may be killed. The most goes into {most} "
            f"({parts[most] / GIB:.1f} GiB); see what to turn in docs/performance.md, or sppo doctor"
        )


def plan(config: Config, policy: Model, critic: Model | None, device: torch.device, prompt_tokens: int) -> Plan:
    """The plan of a recipe for models and a typical prompt's length.

    Where the recipe leaves `training.micro_tokens` open it is chosen: a power of two, as large as memory has room for; on a CPU it takes an eighth of what
    is left, and `ACTIVATIONS` at most.
    """
    t, r = config.training, config.rollout
    gpu = device.type == "cuda"
    stays = {
        "the process": PROCESS_CUDA if gpu else PROCESS,
        "weights": policy.parameters * policy.size,
        "optimiser": policy.moments(t.optimizer),
        "reference": policy.parameters * policy.size if config.needs_reference else 0,
    }
    if policy.size == 2 and not gpu:
        stays["head in float32"] = (sizes := Sizes.of(policy.model)).vocabulary * sizes.hidden * 4
    if critic is not None:
        stays["critic and its optimiser"] = critic.parameters * critic.size + critic.moments("adamw")
    longest = prompt_tokens + r.max_tokens
    sampling, engine = _sampling(config, policy, device, prompt_tokens)
    stays |= engine
    capacity = _capacity(config, device)
    gradients = {"gradients": policy.trained * policy.size}
    fixed = sum(stays.values()) + gradients["gradients"]
    rows = -(-r.prompts * r.samples // t.minibatches)
    wide = policy.trained * 4 if policy.size < 4 else 0  # gradients of several micro-batches add up in float32
    each, head = activations(policy, device, t.checkpoint_activations), _head(policy, device)
    chosen = t.micro_tokens
    if chosen is None:
        room = capacity - fixed - wide - head(LEAST)
        chosen = power_of_two((0.8 * room if gpu else min(room / 8, ACTIVATIONS)) / each)
    tokens = min(max(chosen, longest), rows * longest)
    phases = {
        "sampling": sampling,
        "update": {
            **gradients,
            "gradients in float32": wide if tokens < rows * longest or config.search is not None else 0,
            "one micro-batch": int(tokens * each * (1 if gpu else FRAGMENTS)),
            "head": head(tokens),
        },
        "optimiser step": {**gradients, "gradients in float32": wide},
    }
    if critic is not None:
        length = longest if config.critic_reads == "tokens" else prompt_tokens
        read = min(max(chosen, length), rows * length)
        several = critic.size < 4 and read < rows * length
        phases["critic"] = {
            "gradients of the critic": critic.trained * (critic.size + 4 * several),
            "one micro-batch of the critic": read * activations(critic, device, False),
        }
    kept = 0 if gpu else min(MALLOC, phases["update"]["one micro-batch"])
    return Plan(stays, phases, chosen, capacity, kept)


def power_of_two(tokens: float) -> int:
    """The largest power of two up to `tokens`, between `LEAST` and `MICRO_TOKENS`."""
    return 2 ** int(math.log2(min(max(tokens, LEAST), MICRO_TOKENS)))


def typical_prompt(tasks: TaskSource, length: Callable[[Task], int], limit: int, looked_at: int = 64) -> int:
    """The mean length in tokens of the first prompts that are no longer than the limit; `length` counts one, or raises ModelError."""
    found = []
    for i in range(min(looked_at, len(tasks))):
        with contextlib.suppress(ModelError):  # a prompt that the chat template refuses is left out of the run too
            found.append(length(tasks[i]))
    found = [n for n in found if n <= limit]
    return math.ceil(sum(found) / len(found)) if found else limit


def activations(model: Model, device: torch.device, checkpointing: bool) -> int:
    """Bytes that a training pass keeps for each token, with what its backward pass holds of one layer beside them."""
    z = Sizes.of(model.model)
    if fusable_family(model.model) and compiles(device.type, model.dtype):
        # of a layer: what each norm reads and gives, queries and what they saw, keys and values, the gate, what it lets through, their product
        layer = (4 * z.hidden + 2 * z.queries + 2 * z.keys + 3 * z.inner) * model.size
    else:
        layer = _kept_by_autograd(model, z.layers) or 24 * z.hidden * model.size
    backward = (3 * z.inner + 4 * z.hidden) * model.size
    return z.layers * z.hidden * model.size + layer + backward if checkpointing else z.layers * layer + backward


def _kept_by_autograd(model: Model, layers: int, tokens: int = 16) -> int:
    """Bytes for each token and layer that PyTorch keeps of a training pass, counted on the meta device; 0 where that cannot be."""
    seen: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    try:
        with torch.device("meta"):
            hollow = type(model.model)(model.model.config).to(model.dtype).eval()
            weights = {p.untyped_storage()._cdata for p in hollow.parameters()}
            inner = hollow.base_model if hasattr(hollow, "base_model") else hollow
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = inner(input_ids=torch.ones(1, tokens, dtype=torch.long))
        return sum(n for key, n in seen.items() if key not in weights) // (tokens * layers) if out is not None else 0
    except Exception:  # a model that does more than read ids: it is planned by its size
        return 0


def _head(model: Model, device: torch.device) -> Any:
    """Bytes of the output projection's passes, as a function of the tokens of a micro-batch."""
    z = Sizes.of(model.model)
    matrix = z.vocabulary * z.hidden
    if device.type == "cpu" and model.size == 2 and native_bfloat16(device) and z.hidden % PANEL == 0:
        # packed and its gradient; logits kept for the backward pass; a slice of the vocabulary
        return lambda tokens: 2 * matrix * 2 + min(KEPT, tokens * z.vocabulary * 2) + 32 * 2**20
    return lambda tokens: matrix * 4 + 2 * 4 * min(CHUNK_ELEMENTS, tokens * z.vocabulary)


def _sampling(
    config: Config, policy: Model, device: torch.device, prompt_tokens: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes during sampling, and bytes that an engine of its own holds all the time."""
    r, e = config.rollout, config.evaluation
    spec = parse_spec(r.engine)
    if spec.name == "vllm":
        given = spec.options.get("memory")
        share = given if isinstance(given, float) else 0.4
        if device.type == "cuda":
            return {}, {
                "vLLM: weights, keys and values": int(share * torch.cuda.get_device_properties(device).total_memory)
            }
        own = max(1, round(10 * share)) * GIB
        return {}, {"vLLM's weights": policy.parameters * policy.size, "vLLM's keys and values": own}
    z = Sizes.of(policy.model)
    responses = r.prompts * r.samples
    sequences = min(r.batch, max(responses, e.n * e.samples))
    # a CPU's memory is taken as it is written
    prompt = config.task.max_prompt_tokens if device.type == "cuda" else prompt_tokens
    a_token = 2 * z.layers * z.keys * policy.size
    pass_width = 2 * z.hidden + 2 * z.queries + 2 * z.keys + 3 * z.inner
    compiled = device.type == "cpu" and type(policy.model).__name__ in decode.KINDS
    return {
        "weights packed for decoding": policy.parameters * policy.size if compiled else 0,
        "keys and values": sequences * (prompt + r.max_tokens) * a_token,
        "logits": 4 * sequences * z.vocabulary * 4,
        "a pass over prompts": PREFILL * pass_width * policy.size,
    }, {}  # fmt: skip


def _capacity(config: Config, device: torch.device) -> int:
    if config.run.memory is not None:
        return int(config.run.memory * GIB)
    if device.type == "cuda":
        return free_memory(device) + torch.cuda.memory_allocated(device) + PROCESS_CUDA
    return free_memory(device) + int(psutil.Process().memory_info().rss)
