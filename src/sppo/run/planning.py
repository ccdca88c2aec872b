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

Of a cluster this is one learner rank: it samples and judges nothing, and what several ranks hold between them is divided (shares.py). A rollout
worker has a plan of its own (`plan_of_worker`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import psutil
import torch

from ..memory import free_memory
from ..recipe.config import Config
from ..recipe.sections import MICRO_TOKENS
from ..rollout.scheduler import PREFILL
from ..spec import parse_spec
from .footprint import Model, Sizes, activations, head, packed_for_decoding, pass_width, reward_models
from .plan import GIB, Plan
from .shares import Shares, shards_of

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
CHARACTERS = 4
"""Of a token of what an environment says, on average."""
PROCESS_CUDA = 600 * 2**20
"""What a CUDA context takes of a GPU."""


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


def plan_of_worker(
    config: Config, policy: Model, device: torch.device, prompt_tokens: int, gpu: int | None = None
) -> Plan:
    """The plan of a cluster's rollout worker, likewise."""
    return _Sum(config, policy, None, device, prompt_tokens, gpu).plan_of_worker()


def power_of_two(tokens: float) -> int:
    """The largest power of two up to `tokens`, between `LEAST` and `MICRO_TOKENS`."""
    return 2 ** int(math.log2(min(max(tokens, LEAST), MICRO_TOKENS)))


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
        alone, shares = config.cluster is None, self._shares(policy)
        sampling, engine = self._sampling() if alone else ({}, {})
        stays = self._stays() | engine
        each = activations(policy, self.device, config.training.checkpoint_activations, self.gpu is not None)
        capacity = self._capacity()
        chosen = config.training.micro_tokens
        if chosen is None:
            room = (
                capacity - sum(stays.values()) - sum(self._passing(policy).values()) - head(policy, self.device)(LEAST)
            )
            chosen = power_of_two((0.8 * room if self.on_gpu else min(room / 8, ACTIVATIONS)) / each)
        update = self._update(chosen, each)
        loading = self._loading(sum(stays.values()) - stays["the process"])
        phases = {
            "loading": loading,
            "sampling": sampling,
            "judging": self._judging() if alone else {},
            "update": update,
            "optimiser step": self._gradients(policy) if shares is None else shares.gradients_of_the_shard(),
        }
        if self.critic is not None:
            phases["critic"] = self._teaching(self.critic, chosen)
        kept = 0 if self.on_gpu else min(MALLOC, update["one micro-batch"])
        phases = {name: parts for name, parts in phases.items() if any(parts.values())}
        return Plan(
            stays, phases, chosen, capacity, kept, self._host(), self.on_gpu, "" if alone else "each learner rank"
        )

    def plan_of_worker(self) -> Plan:
        """What samples: weights, and an engine."""
        policy = self.policy
        sampling, engine = self._sampling()
        stays = {
            "the process": PROCESS_CUDA if self.on_gpu else PROCESS + (PEFT if policy.adapter else 0),
            "weights": policy.base + policy.beside + (0 if self.on_gpu else policy.towers),
        }
        phases = {"loading": self._loading(sum(stays.values()) - stays["the process"]), "sampling": sampling}
        return Plan(stays | engine, phases, 0, self._capacity(), 0, {}, self.on_gpu, "each rollout worker")

    def _shares(self, model: Model) -> Shares | None:
        """Of a model whose weights several ranks hold between them."""
        shards, section = shards_of(self.config, self.policy), self.config.cluster
        if shards == 1 or model.quantize or section is None:
            return None
        return Shares(model, shards, section.gather, self.offload)

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
        """Tokens of a row, its response at the limit, and what an environment may say in between."""
        written = self.prompt + self.config.rollout.max_tokens
        section = self.config.environment
        if not section.answers:
            return written
        return section.tokens or written + (section.turns - 1) * section.output // CHARACTERS

    @property
    def rows(self) -> int:
        """Responses of a minibatch, of a rank's part of it."""
        r, section = self.config.rollout, self.config.cluster
        ranks = 1 if section is None else section.learners
        return -(-r.prompts * r.samples // (self.config.training.minibatches * ranks))

    def _stays(self) -> dict[str, int]:
        """What is held from the first step to the last, but for an engine's own."""
        config, policy, critic = self.config, self.policy, self.critic
        towers = 0 if self.on_gpu else policy.towers
        stays = {"the process": PROCESS_CUDA if self.on_gpu else PROCESS + (PEFT if policy.adapter else 0)}
        if (shares := self._shares(policy)) is not None:
            stays |= shares.at_rest(config.training.optimizer) | {"towers": towers}
        else:
            stays |= {"weights": policy.base + towers, "adapter": policy.beside}
            stays["optimiser"] = 0 if self.offload else policy.optimiser(config.training.optimizer)
        if policy.narrow and not self.on_gpu:
            stays["head in float32"] = (sizes := Sizes.of(policy.outline)).vocabulary * sizes.hidden * 4
        if config.needs_reference and policy.adapter is None:
            stays["reference"] = policy.base // (1 if shares is None else shares.shards)
        if critic is not None and not critic.shared and (held := self._shares(critic)) is not None:
            stays["critic and its optimiser"] = sum(held.at_rest("adamw").values())
        elif critic is not None:
            own = critic.beside if critic.shared else critic.base + critic.beside
            stays["critic and its optimiser"] = own + (0 if self.offload else critic.optimiser("adamw"))
        if config.cluster is None and (rewards := sum(model.base for model, _ in self._rewards)):
            stays["the reward model"] = rewards
        return stays

    def _loading(self, stays: int) -> dict[str, int]:
        """Weights as they are read, beyond what later stays: a file that is mapped, and its copy in another dtype or quantised."""
        policy = self.policy
        saved = getattr(policy.outline.config, "dtype", None)
        if self._shares(policy) is not None:
            return {"weights before they are divided": max(0, policy.base - stays)}
        if self.on_gpu or not isinstance(saved, torch.dtype):
            return {}
        copied = policy.parameters * policy.size if saved != policy.dtype else policy.base if policy.quantize else 0
        return {"weights as they are read": max(0, policy.parameters * saved.itemsize + copied - stays)}

    def _host(self) -> dict[str, int]:
        """What lies in main memory instead of the GPU's: towers, and of an offloaded optimiser a float32 master of every weight, its moments and
        the sum of its gradients."""
        host = {"towers": self.policy.towers} if self.on_gpu and self.policy.towers else {}
        if self.offload:
            state = sums = 0
            for model, kind in ((self.policy, self.config.training.optimizer), (self.critic, "adamw")):
                if model is not None:
                    shares = (
                        None if model.adapter is not None else self._shares(model)
                    )  # adapters are whole on every rank
                    parts = 1 if shares is None else shares.shards
                    state += (4 * model.trained + model.moments(kind)) // parts
                    sums += 4 * model.trained // parts
            host |= {"masters and moments": state, "sums of gradients": sums}
        return host

    def _gradients(self, model: Model) -> dict[str, int]:
        """Gradients in a model's dtype, and their float32 sums, which narrow ones of several micro-batches go to; offloaded ones leave the GPU one
        by one."""
        if self.offload:
            return {"gradients": model.largest * model.size, "gradients in float32": 0}
        return {
            "gradients": model.trained * model.size,
            "gradients in float32": model.trained * 4 if model.narrow else 0,
        }

    def _passing(self, model: Model) -> dict[str, int]:
        """What is there in an update beside what stays and what its passes hold."""
        shares = self._shares(model)
        return self._gradients(model) if shares is None else shares.in_a_pass() | shares.gradients()

    def _update(self, micro_tokens: int, each: int) -> dict[str, int]:
        """A micro-batch and the gradients beside it. Those of the first one come as its activations go: half of them, on average, are there
        at its peak. Beside the next ones are all."""
        held, output = self._passing(self.policy), head(self.policy, self.device)
        unpacked, every = self.policy.unpacked
        whole = self.rows * self.longest
        tokens = min(max(micro_tokens, self.longest), whole)
        following = tokens if self.config.search is not None else min(tokens, whole - tokens)

        def micro_batch(tokens: int, held: dict[str, int]) -> dict[str, int]:
            kept = (
                tokens * each + unpacked if self.on_gpu else int(tokens * each * FRAGMENTS + unpacked + HOLES * every)
            )
            return {**held, "one micro-batch": kept, "head": output(tokens)}

        of_first = held
        if self._shares(self.policy) is None:
            own = held["gradients"]
            of_first = {"gradients": own if self.offload else own // 2, "gradients in float32": 0}
        first = micro_batch(tokens, of_first)
        return max(first, micro_batch(following, held) if following else first, key=lambda parts: sum(parts.values()))

    def _teaching(self, critic: Model, micro_tokens: int) -> dict[str, int]:
        """The critic's own update."""
        length = self.longest if self.config.critic_reads == "tokens" else self.prompt
        tokens = min(max(micro_tokens, length), self.rows * length)
        again = critic.shared and self.config.training.checkpoint_activations
        if critic.shared or self._shares(critic) is None:
            own, wide = self._gradients(critic).values()
            held = own + (wide if tokens < self.rows * length else 0)
        else:
            held = sum(self._passing(critic).values())
        return {
            "gradients of the critic": held,
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
        """What the run may take; of a cluster on this machine, what one of its processes may."""
        section = self.config.cluster
        if self.config.run.memory is not None:
            return int(self.config.run.memory * GIB)
        if self.gpu is not None:
            return self.gpu
        if self.on_gpu:
            return free_memory(self.device) + torch.cuda.memory_allocated(self.device) + PROCESS_CUDA
        beside = 1 if section is None or section.address else section.learners + section.rollouts
        return free_memory(self.device) // beside + int(psutil.Process().memory_info().rss)
