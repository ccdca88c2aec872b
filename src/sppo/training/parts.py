"""What a run is put together from: the models that a recipe (or a Python user) names, and which prompts they can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..errors import RecipeError
from ..models.control import ControlCritic, ControlPolicy, Taught, is_control
from ..models.critic import Critic
from ..models.policy import Policy
from ..models.pretrained import saved_dtype
from ..rewards.base import Reward
from ..tasks.base import TaskSource
from ..types import Task


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
    if given is not None and saved is None:
        return Critic(*given, name="the given critic").to(device)
    name = str(saved / "critic") if saved else config.critic.model
    kind = ControlCritic if is_control(name) else Critic
    dtype = saved_dtype(name) if saved and kind is Critic else config.critic.dtype
    critic, stated = kind.load(name, dtype=dtype, device=device, seed=config.seed + 1, reads=config.critic_reads)
    note(stated)
    return critic


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

    def __call__(self, task: Task) -> str | None:
        """Why a task's prompt cannot be used, or None."""
        length = len(self.policy.prompt_ids(task))
        if length == 0:
            return "the prompt is empty"
        if length > self.tokens:
            return f"the prompt has {length} tokens, the limit is {self.tokens} ({self.why})"
        limit = self.critic.context if self.critic is not None else None
        if self.critic is not None and limit is not None and (length := len(self.critic.prompt_ids(task))) > limit:
            return f"the prompt has {length} tokens for the critic, which reads {limit} at most"
        return None
