"""`environment.use = "agent:mine:solve"`: an agent that talks to the policy as to any model behind OpenAI's protocol, unchanged.

    def solve(prompt, base_url, api_key, answer):
        client = OpenAI(base_url=base_url, api_key=api_key)
        ...
        return {"reward": 1.0}

It gets what it names of: `base_url`, `api_key`, `model`, `prompt` and the columns of the task. What it returns is the trajectory's evidence
(`reward.use = "environment"` pays its `reward`); what it raises masks the trajectory. Its first request begins the trajectory, and each later one
must continue it: the messages so far, the policy's answer, and new ones.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ..spec import resolve
from ..types import Message, Task
from .base import Broken, Observation, Reply
from .endpoint import Ended, endpoint, message_of, messages_of
from .toolbox import awaited
from .tools import accepted


def build(agent: str) -> Agent:
    """The environment around an agent of the user's own. Raises RecipeError where there is none of this name."""
    return Agent(resolve(agent, "sppo.environments", "build"))


class Agent:
    """One trajectory: the agent runs in a thread of its own."""

    def __init__(self, agent: Callable[..., Any]) -> None:
        self.agent, self.session = agent, endpoint().open()
        self.messages: list[Message] = []
        self.turns = 0

    def reset(self, task: Task) -> Observation:
        """Start the agent; its first request is what the policy reads."""
        given = {"base_url": self.session.base_url, "api_key": self.session.api_key, "model": "policy"}
        row = {**task.columns, "prompt": task.prompt, **given}
        threading.Thread(target=self._run, args=(row,), name="sppo-agent", daemon=True).start()
        asked = self.session.next()
        if isinstance(asked, Ended):
            raise asked.error or Broken("the agent returned before it asked anything")
        self.messages = asked["messages"]
        return Observation(prompt=self.messages, tools=asked.get("tools") or ())

    def _run(self, row: Mapping[str, Any]) -> None:
        try:
            self.session.end(Ended(awaited(accepted(self.agent, row))))
        except BaseException as error:
            self.session.end(Ended(error=error))

    def step(self, reply: Reply) -> Observation:
        """Answer the agent, and wait for what it asks next."""
        self.turns += 1
        message = message_of(reply, self.turns)
        before = [*self.messages, *messages_of([message])]
        self.session.answer(message)
        asked = self.session.next()
        if isinstance(asked, Ended):
            return self._ended(asked)
        new = asked["messages"][len(before) :]
        if _plain(asked["messages"][: len(before)]) != _plain(before) or not new:
            raise Broken(
                "the agent did not continue the conversation: a request holds the messages so far, the answer, and new ones"
            )
        self.messages = asked["messages"]
        return Observation(new)

    def _ended(self, ended: Ended) -> Observation:
        if ended.error is not None:
            raise Broken(f"the agent raised {type(ended.error).__name__}: {ended.error}") from ended.error
        evidence = ended.result if isinstance(ended.result, Mapping) else {"returned": ended.result}
        return Observation(done=True, evidence=evidence)

    def close(self) -> None:
        """Refuse whatever the agent still asks."""
        endpoint().close(self.session)

    abandon = close


def _plain(messages: list[Message]) -> str:
    return json.dumps([{**m, "name": ""} for m in messages], sort_keys=True)
