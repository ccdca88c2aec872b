"""What ranks compute in these tests, and a single process too: a learner's updates on one batch, and what they leave behind."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import peft  # noqa: F401 (seconds, that each rank would take for itself)
import torch

from sppo.distributed.mesh import Mesh
from sppo.learning.batch import Batch, pack
from sppo.learning.learner import Learner
from sppo.learning.lessons import Lessons
from sppo.models import tiny
from sppo.models.adapter_critic import AdapterCritic
from sppo.models.adapters import Adapters
from sppo.models.critic import Critic
from sppo.models.policy import Policy
from sppo.models.sharding import shard
from sppo.models.weights import cast
from sppo.recipe.sections import AdapterSection
from sppo.tasks.loading import load_tasks
from sppo.types import Rollout, Verdict

from ..conftest import graded, small_config

ROWS, LONGEST = 15, 12


@dataclass(frozen=True)
class Case:
    """A recipe, its models, and how ranks hold them."""

    recipe: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    adapter: bool = False
    checkpointed: bool = False
    gather: str = "update"
    steps: int = 2
    tied: bool = True
    lessons: bool = False


def models(case: Case) -> tuple[Policy, Critic | None]:
    """Policy and critic as every rank loads them."""
    config = small_config(**case.recipe)
    model, tokenizer = tiny.build(seed=0, hidden=32, layers=2, heads=2)
    if not case.tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
    model = cast(model, case.dtype)
    adapters = Adapters.onto(model, AdapterSection(rank=4), seed=0) if case.adapter else None
    policy = Policy(model, tokenizer, adapters=adapters, base={"name": "tiny", "quantize": ""})
    if adapters is not None:
        stir(policy)
    critic: Critic | None = None
    if config.critic.model == "policy":
        critic = AdapterCritic.beside(policy, seed=1)
    elif config.critic_reads is not None:
        backbone, tokenizer = tiny.build(seed=1, head=False, hidden=32, layers=2, heads=2)
        critic = Critic(cast(backbone, case.dtype), tokenizer)
    if critic is not None:
        critic.head.to(torch.promote_types(case.dtype, torch.float32))
        with torch.no_grad():
            critic.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    if case.checkpointed:
        policy.checkpoint_activations()
        if critic is not None:
            critic.checkpoint_activations()
    return policy, critic


def stir(policy: Policy) -> None:
    """An adapter's second matrices are zero at first, and hide the gradient of the others."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in sorted(policy.adapters.named("default").items()):
            if "lora_B" in n:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def rollouts(policy: Policy, samples: int, gap: float = 0.01) -> list[Rollout]:
    """Responses of made-up ids and of very different lengths; the engine is `gap` a token off. The third is masked."""
    source, generator = load_tasks("chain:steps=1-2"), torch.Generator().manual_seed(7)
    tasks = [source[i // samples] for i in range(ROWS - ROWS % samples)]
    prompts = [policy.prompt_ids(task) for task in tasks]
    length = torch.randint(1, LONGEST + 1, (len(tasks),), generator=generator).tolist()
    responses = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in length]
    logps = policy.given_logps(prompts, responses)
    out = []
    for i, (task, prompt, response, logp) in enumerate(zip(tasks, prompts, responses, logps, strict=True)):
        shifted = [x + gap * (-1) ** (i + t) for t, x in enumerate(logp)]
        text = ";".join("1" * (1 + i % 3)) + ";"
        rollout = Rollout.answer(task, prompt, response, shifted, "stop", text, sample=i % samples)
        if i == 2:
            out.append(rollout.judged(Verdict(0.0, "infra_error")))
        else:
            out.append(graded(rollout, float((i * i) % 5 < 2)))
    return out


def judged_batch(policy: Policy, config: Any) -> Batch:
    samples = config.rollout.samples
    found = rollouts(policy, samples)
    if config.objective.baseline == "greedy":
        found = [replace(r, greedy=graded(replace(r, verdict=None), float(i % 2))) for i, r in enumerate(found)]
    return pack(found, policy.pad_id)


def flat(tensors: Any) -> torch.Tensor:
    """All numbers in one vector."""
    return torch.cat([x.detach().flatten().double() for x in tensors])


def watched(optimiser: Any, seen: list[torch.Tensor]) -> None:
    """Note each update's gradient, over all ranks, before it is clipped."""
    step = optimiser.step

    def noting(lr: float, norm: float) -> float:
        seen.append(flat(optimiser.gradients()))
        return step(lr, norm)

    optimiser.step = noting


def updates(mesh: Mesh, case: Case) -> dict[str, Any]:
    """Some steps of a learner, whose reference is the policy before them."""
    config = small_config(
        **{"training__micro_tokens": 48, "training__minibatches": 2, "objective__engine_gap_limit": 0.5} | case.recipe
    ).with_rates(1, 1, adapted=case.adapter)
    policy, critic = models(case)
    batch = judged_batch(policy, config)
    shard(policy, critic, None, mesh, gather=case.gather, offload=config.training.offload)
    reference = policy.as_reference() if config.needs_reference else None
    learner = Learner(policy, critic, reference, config, mesh)
    of_policy: list[torch.Tensor] = []
    of_critic: list[torch.Tensor] = []
    watched(learner.policy_optimiser, of_policy)
    if critic is not None:
        watched(learner.credit.optimiser, of_critic)
    metrics, values = [], []
    lessons = Lessons(batch.first(5), [1.0, 2.0, 1.0, 0.5, 1.0], 8) if case.lessons else None
    for step in range(case.steps):
        advantage, value_B, found = learner.advantage(batch)
        metrics.append(found | learner.update(batch, advantage, step, lessons))
        values.append(value_B)
    return {
        "policy": of_policy, "critic": of_critic, "metrics": metrics, "values": values, "trace": learner.trace,
        "weights": {name: x.clone() for name, x in policy.weights()}, "sha256": policy.sha256(),
        "state": learner.state_dict(), "logps": policy.given_logps([[5, 6, 7]], [[8, 9]]),
    }  # fmt: skip


def digest(state: Any) -> str:
    """Of everything in a state, tensor by tensor."""
    total = hashlib.sha256()

    def feed(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            total.update(f"{x.dtype}{tuple(x.shape)}".encode())
            total.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(x, dict):
            for key in sorted(x, key=str):
                total.update(str(key).encode())
                feed(x[key])
        elif isinstance(x, list | tuple):
            for y in x:
                feed(y)
        else:
            total.update(repr(x).encode())

    feed(state)
    return total.hexdigest()


def many(mesh: Mesh, cases: list[Case]) -> list[dict[str, Any]]:
    """Several cases in one group."""
    return [updates(mesh, case) for case in cases]
