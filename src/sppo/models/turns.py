"""What a trajectory's next turn is begun with: the ids that stand between what the policy wrote and what it writes
next.

Nothing that was sampled is tokenised again: these ids are appended to those that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..types import Message, Task
from .loading import render_chat

PROBE: list[Message] = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
"""A conversation of one turn, to see what a chat template writes after it."""


def continuation_text(tokenizer: Any, messages: Sequence[Message], eos: str) -> str:
    """What a chat template writes between a reply that ended with `eos` and the next one, `messages` in between.

    Raises RecipeError for a template that rewrites earlier turns when later ones come: what was sampled would no
    longer be what is read.
    """
    before = render_chat(tokenizer, Task("turns", PROBE), answer=False)
    after = render_chat(tokenizer, Task("turns", [*PROBE, *messages]))
    if not after.startswith(before):
        raise RecipeError(
            "task.environment: the model's chat template changes earlier turns when later ones are added, so a "
            "trajectory of several turns "
            "cannot be continued token by token: use a template that keeps them, or policy.chat_template = 'off'"
        )
    beyond = before.rpartition(eos)[2] if eos and eos in before else ""  # e.g. a newline that follows the end of a turn
    return beyond + after[len(before) :]


def continuation_ids(tokenizer: Any, messages: Sequence[Message], *, chat: bool, eos: str) -> list[int]:
    """The ids to append for an environment's messages; plain text where there is no chat template."""
    text = continuation_text(tokenizer, messages, eos) if chat else "\n".join(str(m["content"]) for m in messages)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
