"""The environment's socket.

An environment answers what the policy writes, turn by turn, until it says that the trajectory is over; the reward judges the whole. There is one
object per trajectory. A single answer is the trivial case (`single_turn.py`). One of your own is a class in a file of yours,
`environment.use = "mine:Guess"`:

    from sppo.environments.base import Observation

    class Guess:
        \"\"\"Three tries at a number; the policy is told whether it is too low or too high.\"\"\"

        def reset(self, task):
            self.secret, self.tries = int(task.columns["answer"]), 3
            return Observation()  # nothing beyond the task's own prompt

        def step(self, reply):
            self.tries -= 1
            try:
                guess = int(reply.text)
            except ValueError:  # never let what the policy writes raise: that would mask its failures
                return Observation([{"role": "user", "content": "a number, please"}], done=not self.tries)
            if guess == self.secret or not self.tries:
                return Observation(done=True, evidence={"found": guess == self.secret})
            return Observation([{"role": "user", "content": "too low" if guess < self.secret else "too high"}])

        def close(self):
            pass

    def found(completions, evidence, **columns):  # reward.use = "mine:found"
        return [float(e.get("found", False)) for e in evidence]

A function reward gets all messages of a trajectory as its completion, and the column `evidence`; an object with `judge` reads
`Rollout.messages` and `Rollout.evidence`. `rollout.max_tokens` is of all that the policy writes in a trajectory; a turn that is cut there ends it
without another `step`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..types import Message, Task

POSITIONAL = "*"
"""The key of a call's arguments under which those without a name come, in order."""


class Broken(Exception):
    """What a tool or an environment raises where it cannot go on for no fault of the policy's: the trajectory is masked and counted."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the policy calls, and with what. `error` says what is wrong with a call that cannot be read, for the policy."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def shown(function: Mapping[str, Any]) -> str:
    """A call that was recorded (`tool_calls` of a message), for people.

    >>> shown({"name": "add", "arguments": {"*": [1], "b": "x"}})
    'add(1, b="x")'
    """
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
        return f"{function.get('name')}({json.dumps(arguments, ensure_ascii=False)})"
    said = {key: json.dumps(value, ensure_ascii=False) for key, value in arguments.items() if key != POSITIONAL}
    placed = arguments.get(POSITIONAL, [])
    each = [json.dumps(value, ensure_ascii=False) for value in (placed if isinstance(placed, list) else [placed])]
    return f"{function.get('name')}({', '.join([*each, *(f'{key}={value}' for key, value in said.items())])})"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the policy did in a turn: the text it wrote beside its calls, the calls, its ids, or, for a policy that writes no text, its `action`."""

    text: str = ""
    calls: Sequence[Call] = ()
    ids: Sequence[int] = ()
    action: Any = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What the policy sees next: messages (role `user` or `tool`), or, for a policy that reads no text, `values`; whether the trajectory is over;
    and what the environment knows of it, for the reward (`Rollout.evidence`). `reset` may also offer tools that the policy may call, as JSON
    schemas, add a text to the task's last message, or put another `prompt` in the task's place."""

    messages: Sequence[Message] = ()
    done: bool = False
    evidence: Mapping[str, Any] = field(default_factory=dict)
    values: Any = None
    tools: Sequence[Mapping[str, Any]] = ()
    added: str = ""
    prompt: Sequence[Message] = ()


class Environment(Protocol):
    """One trajectory's surroundings. Whatever it raises masks the trajectory and is counted, never a score
    of 0; where more than a tenth of a step's trajectories fail, the run stops, saved as it was before the step."""

    def reset(self, task: Task) -> Observation:
        """Begin. Messages returned here follow the task's own prompt."""

    def step(self, reply: Reply) -> Observation:
        """Answer a turn."""

    def close(self) -> Mapping[str, Any] | None:
        """The trajectory is over. What is known only now goes to the evidence. An environment that is given up while it is asked is not
        closed; its `abandon()` is called, if it has one, while another thread is still inside."""


@dataclass(frozen=True)
class Maker:
    """Makes the environment of one trajectory. `workers` are asked at a time, in threads, and none may think longer than `seconds`."""

    make: Callable[[], Environment]
    workers: int = 16
    seconds: float = 60.0
    tokens: int = 0
    """Of a whole trajectory, at most; 0: as many as the model can read."""
    answers: bool = True
    """Whether there may be a second turn."""

    def __call__(self) -> Environment:
        """An environment."""
        return self.make()
