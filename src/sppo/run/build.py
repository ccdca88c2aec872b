"""What a run is put together from: the models that a recipe (or a Python user) names, and which prompts they can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ModelError, RecipeError
from ..models.critic import Critic
from ..models.loading import saved_dtype
from ..models.mlp import ControlCritic, ControlPolicy, Taught, is_control
from ..models.policy import Policy
from ..recipe.config import Config
from ..rewards.base import Reward
from ..spec import is_import, make
from ..tasks.base import ListSource, TaskSource, rows_in
from ..tasks.user_source import checked
from ..types import Task

SHOWN_HEAD, SHOWN_TAIL = 240, 120
"""Characters of a rendered prompt that are shown at the start of a run."""


@dataclass
class Parts:
    """What a Python user may bring instead of naming it in the recipe."""

    policy: tuple[Any, Any] | None = None
    critic: tuple[Any, Any] | None = None
    reward: Reward | None = None
    train: TaskSource | None = None
    evaluation: TaskSource | None = None


def load_policy(
    config: Config, given: tuple[Any, Any] | None, saved: Path | None, device: torch.device, note: Callable[[str], None]
) -> Policy:
    """The saved checkpoint's policy, else the given one, else the recipe's; `note` hears what it is."""
    if given is None and saved is None:
        given = _own_model(config.policy.model, "policy.model")
    if given is not None and saved is None:
        model, tokenizer = given
        policy = Policy(model.to(device), tokenizer, chat_template=config.policy.chat_template, name="the given model")
        note(f"policy: the given model, {str(policy.dtype).removeprefix('torch.')} on {device}")
        return policy
    name = str(saved / "policy") if saved else config.policy.model
    kind = ControlPolicy if is_control(name) else Policy
    if kind is ControlPolicy and not Path(name).exists():
        Taught.parse("policy.model", name)  # a bad option is said before the wait is
        note("cloning a teacher's episodes for the policy to begin with: from seconds to a minute or two")
    policy, stated = kind.load(
        name,
        dtype=saved_dtype(name) if saved and kind is Policy else config.policy.dtype,
        device=device,
        seed=config.seed,
        chat_template=config.policy.chat_template,
    )
    note(stated)
    return policy


def load_critic(
    config: Config, given: tuple[Any, Any] | None, saved: Path | None, device: torch.device, note: Callable[[str], None]
) -> Critic | None:
    """The same of the critic; None where the algorithm has none."""
    if config.critic_reads is None:
        return None
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
    """Models that were saved to folders carry their control task with them, which no recipe shows. Raises RecipeError if it is another."""
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


class PromptLimit:
    """Which prompts policy, engine and critic can read: longer ones are left out and counted, never cut."""

    def __init__(self, config: Config, policy: Policy, critic: Critic | None, engine_context: int | None) -> None:
        """Raises RecipeError where no prompt would fit."""
        self.policy, self.critic = policy, critic
        self.tokens, self.why = config.task.max_prompt_tokens, "task.max_prompt_tokens"
        known = [n for n in (policy.context, engine_context) if n is not None]
        if critic is not None and config.critic_reads == "tokens" and critic.context is not None:
            known.append(critic.context)
        context = min(known, default=None)
        if context is None:
            return
        room = context - config.rollout.max_tokens
        if room < 1:
            raise RecipeError(
                f"rollout.max_tokens is {config.rollout.max_tokens}, but {policy.name} has only {context} positions here "
                "for prompt and response together"
            )
        if room < self.tokens:
            self.tokens, self.why = room, f"what rollout.max_tokens leaves of the model's {context} positions"

    def refused(self, task: Task) -> str | None:
        """Why a chat template, the policy's or the critic's, does not take a task's messages, or None."""
        return self.policy.refuses(task) or (self.critic.refuses(task) if self.critic is not None else None)

    def refusals(self, source: TaskSource) -> list[str]:
        """Every row of a file that a chat template refuses, with the reason; problems that are made one by one are not looked through."""
        if not isinstance(rows_in(source), ListSource):
            return []
        found = ((task.id, self.refused(task)) for task in (source[i] for i in range(len(source))))
        return [f"{name}: {why}" for name, why in found if why is not None]

    def __call__(self, task: Task) -> str | None:
        """Why a task's prompt cannot be used, or None."""
        checked(task)
        try:
            length = len(self.policy.prompt_ids(task))
            read = 0 if self.critic is None else len(self.critic.prompt_ids(task))
        except ModelError as error:  # a chat template refuses it
            return str(error).removeprefix(f"task {task.id}: ")
        if length == 0:
            return "the prompt is empty"
        if length > self.tokens:
            return f"the prompt has {length} tokens, the limit is {self.tokens} ({self.why})"
        limit = self.critic.context if self.critic is not None else None
        if limit is not None and read > limit:
            return f"the prompt has {read} tokens for the critic, which reads {limit} at most"
        return None


def shown_prompt(policy: Policy, task: Task) -> str:
    """One task's prompt exactly as the policy reads it, for the start of a run."""
    ids = policy.prompt_ids(task)
    return said_prompt("policy", task.id, ids, policy.rendered(ids))


def said_prompt(who: str, name: str, ids: Sequence[int], text: str) -> str:
    """A rendered prompt, special tokens included, on one line; a long one says how much of its middle is left out."""
    left_out = len(text) - SHOWN_HEAD - SHOWN_TAIL
    shown = repr(text)
    if left_out > 0:
        shown = f"{text[:SHOWN_HEAD]!r} … {left_out:,} characters … {text[-SHOWN_TAIL:]!r}"
    return f"the {who} reads, for {name} ({len(ids)} tokens): {shown}"
