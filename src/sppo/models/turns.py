"""Several turns as a model's chat template writes them: what stands between what the policy wrote and what it writes next, and how tools are
offered, called and answered. All of it is asked of the template.

Nothing that was sampled is tokenised again: the ids that are found here are appended to those that are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, RecipeError
from ..types import Message, Task
from .calls import syntax_of
from .loading import render_chat

MARK, THOUGHT = "ʬ", "ʭ"
"""Letters that no template writes by itself."""
BREAK = "\ue123"
"""A character of private use, at which a text is cut before it is tokenised."""
ASKED: list[Message] = [{"role": "user", "content": "."}]
SCHEMA = {
    "type": "function",
    "function": {
        "name": "shown",
        "description": MARK,
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "."}}},
    },
}
DESCRIPTION = (
    "You can call these tools, and are told what they give:\n{schemas}\n"
    'To call one, write <tool_call>{{"name": "…", "arguments": {{…}}}}</tool_call> and end your turn.\n\n'
)


@dataclass(frozen=True)
class Manner:
    """How a model takes part in a conversation with tools."""

    syntax: str
    """In which it writes calls (calls.py)."""
    describes: bool
    """Whether the template describes tools to the model."""
    answers: bool
    """Whether the template knows messages of the role `tool`; else a user's message brings what tools gave."""

    @classmethod
    def of(cls, tokenizer: Any, chat: bool) -> Manner:
        """Of a chat template; a model without one calls as Python does, and reads plain text."""
        if not chat:
            return cls("python", describes=False, answers=True)
        return cls(syntax_of(tokenizer) or "json", _describes(tokenizer), _answers(tokenizer))

    def stated(self) -> str:
        """For the user."""
        described = "its chat template describes them" if self.describes else "they are described in the prompt"
        return f"tools: calls are read as {self.syntax}; {described}"

    def offered(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """A prompt for a template that describes no tools: they are described before its first message."""
        if self.describes or not tools or not messages:
            return list(messages)
        first, *rest = messages
        told = DESCRIPTION.format(schemas="\n".join(json.dumps(t, ensure_ascii=False) for t in tools))
        return [{**first, "content": told + str(first["content"])}, *rest]

    def answered(self, messages: Sequence[Message]) -> list[Message]:
        """What tools gave, for a template that does not know their messages."""
        if self.answers or not any(m["role"] == "tool" for m in messages):
            return list(messages)
        texts = [
            f"<tool_response>\n{m['content']}\n</tool_response>" if m["role"] == "tool" else str(m["content"])
            for m in messages
        ]
        return [{"role": "user", "content": "\n".join(texts)}]


def _describes(tokenizer: Any) -> bool:
    try:
        return MARK in render_chat(tokenizer, Task("tools", ASKED, {"tools": [SCHEMA]}))
    except ModelError:
        return False


def _answers(tokenizer: Any) -> bool:
    told = {"role": "tool", "name": "shown", "content": THOUGHT}
    try:
        return THOUGHT in render_chat(
            tokenizer, Task("tools", [*ASKED, _called([told]), {**told, "tool_call_id": _id(0)}])
        )
    except ModelError:
        return False


def _called(results: Sequence[Message]) -> Message:
    """A reply that calls the tools that these are results of; its last argument is the mark, for some templates write no content beside calls."""
    calls = [
        {"id": _id(i), "type": "function", "function": {"name": m.get("name") or "shown", "arguments": {"key": MARK}}}
        for i, m in enumerate(results)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _id(i: int) -> str:
    """Of a call, as Mistral wants it."""
    return f"{i:09d}"


def continuation_text(tokenizer: Any, messages: Sequence[Message], ends: Sequence[str]) -> str:
    """What a chat template writes between a reply and the next one, `messages` in between.

    Args:
        ends: what may have ended the reply, the likeliest first: what the template writes up to it is there already.

    Raises RecipeError for a template that writes a reply otherwise than where it asks for one.
    """
    head = render_chat(tokenizer, Task("turns", ASKED))
    results = [m for m in messages if m["role"] == "tool"]
    reply: Message = _called(results) if results else {"role": "assistant", "content": MARK}
    told = [{**m, "tool_call_id": _id(results.index(m))} if m in results else m for m in messages]
    after = render_chat(tokenizer, Task("turns", [*ASKED, reply, *told]))
    if MARK not in after:  # it writes no calls
        after = render_chat(tokenizer, Task("turns", [*ASKED, {"role": "assistant", "content": MARK}, *told]))
    if not after.startswith(head.removesuffix("<think>\n")) or MARK not in after:
        raise RecipeError(
            "[environment]: the model's chat template changes earlier turns when later ones are added, so a "
            "trajectory of several turns "
            "cannot be continued token by token: use a template that keeps them, or policy.chat_template = 'off'"
        )
    tail = after.rpartition(MARK)[2]
    end = next((e for e in ends if e and e in tail), "")
    return tail.partition(end)[2] if end else tail


def continuation_ids(tokenizer: Any, messages: Sequence[Message], *, chat: bool, ends: Sequence[str]) -> list[int]:
    """The ids to append for an environment's messages; plain text where there is no chat template, what tools gave on lines of its own.

    What an environment says may be anything: signs in it that begin or end a turn are read as text."""
    messages = [{**m, "content": _broken(tokenizer, str(m["content"]))} for m in messages]
    if chat:
        text = continuation_text(tokenizer, messages, ends)
    else:
        text = "\n".join(m["content"] for m in messages)
        if any(m["role"] == "tool" for m in messages):
            text = f"\n{text}\n"
    return [i for piece in text.split(BREAK) if piece for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def _broken(tokenizer: Any, text: str) -> str:
    """A text with a break in each of the tokenizer's own signs, so that they are not read as such."""
    text = text.replace(BREAK, "")
    for sign in tokenizer.added_tokens_encoder:
        if len(sign) > 1 and not sign.isspace():
            text = text.replace(sign, sign[0] + BREAK + sign[1:])
    return text
