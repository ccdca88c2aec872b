"""From a recipe to everything that a run is made of, in one place: `build` says what it chose, and refuses what cannot work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..audit.monitors import Monitors
from ..audit.verifier import verifier_sha256
from ..environments.base import Maker, load_environment
from ..errors import ModelError, RecipeError
from ..evaluation.evaluate import held_out_tasks
from ..evaluation.step_quality import step_checker
from ..learning.learner import Learner
from ..learning.optimizer import optimiser_class
from ..memory import give_back, keep_memory, measure_peak
from ..models.adapter_critic import AdapterCritic
from ..models.adapters import is_adapter
from ..models.assembled import can_be_named, given_adapters, name_of, on, quantised
from ..models.critic import Critic
from ..models.loading import pick_device, processor, saved_dtype
from ..models.mlp import ControlCritic, ControlPolicy, Taught, is_control
from ..models.policy import Policy
from ..models.weights import parameter_count
from ..recipe.config import Config
from ..recipe.recipe import POLICY
from ..rewards.base import Reward
from ..rewards.combine import MixedReward, adds
from ..rewards.loading import load_reward
from ..rewards.steps import Checker
from ..rollout.engine import Engine, Sampling, load_engine
from ..spec import GIVEN, is_import, make
from ..tasks.base import TaskSource
from ..tasks.loading import load_pair
from ..threads import fitted
from ..types import Task
from .curriculum import Uniform, curriculum
from .directory import RunDirectory
from .footprint import Model
from .observer import Observer
from .plan import Plan, plan, typical_prompt
from .prompts import PromptLimit, shown_prompt
from .provenance import data_of, must_be_the_same
from .warnings import Warnings

Note = Callable[[str], None]
"""Takes a sentence for the user."""


@dataclass
class Parts:
    """What a Python user may bring instead of naming it in the recipe."""

    policy: tuple[Any, Any] | None = None
    adapter: Any = None
    """peft's config of an adapter, which then counts, not the recipe's."""
    critic: tuple[Any, Any] | None = None
    reward: Reward | None = None
    train: TaskSource | None = None
    evaluation: TaskSource | None = None


@dataclass(frozen=True)
class Components:
    """What a run is made of. None of these is replaced while it runs; weights and positions change inside them."""

    config: Config
    """The resolved recipe: nothing in it is left open."""
    observer: Observer
    directory: RunDirectory
    data: Mapping[str, Mapping[str, str]]
    """Path and SHA-256 of each file of rows (provenance.py)."""
    environment: Maker
    reward: Reward
    verifier: str
    """The SHA-256 of the reward's code (audit/verifier.py)."""
    monitors: Monitors
    policy: Policy
    critic: Critic | None
    plan: Plan | None
    """Of memory (plan.py); None for networks of a few thousand weights."""
    engine: Engine
    sampling: Sampling
    warnings: Warnings
    prompt_limit: PromptLimit
    train_tasks: TaskSource
    held_out: Sequence[Task]
    """The problems of every evaluation."""
    curriculum: Uniform
    checker: Checker | None
    """Checks the steps of a response, where these tasks or this reward can."""

    @property
    def tight(self) -> bool:
        """Whether freed memory goes back to the machine at once."""
        return self.plan is not None and self.plan.tight


def build(config: Config, directory: RunDirectory, observer: Observer, parts: Parts, saved: Path | None) -> Components:
    """The components of a new run, or of one that goes on from the checkpoint `saved`.

    Raises a UserError before anything expensive where the recipe cannot be obeyed.
    """
    keep_memory()
    torch.set_num_threads(config.run.threads or fitted(torch.get_num_threads()))
    note, device = observer.note, pick_device()
    measure_peak(device)
    note(f"processor {processor(device)}")
    config = _settled(config, note)
    optimiser_class(config.training.optimizer, device)  # refused now, and not after a bootstrap
    if config.training.offload and device.type == "cpu":
        raise RecipeError("training.offload moves the optimiser out of a GPU's memory, and there is none: leave it out")
    environment, reward = load_environment(config.task.environment), _reward(config, parts)
    train_tasks, eval_tasks = _tasks(config, parts)
    data = data_of(config)
    must_be_the_same(directory.path, data)
    policy = load_policy(config, parts, saved, device, note)
    if policy.adapters is not None and (parts.adapter or parts.policy):
        config = config.model_copy(update={"adapter": policy.adapters.section})  # as peft has settled it
    if policy.adapters is not None and saved is None and not can_be_named(policy.base["name"]):
        policy.save_base(directory.path / "base")
    reward.check(train_tasks[0])  # raises where this machine cannot judge its kind at all
    critic = load_critic(config, policy, parts.critic, saved, device, note)
    if config.training.checkpoint_activations:
        policy.checkpoint_activations()
        if critic is not None:
            critic.checkpoint_activations()
    one_control_task(config, policy, critic)
    config, planned = _planned(config, policy, critic, train_tasks, device, note)
    if saved is None:
        size, adapted = parameter_count(policy.model), policy.adapters is not None
        of_critic = size if config.critic.model == POLICY else parameter_count(critic) if critic is not None else 0
        config = config.with_rates(size, of_critic, adapted=adapted)
    engine = load_engine(config.rollout.engine, policy)
    if engine.stated:
        note(engine.stated)
    sampling = Sampling.of(config.rollout)
    warnings = Warnings(config, sampling, note)
    warnings.before()
    monitors = Monitors(config.monitors, reward, config.seed, config.reward.limit)
    limit = PromptLimit(config, policy, critic, engine.context)
    held_out = _usable(config, train_tasks, eval_tasks, limit, note)
    if not isinstance(policy, ControlPolicy):
        note(shown_prompt(policy, held_out[0]))
    problems = curriculum(
        config.curriculum, train_tasks, config.seed, limit, critic, held_out, config.training.micro_budget
    )
    return Components(
        config=config, observer=observer, directory=directory, data=data, environment=environment, reward=reward, verifier=verifier_sha256(reward),
        monitors=monitors, policy=policy, critic=critic, plan=planned, engine=engine, sampling=sampling, warnings=warnings,
        prompt_limit=limit, train_tasks=train_tasks, held_out=held_out, curriculum=problems,
        checker=step_checker(config.task.eval or config.task.train, held_out[0], reward),
    )  # fmt: skip


def _settled(config: Config, note: Note) -> Config:
    """The recipe with `auto` replaced by what it stands for; says which ratio that is, and which keys have no effect."""
    config, ratio = config.settled()
    for why in config.without_effect():
        note(f"warning: {why}")
    note(f"algorithm {config.objective.algorithm}, {ratio}")
    return config


def _reward(config: Config, parts: Parts) -> Reward:
    reward = parts.reward or load_reward(config.reward.use, config.reward.limit)
    if config.reward.anneal and not (isinstance(reward, MixedReward) and adds(reward.parts)):
        raise RecipeError(
            f"reward.anneal fades what is added to a reward, and reward.use = {config.reward.use!r} adds nothing"
        )
    return reward


def _tasks(config: Config, parts: Parts) -> tuple[TaskSource, TaskSource]:
    """Training and held-out problems."""
    if parts.train is not None and parts.evaluation is not None:
        return parts.train, parts.evaluation
    return load_pair(config.task.train, config.task.eval, config.task.instruction, config.task.columns)


def _planned(
    config: Config, policy: Policy, critic: Critic | None, tasks: TaskSource, device: torch.device, note: Note
) -> tuple[Config, Plan | None]:
    """The recipe with `training.micro_tokens` chosen where it is open, and the plan of its memory, which is said."""
    if isinstance(policy, ControlPolicy):  # networks of a few thousand weights
        return config, None
    prompt = typical_prompt(tasks, lambda task: len(policy.prompt_ids(task)), config.task.max_prompt_tokens)
    reader = None if critic is None else Model.of_critic(critic)
    found = plan(config, Model.of(policy), reader, device, prompt)
    note(found.stated())
    if device.type == "cpu":
        keep_memory(found.capacity)
    training = config.training.model_copy(update={"micro_tokens": found.micro_tokens})
    return config.model_copy(update={"training": training}), found


def _usable(
    config: Config, train_tasks: TaskSource, eval_tasks: TaskSource, limit: PromptLimit, note: Note
) -> list[Task]:
    """The held-out problems that can be used; says which rows are left out. Raises RecipeError where no problem remains."""
    for which, source in (("training", train_tasks), ("held-out", eval_tasks)):
        if refused := limit.refusals(source):
            more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
            note(f"warning: {len(refused)} of {len(source)} {which} rows are left out: {refused[0]}{more}")
    chosen = held_out_tasks(eval_tasks, config.evaluation.n)
    usable = [t for t in chosen if limit(t) is None]
    if not usable:
        raise RecipeError(f"no held-out problem can be used: {chosen[0].id}: {limit(chosen[0])}")
    if len(usable) < len(chosen):
        left_out = len(chosen) - len(usable)
        note(f"{left_out} of {len(chosen)} held-out prompts are over the limit or refused, and left out")
    return usable


def load_policy(config: Config, parts: Parts, saved: Path | None, device: torch.device, note: Note) -> Policy:
    """The saved checkpoint's policy, else the given one, else the recipe's. `note` is called with what it is."""
    given, adapter = parts.policy, parts.adapter or config.adapter
    if given is None and saved is None:
        given = _own_model(config.policy.model, "policy.model")
    if given is not None and saved is None:
        if hasattr(given[0], "active_peft_config"):  # then the recipe's [adapter] only says what is there
            adapter = parts.adapter
        model, adapters = given_adapters(on(given[0], device), adapter, config.seed)
        dtype, base = str(model.dtype).removeprefix("torch."), None
        if adapters is not None:
            base = {"name": name_of(model) or GIVEN, "dtype": dtype, "quantize": quantised(model.config)}
        policy = Policy(
            model,
            given[1],
            chat_template=config.policy.chat_template,
            name="the given model",
            adapters=adapters,
            base=base,
        )
        note(f"policy: the given model, {dtype} on {device}" + (", frozen, and an adapter" if adapters else ""))
        return _without_dropout(policy, note)
    name = str(saved / "policy") if saved else config.policy.model
    if config.critic.model == POLICY and config.critic_reads and not adapter and not is_adapter(name):
        raise RecipeError(
            "critic.model = 'policy' puts a second adapter on frozen weights: add [adapter] (in Python: peft_config), or name another critic"
        )
    kind = ControlPolicy if is_control(name) else Policy
    if kind is ControlPolicy and not Path(name).exists():
        Taught.parse("policy.model", name)  # a bad option is refused before the wait
        note("cloning a teacher's episodes for the policy to begin with: from seconds to a minute or two")
    policy, stated = kind.load(
        name,
        dtype=saved_dtype(name) if saved and kind is Policy and not is_adapter(name) else config.policy.dtype,
        device=device,
        seed=config.seed,
        chat_template=config.policy.chat_template,
        adapter=None if saved else adapter,
        quantize=config.policy.quantize,
    )
    note(stated)
    if kind is Policy and policy.adapters is None and quantised(policy.model.config):
        raise RecipeError(f"policy.model = {name!r} is quantised, so its weights cannot be trained: add [adapter]")
    return _without_dropout(policy, note)


def _without_dropout(policy: Policy, note: Note) -> Policy:
    if policy.adapters is not None and policy.adapters.dropout:
        note(
            f"warning: lora_dropout = {policy.adapters.dropout:g} has no effect: models are trained without dropout, so "
            "that a token has the same probability when it is sampled and when it is learnt from"
        )
    return policy


def load_critic(
    config: Config, policy: Policy, given: tuple[Any, Any] | None, saved: Path | None, device: torch.device, note: Note
) -> Critic | None:
    """The same of the critic; None where the algorithm has none."""
    if config.critic_reads is None:
        return None
    if config.critic.model == POLICY:
        beside = AdapterCritic.beside(policy, saved / "critic" if saved else None, seed=config.seed + 1)
        note(beside.stated + ("the prompt only" if config.critic_reads == "prompt" else "prompt and response"))
        return beside
    if given is None and saved is None:
        given = _own_model(config.critic.model, "critic.model")
    if given is not None and saved is None:
        return Critic(*given, name="the given critic").to(device)
    name = str(saved / "critic") if saved else config.critic.model
    kind = ControlCritic if is_control(name) else Critic
    dtype = saved_dtype(name) if saved and kind is Critic else config.critic.dtype
    critic, stated = kind.load(name, dtype=dtype, device=device, seed=config.seed + 1, reads=config.critic_reads)
    note(stated)
    return critic


def _own_model(name: str, key: str) -> tuple[Any, Any] | None:
    """What `package.module:object,key=value` makes, a (model, tokenizer) pair; None for any other name."""
    if is_control(name) or not is_import(name, "sppo.models") or Path(name).exists():
        return None
    made = make(name, "sppo.models", key)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], PreTrainedModel) and callable(made[1])):
        raise ModelError(
            f"{key} = {name!r} makes a {type(made).__name__}; it must return a transformers model and its tokenizer"
        )
    return made


def one_control_task(config: Config, policy: Policy, critic: Critic | None) -> None:
    """Check the control task of models that were saved to folders, which no recipe shows. Raises RecipeError if it is another."""
    parts = {"policy.model": policy, "critic.model": critic}
    tasks = {
        key: part.environment.name for key, part in parts.items() if isinstance(part, ControlPolicy | ControlCritic)
    }
    if not tasks:
        return
    name = config.task.train.partition(":")[2].partition(",")[0]
    for key, part in parts.items():
        if part is not None and tasks.get(key) != name:
            raise RecipeError(
                f"{key} = {part.name!r} is of {'the control task ' + tasks[key] if key in tasks else 'no control task'}, but "
                f"task.train = {config.task.train!r}"
            )


def make_learner(c: Components, saved: Path | None) -> Learner:
    """The learner of these models as they are now, and π_ref, the policy at step 0 (after any bootstrap), if the recipe reads it."""
    learner = Learner(c.policy, c.critic, None, c.config)
    learner.progress = partial(c.observer.within, "updating")
    if c.tight:
        learner.hold_little()
        give_back()
    if c.config.needs_reference:
        start = c.directory.path / "checkpoints" / "step-000000" / "policy"
        if saved is None or c.policy.adapters is not None:
            learner.reference = c.policy.as_reference(None if saved is None else start)
        else:
            learner.reference = _load_reference(c, start)
    return learner


def _load_reference(c: Components, start: Path) -> Policy:
    """π_ref of a run that goes on: the policy of its checkpoint of step 0."""
    policy = c.policy
    reference, _ = type(policy).load(
        str(start), dtype=str(policy.dtype).removeprefix("torch."),
        device=policy.device, seed=0, chat_template=c.config.policy.chat_template,
    )  # fmt: skip
    if isinstance(reference, ControlPolicy) and isinstance(policy, ControlPolicy):
        reference.scorer.states = policy.states
    reference.model.requires_grad_(False)
    return reference
