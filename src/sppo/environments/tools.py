"""Tools that the policy may call until it writes a turn without a call: `environment.tools = ["calculator", "mine:lookup"]`.

A tool is a function, or a class: every trajectory gets an object of its own, whose public methods are tools. Such a class may also have what
TRL's environments have: `reset(**row)`, whose text is added to the prompt, `get_reward()`, which the reward `environment` pays, and `close()`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..types import Message, Task
from .base import Observation, Reply
from .toolbox import Toolbox, awaited


class Tools:
    """One trajectory with tools."""

    def __init__(self, makers: Sequence[Callable[[], Any]], turns: int = 8, output: int = 4000) -> None:
        """`makers` make the tools of this trajectory; at most `turns` turns are the policy's; `output` characters of a result are shown."""
        self.tools = [make() for make in makers]
        self.box, self.turns = Toolbox(self.tools, output), turns
        self.taken = self.called = self.failed = 0
        self.begun = False

    @property
    def given(self) -> Any:
        """The object of the user's own that this trajectory has, for rewards that read it."""
        return next((tool for tool in self.tools if not inspect.isroutine(tool)), None)

    def reset(self, task: Task) -> Observation:
        """Offer the tools."""
        self.begun = True
        row = {**task.columns, "prompt": task.prompt}
        texts = [awaited(accepted(begin, row)) for begin in self._those_with("reset")]
        return Observation(tools=self.box.schemas, added="".join(text for text in texts if isinstance(text, str)))

    def step(self, reply: Reply) -> Observation:
        """The results of a turn's calls, or the end."""
        self.taken += 1
        messages = list[Message]()
        for call in reply.calls:
            text, worked = self.box.call(call)
            self.called += 1
            self.failed += not worked
            messages.append({"role": "tool", "name": call.name, "content": text})
        done = not messages or self.taken >= self.turns
        evidence = {"calls": self.called, "failed_calls": self.failed}
        if messages and done:
            evidence["out_of_turns"] = True
        return Observation(messages, done=done, evidence=evidence)

    def close(self) -> Mapping[str, Any]:
        """What the objects of this trajectory pay, and their end. One that never began has no state yet that could be asked."""
        try:
            paid = [float(awaited(reward())) for reward in self._those_with("get_reward")] if self.begun else []
        finally:
            for end in self._those_with("close"):
                end()
        return {"reward": sum(paid)} if paid else {}

    def _those_with(self, name: str) -> list[Callable[..., Any]]:
        found = [getattr(tool, name, None) for tool in self.tools if not inspect.isroutine(tool)]
        return [method for method in found if callable(method)]


def accepted(function: Callable[..., Any], row: Mapping[str, Any]) -> Any:
    """Call with the columns that a function asks for by name."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return function(**row)
    return function(**{p.name: row[p.name] for p in parameters if p.name in row})
