"""Which prompts the models of a run can read, and how a prompt is shown to people."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

from ..errors import ModelError, RecipeError
from ..models.critic import Critic
from ..models.policy import Policy
from ..recipe.config import Config
from ..tasks.base import ListSource, TaskSource, rows_in
from ..tasks.user_source import checked
from ..types import Task

SHOWN_HEAD, SHOWN_TAIL = 240, 120
"""Characters of a rendered prompt that are shown at the start of a run."""


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
        """Each row of a file that a chat template refuses, with the reason. Problems that are generated are not looked through."""
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


def typical_prompt(tasks: TaskSource, length: Callable[[Task], int], limit: int, looked_at: int = 64) -> int:
    """The mean length in tokens of the first prompts that are no longer than the limit; `length` counts one, or raises ModelError."""
    found = []
    for i in range(min(looked_at, len(tasks))):
        with contextlib.suppress(ModelError):  # a prompt that the chat template refuses is left out of the run too
            found.append(length(tasks[i]))
    found = [n for n in found if n <= limit]
    return math.ceil(sum(found) / len(found)) if found else limit
