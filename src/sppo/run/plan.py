"""The memory that a run needs, by arithmetic before it starts, and `training.micro_tokens`, chosen by it.

Phases follow each other, and each frees what it took: the need is what stays all the time plus the largest phase. Response lengths are
unknown beforehand: every response counts at its limit, every prompt at the mean length of some. Weights may be on the meta device.

    stays     the process, weights (quantised ones packed), an adapter, float32 masters, the optimiser's moments, the reference (none under an
              adapter: it is switched off), the critic with its own (only an adapter where it is the policy's), a reward model, an engine's copy
    loading   a checkpoint's file and its copy in another dtype (on a CPU)
    sampling  weights packed for the compiled decoder, keys and values, logits, a pass over prompts
    judging   the reward model's pass
    update    gradients, their float32 sums where there are several micro-batches, one micro-batch's activations, the head
    step      gradients, and the same in float32

With `training.offload` masters, moments and sums of gradients are the host's (`Plan.host`). Left out: what other processes take (jails, verifiers).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

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
from .footprint import Model, Sizes, activations, head, packed_for_decoding, pass_width, reward_models

GIB = 2**30
ACTIVATIONS = GIB
"""Bytes of activations beyond which a larger micro-batch makes no CPU faster (docs/performance.md)."""
LEAST = 256
"""The smallest micro-batch that is chosen, in tokens."""
PROCESS = 470 * 2**20
"""Python, PyTorch, transformers and datasets by themselves, with the workspace of matrix products, about."""
PEFT = 60 * 2**20
"""peft and bitsandbytes, with what they import."""
FRAGMENTS = 1.15
"""Bytes of a CPU's heap per byte that a micro-batch holds: tensors of changing sizes leave holes."""
HOLES = 0.25
"""Of quantised matrices, unpacked one after the other: the share that stays as holes between what is kept of a CPU's heap; measured."""
MALLOC = 2 * GIB
"""The most that malloc keeps (memory.py)."""
PROCESS_CUDA = 600 * 2**20
"""What a CUDA context takes of a GPU."""
TURN = {
    "weights": 'quantise the base (policy.quantize = "nf4" under [adapter]), or take a smaller model',
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
        turn = TURN[max((part for part in TURN if name.startswith(part)), key=len, default="one micro-batch")]
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
    return _Sum(config, policy, critic, device, prompt_tokens, gpu).plan()


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


@dataclass(frozen=True)
class _Sum:
    """What `plan` adds up, part by part, in bytes."""

    config: Config
    policy: Model
    critic: Model | None
    device: torch.device
    prompt: int
    """Tokens of a typical prompt."""
    gpu: int | None

    def plan(self) -> Plan:
        """All of it."""
        config, policy = self.config, self.policy
        sampling, engine = self._sampling()
        stays = self._stays() | engine
        each = activations(policy, self.device, config.training.checkpoint_activations, self.gpu is not None)
        capacity = self._capacity()
        chosen = config.training.micro_tokens
        if chosen is None:
            room = capacity - sum(stays.values()) - sum(self._gradients(policy)) - head(policy, self.device)(LEAST)
            chosen = power_of_two((0.8 * room if self.on_gpu else min(room / 8, ACTIVATIONS)) / each)
        own, wide = self._gradients(policy)
        update = self._update(chosen, each)
        step = {"gradients": own, "gradients in float32": wide}
        loading = self._loading(sum(stays.values()) - stays["the process"])
        phases = {
            "loading": loading,
            "sampling": sampling,
            "judging": self._judging(),
            "update": update,
            "optimiser step": step,
        }
        if self.critic is not None:
            phases["critic"] = self._teaching(self.critic, chosen)
        kept = 0 if self.on_gpu else min(MALLOC, update["one micro-batch"])
        phases = {name: parts for name, parts in phases.items() if any(parts.values())}
        return Plan(stays, phases, chosen, capacity, kept, self._host(), self.on_gpu)

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU's memory that counts."""
        return self.device.type == "cuda"

    @property
    def offload(self) -> bool:
        """Whether masters, moments and sums of gradients are the host's."""
        return self.on_gpu and self.config.training.offload

    @property
    def longest(self) -> int:
        """Tokens of a row, its response at the limit."""
        return self.prompt + self.config.rollout.max_tokens

    @property
    def rows(self) -> int:
        """Responses of a minibatch."""
        r = self.config.rollout
        return -(-r.prompts * r.samples // self.config.training.minibatches)

    def _stays(self) -> dict[str, int]:
        """What is held from the first step to the last, but for an engine's own."""
        config, policy, critic = self.config, self.policy, self.critic
        stays = {
            "the process": PROCESS_CUDA if self.on_gpu else PROCESS + (PEFT if policy.adapter else 0),
            "weights": policy.base + (0 if self.on_gpu else policy.towers),
            "adapter": policy.beside,
        }
        if not self.offload:
            stays["optimiser"] = policy.optimiser(config.training.optimizer)
        if policy.narrow and not self.on_gpu:
            stays["head in float32"] = (sizes := Sizes.of(policy.outline)).vocabulary * sizes.hidden * 4
        if config.needs_reference and policy.adapter is None:
            stays["reference"] = policy.base
        if critic is not None:
            own = critic.beside if critic.shared else critic.base + critic.beside
            stays["critic and its optimiser"] = own + (0 if self.offload else critic.optimiser("adamw"))
        if rewards := sum(model.base for model, _ in self._rewards):
            stays["the reward model"] = rewards
        return stays

    def _loading(self, stays: int) -> dict[str, int]:
        """Weights as they are read, beyond what later stays: a file that is mapped, and its copy in another dtype or quantised."""
        policy = self.policy
        saved = getattr(policy.outline.config, "dtype", None)
        if self.on_gpu or not isinstance(saved, torch.dtype):
            return {}
        copied = policy.parameters * policy.size if saved != policy.dtype else policy.base if policy.quantize else 0
        return {"weights as they are read": max(0, policy.parameters * saved.itemsize + copied - stays)}

    def _host(self) -> dict[str, int]:
        """What lies in main memory instead of the GPU's: towers, and of an offloaded optimiser a float32 master of every weight, its moments and
        the sum of its gradients."""
        host = {"towers": self.policy.towers} if self.on_gpu and self.policy.towers else {}
        if self.offload:
            trained = self.policy.trained + (0 if self.critic is None else self.critic.trained)
            moments = self.policy.moments(self.config.training.optimizer)
            moments += 0 if self.critic is None else self.critic.moments("adamw")
            host |= {"masters and moments": 4 * trained + moments, "sums of gradients": 4 * trained}
        return host

    def _gradients(self, model: Model) -> tuple[int, int]:
        """Gradients in a model's dtype, and their float32 sums, which narrow ones of several micro-batches go to; offloaded ones leave the GPU one
        by one."""
        if self.offload:
            return model.largest * model.size, 0
        return model.trained * model.size, model.trained * 4 if model.narrow else 0

    def _update(self, micro_tokens: int, each: int) -> dict[str, int]:
        """A micro-batch and the gradients beside it. Those of the first one come as its activations go: half of them, on average, are there
        at its peak. Beside the next ones are all."""
        (own, wide), output = self._gradients(self.policy), head(self.policy, self.device)
        unpacked, every = self.policy.unpacked
        whole = self.rows * self.longest
        tokens = min(max(micro_tokens, self.longest), whole)
        following = tokens if self.config.search is not None else min(tokens, whole - tokens)

        def micro_batch(tokens: int, own: int, wide: int) -> dict[str, int]:
            kept = (
                tokens * each + unpacked if self.on_gpu else int(tokens * each * FRAGMENTS + unpacked + HOLES * every)
            )
            return {"gradients": own, "gradients in float32": wide, "one micro-batch": kept, "head": output(tokens)}

        first = micro_batch(tokens, own if self.offload else own // 2, 0)
        return max(
            first, micro_batch(following, own, wide) if following else first, key=lambda parts: sum(parts.values())
        )

    def _teaching(self, critic: Model, micro_tokens: int) -> dict[str, int]:
        """The critic's own update."""
        length = self.longest if self.config.critic_reads == "tokens" else self.prompt
        tokens = min(max(micro_tokens, length), self.rows * length)
        own, wide = self._gradients(critic)
        again = critic.shared and self.config.training.checkpoint_activations
        return {
            "gradients of the critic": own + (wide if tokens < self.rows * length else 0),
            "one micro-batch of the critic": tokens * activations(critic, self.device, again, self.gpu is not None),
        }

    @cached_property
    def _rewards(self) -> list[tuple[Model, int]]:
        return reward_models(self.config.reward.use, self.device, self.gpu is not None)

    def _judging(self) -> dict[str, int]:
        """The passes of reward models over responses."""
        r = self.config.rollout
        whole = r.prompts * r.samples * self.longest
        return {"a pass of the reward model": max((min(n, whole) * pass_width(m) for m, n in self._rewards), default=0)}

    def _sampling(self) -> tuple[dict[str, int], dict[str, int]]:
        """Sampling, and what an engine of its own holds all the time."""
        r, e, policy = self.config.rollout, self.config.evaluation, self.policy
        spec = parse_spec(r.engine)
        if spec.name == "served":  # elsewhere
            return {}, {}
        if spec.name == "vllm":
            given = spec.options.get("memory")
            share = given if isinstance(given, float) else 0.4
            if self.on_gpu:
                whole = self.gpu or torch.cuda.get_device_properties(self.device).total_memory
                return {}, {"vLLM: weights, keys and values": int(share * whole)}
            own = max(1, round(10 * share)) * GIB
            return {}, {"vLLM's weights": policy.base, "vLLM's keys and values": own}
        z = Sizes.of(policy.outline)
        sequences = min(r.batch, max(r.prompts * r.samples, e.n * e.samples))
        # a CPU's memory is taken as it is written
        prompt = self.config.task.max_prompt_tokens if self.on_gpu else self.prompt
        return {
            "weights packed for decoding": 0 if self.on_gpu else packed_for_decoding(policy),
            "keys and values": sequences * (prompt + r.max_tokens) * 2 * z.layers * z.keys * policy.size,
            "logits": 4 * sequences * z.vocabulary * 4,
            "a pass over prompts": min(PREFILL, sequences * prompt) * pass_width(policy),
        }, {}

    def _capacity(self) -> int:
        """What the run may take."""
        if self.config.run.memory is not None:
            return int(self.config.run.memory * GIB)
        if self.gpu is not None:
            return self.gpu
        if self.on_gpu:
            return free_memory(self.device) + torch.cuda.memory_allocated(self.device) + PROCESS_CUDA
        return free_memory(self.device) + int(psutil.Process().memory_info().rss)
