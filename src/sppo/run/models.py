"""The models of a run: loaded, made ready, and handed to the learner; here, or on the ranks of a cluster (rank.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..distributed.mesh import Mesh
from ..environments.base import Maker
from ..errors import ModelError, RecipeError, WorkerLost
from ..learning.learner import Learner
from ..learning.optimizer import optimiser_class
from ..learning.sft import Imitation
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
from ..rollout.engine import Engine, load_engine
from ..spec import GIVEN, is_import, make
from ..tasks.base import TaskSource
from ..types import Task
from .footprint import Model
from .plan import Plan
from .planning import plan

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
    environment: Maker | None = None


class Models:
    """A run's policy and critic in this process."""

    def __init__(
        self, config: Config, parts: Parts, saved: Path | None, note: Note, *, base: Path, writes: bool = True
    ) -> None:
        """Loads them: of the checkpoint `saved`, else what `parts` or the recipe name. `config` is then the recipe with
        the adapter as peft has settled it. A base model that has no name is written to the folder `base`, where this
        process `writes`.

        Raises a UserError where they cannot be had, or cannot be trained as the recipe says.
        """
        device = pick_device()
        measure_peak(device)
        note(f"processor {processor(device)}")
        optimiser_class(config.training.optimizer, device)  # refused now, and not after a bootstrap
        if config.training.offload and device.type == "cpu":
            raise RecipeError(
                "training.offload moves the optimiser out of a GPU's memory, and there is none: leave it out"
            )
        self.policy = load_policy(config, parts, saved, device, note)
        if self.policy.adapters is not None and (parts.adapter or parts.policy):
            config = config.model_copy(update={"adapter": self.policy.adapters.section})
        if self.policy.adapters is not None and saved is None and not can_be_named(self.policy.base["name"]):
            if writes:
                self.policy.save_base(base)
            self.policy.base["name"] = str(base.resolve())
        self.critic = load_critic(config, self.policy, parts.critic, saved, device, note)
        self.config = config
        if config.training.checkpoint_activations:
            self.policy.checkpoint_activations()
            if self.critic is not None:
                self.critic.checkpoint_activations()

    def planned(self, config: Config, prompt: int, note: Note) -> tuple[Config, Plan | None]:
        """The recipe with `training.micro_tokens` chosen where it is open, and the plan of its memory, which is said; `prompt` is
        a typical prompt's length in tokens."""
        if isinstance(self.policy, ControlPolicy):  # networks of a few thousand weights
            return config, None
        reader = None if self.critic is None else Model.of_critic(self.critic)
        found = plan(config, Model.of(self.policy), reader, self.policy.device, prompt)
        note(found.stated())
        if self.policy.device.type == "cpu":
            keep_memory(found.capacity)
        training = config.training.model_copy(update={"micro_tokens": found.micro_tokens})
        return config.model_copy(update={"training": training}), found

    def rated(self, config: Config) -> Config:
        """The recipe with learning rates by the sizes of these models, where it leaves them open."""
        size, adapted = parameter_count(self.policy.model), self.policy.adapters is not None
        of_critic = 0 if self.critic is None else parameter_count(self.critic)
        return config.with_rates(size, size if config.critic.model == POLICY else of_critic, adapted=adapted)

    def engine(self, config: Config) -> Engine:
        """The engine that `rollout.engine` names, over the policy; `config` is settled."""
        return load_engine(config.rollout.engine, self.policy)

    def judging(self, reward: Reward, task: Task) -> Reward:
        """What judges by this reward: itself, or the workers of a cluster (`reward.workers`); `task` is one of the problems."""
        return reward

    def restart(self, lost: WorkerLost, saved: Path | None) -> None:
        """Nothing that is here can be lost alone."""
        raise lost

    def metrics(self) -> dict[str, Any]:
        """Of processes elsewhere, for a step's line."""
        return {}

    def kept(self, step: int) -> None:
        """A step's checkpoint is complete: what led to it is not needed any more."""

    def copy_journal(self, version: int, folder: Path) -> None:
        """Put what weights of a version have sampled into a folder; nothing is sampled ahead here."""

    def replaying(self, version: int, fingerprint: str, folder: Path) -> contextlib.AbstractContextManager[None]:
        """Until the block ends samples are those in a folder, of weights that are gone."""
        return contextlib.nullcontext()

    def finished(self) -> None:
        """The run has done its last step."""

    def close(self) -> None:
        """Nothing here is to be let go of."""

    def imitation(self, config: Config) -> Imitation:
        """What learns from worked solutions."""
        return Imitation(self.policy, config.training.micro_budget, offload=config.training.offload)

    def learner(
        self, config: Config, path: Path, saved: Path | None, *, tight: bool, mesh: Mesh | None = None
    ) -> Learner:
        """The learner of these models as they are now, and π_ref, the policy at step 0 (after any bootstrap), if the recipe reads it.

        `path` is the run's folder; `tight`: memory is.
        """
        learner = Learner(self.policy, self.critic, None, config, mesh)
        if tight:
            learner.hold_little()
            give_back()
        if config.needs_reference:
            start = path / "checkpoints" / "step-000000" / "policy"
            if saved is None or self.policy.adapters is not None:
                learner.reference = self.policy.as_reference(None if saved is None else start)
            else:
                learner.reference = _load_reference(config, self.policy, start)
        return learner


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


def _load_reference(config: Config, policy: Policy, start: Path) -> Policy:
    """π_ref of a run that goes on: the policy of its checkpoint of step 0."""
    reference, _ = type(policy).load(
        str(start), dtype=str(policy.dtype).removeprefix("torch."),
        device=policy.device, seed=0, chat_template=config.policy.chat_template,
    )  # fmt: skip
    if isinstance(reference, ControlPolicy) and isinstance(policy, ControlPolicy):
        reference.scorer.states = policy.states
    reference.model.requires_grad_(False)
    return reference
