"""The memory that a run needs, by arithmetic before it starts, and `training.micro_tokens`, chosen by it.

Phases follow each other, and each frees what it took: the need is what stays all the time plus the largest phase. Response lengths are
unknown beforehand: every response counts at its limit, every prompt at the mean length of some. Weights may be on the meta device.

    stays     the process, weights (quantised ones packed), an adapter, float32 masters, the optimiser's moments, the reference (none under an
              adapter: it is switched off), the critic with its own (only an adapter where it is the policy's), a reward model, an engine's copy
    sampling  weights packed for the compiled decoder, keys and values, logits, a pass over prompts
    judging   the reward model's pass
    update    gradients, their float32 sums where there are several micro-batches, one micro-batch's activations, the head
    step      gradients, and the same in float32

With `training.offload` masters and moments are the host's (`Plan.host`). Left out: what other processes take (jails, verifiers).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch

from ..errors import ModelError
from ..memory import free_memory
from ..recipe.config import Config
from ..recipe.sections import MICRO_TOKENS
from ..rollout.scheduler import PREFILL
from ..spec import parse_spec
from ..tasks.base import TaskSource
from ..types import Task
from .footprint import Model, Sizes, activations, head, packed_for_decoding, reward_bytes

GIB = 2**30
ACTIVATIONS = GIB
"""Bytes of activations beyond which a larger micro-batch makes no CPU faster (docs/performance.md)."""
LEAST = 256
"""The smallest micro-batch that is chosen, in tokens."""
PROCESS = 480 * 2**20
"""Python, PyTorch, transformers and datasets by themselves, with the workspace of matrix products, about."""
FRAGMENTS = 1.15
"""Bytes of a CPU's heap per byte that a micro-batch holds: tensors of changing sizes leave holes."""
MALLOC = 2 * GIB
"""The most that malloc keeps (memory.py)."""
PROCESS_CUDA = 600 * 2**20
"""What a CUDA context takes of a GPU."""
TURN = {
    "weights": 'quantise the base (policy.quantize = "nf4" under [adapter])',
    "weights packed for decoding": 'train an [adapter] on a smaller model, or sample with rollout.engine = "vllm"',
    "optimiser": 'set training.optimizer = "adamw-8bit", or train an [adapter]',
    "reference": "train an [adapter], whose reference is its own base",
    "critic and its optimiser": 'take a smaller critic, or critic.model = "policy" under [adapter]',
    "keys and values": "lower rollout.batch",
    "logits": "lower rollout.batch",
    "gradients": "train an [adapter] instead of all weights",
    "gradients in float32": "train an [adapter] instead of all weights",
    "one micro-batch": "lower training.micro_tokens, or set training.checkpoint_activations = true",
    "vLLM": "give vLLM less (rollout.engine = 'vllm:memory=0.3')",
    "the reward model": "take a smaller reward model",
}
"""What to turn where most of the memory goes into a part, by the beginning of its name."""


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
    host: dict[str, int] = field(default_factory=dict)
    """What lies in the host's memory instead of the GPU's."""
    on_gpu: bool = False
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

    @property
    def most(self) -> tuple[str, int]:
        """The largest part of the peak, and its bytes; the process aside."""
        parts = {name: size for name, size in self.parts().items() if name not in ("total", "the process")}
        return max(parts.items(), key=lambda part: part[1])

    def advice(self) -> str:
        """Where most of the memory goes, and what to turn."""
        name, size = self.most
        turn = next((what for part, what in TURN.items() if name.startswith(part)), TURN["one micro-batch"])
        return f"the most goes into {name} ({said(size)}): {turn}"

    def stated(self) -> str:
        """A sentence for the start of a run; a warning where it does not fit."""
        need, has = said(self.total), said(self.capacity)
        beside = f", and {said(sum(self.host.values()))} of the host's" if self.host else ""
        if self.fits:
            return f"micro-batches of {self.micro_tokens:,} tokens; about {need} of memory needed{beside}, {has} can be had"
        return (
            f"warning: this run needs about {need} of memory{beside} and {has} can be had: it may be killed; {self.advice()} "
            "(sppo doctor lists the cheapest changes)"
        )


def plan(
    config: Config,
    policy: Model,
    critic: Model | None,
    device: torch.device,
    prompt_tokens: int,
    gpu: int | None = None,
) -> Plan:
    """The plan of a recipe for models and a typical prompt's length; with `gpu`, for a GPU of so many bytes that need not be here.

    Where the recipe leaves `training.micro_tokens` open it is chosen: a power of two, as large as memory has room for; on a CPU it takes an eighth of what
    is left, and `ACTIVATIONS` at most.
    """
    t, r = config.training, config.rollout
    on_gpu = device.type == "cuda"
    sampling, engine = _sampling(config, policy, device, prompt_tokens, gpu)
    stays = _stays(config, policy, critic, device, gpu) | engine
    host = {}
    if on_gpu and getattr(t, "offload", False):
        host = {"masters and moments": stays.pop("optimiser")}
    longest = prompt_tokens + r.max_tokens
    rows = -(-r.prompts * r.samples // t.minibatches)
    gradients = {"gradients": policy.trained * policy.size}
    wide = policy.trained * 4 if policy.narrow else 0  # gradients of several micro-batches add up in float32
    each, output = activations(policy, device, t.checkpoint_activations, gpu is not None), head(policy, device)
    capacity = _capacity(config, device, gpu)
    chosen = t.micro_tokens
    if chosen is None:
        room = capacity - sum(stays.values()) - gradients["gradients"] - wide - output(LEAST)
        chosen = power_of_two((0.8 * room if on_gpu else min(room / 8, ACTIVATIONS)) / each)
    tokens = min(max(chosen, longest), rows * longest)

    def micro_batch(tokens: int, share: float, wide: int) -> dict[str, int]:
        held = {"gradients": int(share * gradients["gradients"]), "gradients in float32": wide}
        return held | {"one micro-batch": int(tokens * each * (1 if on_gpu else FRAGMENTS)), "head": output(tokens)}

    # the gradients of the first micro-batch come as its activations go; they stay beside those of the next
    following = min(tokens, rows * longest - tokens) if config.search is None else tokens
    updates = [micro_batch(tokens, 0.5, 0), micro_batch(following, 1.0, wide)]
    phases = {
        "sampling": sampling,
        "update": max(updates[: 1 + (following > 0)], key=lambda parts: sum(parts.values())),
        "optimiser step": {**gradients, "gradients in float32": wide},
    }
    if critic is not None:
        phases["critic"] = _teaching(config, critic, device, chosen, prompt_tokens, gpu)
    kept = 0 if on_gpu else min(MALLOC, phases["update"]["one micro-batch"])
    return Plan(stays, phases, chosen, capacity, kept, host, on_gpu)


def _stays(
    config: Config, policy: Model, critic: Model | None, device: torch.device, gpu: int | None
) -> dict[str, int]:
    """Bytes that are held from the first step to the last, but for an engine's own."""
    on_gpu = device.type == "cuda"
    stays = {"the process": PROCESS_CUDA if on_gpu else PROCESS, "weights": policy.base, "adapter": policy.beside}
    stays["optimiser"] = policy.optimiser(config.training.optimizer)
    if policy.narrow and not on_gpu:
        stays["head in float32"] = (sizes := Sizes.of(policy.outline)).vocabulary * sizes.hidden * 4
    if config.needs_reference and policy.adapter is None:
        stays["reference"] = policy.base
    if critic is not None:
        own = critic.beside if critic.shared else critic.base + critic.beside
        stays["critic and its optimiser"] = own + critic.optimiser("adamw")
    if rewards := reward_bytes(config.reward.use, device, gpu is not None):
        stays["the reward model"] = rewards
    return stays


def _teaching(
    config: Config, critic: Model, device: torch.device, micro_tokens: int, prompt_tokens: int, gpu: int | None
) -> dict[str, int]:
    """Bytes of the critic's own update."""
    t, r = config.training, config.rollout
    length = prompt_tokens + (r.max_tokens if config.critic_reads == "tokens" else 0)
    rows = -(-r.prompts * r.samples // t.minibatches)
    read = min(max(micro_tokens, length), rows * length)
    several = critic.narrow and read < rows * length
    each = activations(critic, device, critic.shared and t.checkpoint_activations, gpu is not None)
    return {
        "gradients of the critic": critic.trained * (critic.size + 4 * several),
        "one micro-batch of the critic": read * each,
    }


def said(size: int) -> str:
    """Bytes as people say them: 3.4 GiB, 120 MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


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


def _sampling(
    config: Config, policy: Model, device: torch.device, prompt_tokens: int, gpu: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes during sampling, and bytes that an engine of its own holds all the time."""
    r, e = config.rollout, config.evaluation
    spec = parse_spec(r.engine)
    if spec.name == "vllm":
        given = spec.options.get("memory")
        share = given if isinstance(given, float) else 0.4
        if device.type == "cuda":
            whole = gpu or torch.cuda.get_device_properties(device).total_memory
            return {}, {"vLLM: weights, keys and values": int(share * whole)}
        own = max(1, round(10 * share)) * GIB
        return {}, {"vLLM's weights": policy.base, "vLLM's keys and values": own}
    z = Sizes.of(policy.outline)
    responses = r.prompts * r.samples
    sequences = min(r.batch, max(responses, e.n * e.samples))
    # a CPU's memory is taken as it is written
    prompt = config.task.max_prompt_tokens if device.type == "cuda" else prompt_tokens
    a_token = 2 * z.layers * z.keys * policy.size
    pass_width = 2 * z.hidden + 2 * z.queries + 2 * z.keys + 3 * z.inner
    read = min(PREFILL, sequences * prompt)
    return {
        "weights packed for decoding": packed_for_decoding(policy) if device.type == "cpu" else 0,
        "keys and values": sequences * (prompt + r.max_tokens) * a_token,
        "logits": 4 * sequences * z.vocabulary * 4,
        "a pass over prompts": read * pass_width * policy.size,
    }, {}


def _capacity(config: Config, device: torch.device, gpu: int | None) -> int:
    if config.run.memory is not None:
        return int(config.run.memory * GIB)
    if gpu is not None:
        return gpu
    if device.type == "cuda":
        return free_memory(device) + torch.cuda.memory_allocated(device) + PROCESS_CUDA
    return free_memory(device) + int(psutil.Process().memory_info().rss)
