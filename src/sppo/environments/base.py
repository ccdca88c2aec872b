"""The environment's socket, and how a recipe's `task.environment` becomes one.

An environment answers what the policy writes, turn by turn, until it says that the trajectory is over; the reward judges the whole. There is one
object per trajectory. A single answer is the trivial case (`single_turn.py`). One of your own is a class in a file of yours,
`task.environment = "mine:Guess"`:

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import RecipeError
from ..spec import maker
from ..types import Message, Task


@dataclass(frozen=True, slots=True)
class Reply:
    """What the policy did in a turn: the text it wrote, its ids, or, for a policy that writes no text, its `action`."""

    text: str = ""
    ids: Sequence[int] = ()
    action: Any = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What the policy sees next: messages (role `user` or `tool`), or, for a policy that reads no text, `values`; whether the trajectory is over;
    and what the environment knows of it, for the reward (`Rollout.evidence`)."""

    messages: Sequence[Message] = ()
    done: bool = False
    evidence: Mapping[str, Any] = field(default_factory=dict)
    values: Any = None


class Environment(Protocol):
    """One trajectory's surroundings. Whatever it raises masks the trajectory and is counted, never a score
    of 0; where more than a tenth of a step's trajectories fail, the run stops, saved as it was before the step."""

    def reset(self, task: Task) -> Observation:
        """Begin. Messages returned here follow the task's own prompt."""

    def step(self, reply: Reply) -> Observation:
        """Answer a turn."""

    def close(self) -> None:
        """The trajectory is over, or was given up."""


Maker = Callable[[], Environment]
"""Makes the environment of one trajectory."""
ASKED = ("reset", "step", "close")


def load_environment(use: str) -> Maker:
    """What `task.environment` names. Raises RecipeError, also for an object that lacks what an environment needs."""
    made: Maker = maker(use, "sppo.environments", "task.environment")
    first = made()
    missing = [name for name in ASKED if not callable(getattr(first, name, None))]
    if missing:
        raise RecipeError(
            f"task.environment = {use!r} makes a {type(first).__name__} without {', '.join(missing)}: an environment has "
            f"{', '.join(ASKED)} (environments/base.py has an example)"
        )
    first.close()
    return made
