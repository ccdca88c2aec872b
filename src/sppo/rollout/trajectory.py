"""One trajectory as it grows: what the policy wrote, and what its environment answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..environments.base import Call, Environment, Maker, Observation, Reply
from ..errors import RecipeError, UserError
from ..models.policy import Policy
from ..types import Message, Rollout, Span, Task, Verdict
from .engine import Sample

FAILED = "environment failed"
"""The key of the evidence that says why an environment could not go on."""


def failure(evidence: Mapping[str, Any]) -> Verdict | None:
    """The verdict on a trajectory whose environment could not go on; None where it could."""
    return Verdict(0.0, "infra_error", {"reason": str(evidence[FAILED])}) if FAILED in evidence else None


@dataclass(slots=True, eq=False)
class Trajectory:
    """Its ids, turns and messages so far. `ask` may be called in any thread, one at a time; all else belongs to the collector's."""

    task: Task
    sample: int
    environment: Environment
    ids: list[int]
    seed: tuple[int | str, ...]
    turns: list[Span] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    version: int = 0
    finish: Any = "stop"
    done: bool = False
    tools: bool = False
    """Whether the environment offers tools, so that calls are looked for."""
    room: int = 0
    """Tokens that the policy may still write."""

    def ask(self, what: Task | Reply) -> Observation | Exception:
        """What the environment says to the task or to a turn, or what it raised; UserErrors are raised, of a recipe that cannot work."""
        step: Callable[[Any], Observation] = self.environment.reset if isinstance(what, Task) else self.environment.step
        try:
            return _checked(step(what), step)
        except UserError:
            raise
        except Exception as error:  # whatever an environment raises is this trajectory's alone
            return error

    def begin(self, policy: Policy, seen: Observation | Exception) -> None:
        """Take in what the environment says before the first turn."""
        observed = self._heard(seen)
        if self.failure is not None:
            return
        if observed.done:
            raise RecipeError(
                f"environment.use: its reset said that task {self.task.id} is done before the policy wrote anything"
            )
        self.tools = bool(observed.tools)
        if observed.messages or observed.tools or observed.added or observed.prompt:
            self.ids = policy.prompt_ids(offered(self.task, observed, policy))

    def wrote(self, policy: Policy, sample: Sample) -> Reply | None:
        """Take in a turn; returns what to ask the environment, None where the turn was cut and the trajectory is over."""
        self.turns.append((len(self.ids), len(self.ids) + len(sample.ids)))
        self.ids = [*self.ids, *sample.ids]
        self.logps += sample.logps
        self.kept += sample.kept
        self.finish, self.version = sample.finish, sample.version
        self.text, calls = policy.said(sample.ids) if self.tools else (policy.text(sample.ids), [])
        self.messages.append(said(self.text, calls))
        if sample.finish == "length":
            self.done = True
            return None
        return Reply(self.text, calls, sample.ids)

    def answered(self, policy: Policy, seen: Observation | Exception) -> None:
        """Take in what the environment says to a turn."""
        observed = self._heard(seen)
        if observed.messages:
            self.messages += observed.messages
            if self.tools and (held := sum(policy.would_call(str(m["content"])) for m in observed.messages)):
                self.evidence["calls_in_results"] = self.evidence.get("calls_in_results", 0) + held
        if observed.messages and not self.done:
            self.ids = [*self.ids, *policy.continuation_ids(observed.messages, self.ids[-1])]

    def _heard(self, seen: Observation | Exception) -> Observation:
        if isinstance(seen, Exception):
            self.fail(f"the environment raised {type(seen).__name__}: {seen}")
            return Observation(done=True)
        self.evidence |= seen.evidence
        self.done = seen.done
        return seen

    def fail(self, reason: str) -> None:
        """The environment cannot go on: the trajectory is masked."""
        self.evidence, self.done = {**self.evidence, FAILED: reason[:2000]}, True

    @property
    def failure(self) -> Verdict | None:
        """Set where the environment could not go on."""
        return failure(self.evidence)

    def close(self, hung: bool = False) -> None:
        """Let go of the environment; of one that hangs as far as it can be."""
        close = getattr(self.environment, "abandon", lambda: None) if hung else self.environment.close
        try:
            self.evidence |= close() or {}
        except Exception as error:  # the others must be closed all the same
            self.fail(f"the environment raised {type(error).__name__}: {error}")

    def has_room(self, max_tokens: int, context: int | None) -> bool:
        """Whether the policy may write on; where it may not, the trajectory is cut."""
        self.room = max_tokens - len(self.logps)
        if context is not None and (self.turns or self.tools):
            self.room = min(self.room, context - len(self.ids))
        if self.room < 1 and not self.turns:
            self.fail("the prompt, with what the environment adds to it, leaves no room for an answer")
        elif self.room < 1:
            self.finish, self.done = "length", True
        return not self.done

    def rollout(self) -> Rollout:
        """What became of it. A trajectory that failed before the first token has an empty turn."""
        turns = self.turns or [(len(self.ids), len(self.ids))]
        several = len(turns) > 1 or self.tools
        return Rollout(
            self.task, self.ids, turns, self.logps, self.finish, self.text, self.sample, kept=self.kept, evidence=self.evidence,
            version=self.version, messages=self.messages if several else (), environment=getattr(self.environment, "given", None),
        )  # fmt: skip


def offered(task: Task, seen: Observation, policy: Policy) -> Task:
    """A task as the policy reads it: with what the environment adds to its prompt, and the tools that it offers."""
    own = list(seen.prompt) or task.prompt
    if isinstance(own, str) and not policy.chat and not seen.messages:
        return replace(task, prompt=own + seen.added)  # a model of plain text is told nothing of tools
    given: list[Message] = [{"role": "user", "content": own}] if isinstance(own, str) else [*own]
    if seen.added:
        given[-1] = {**given[-1], "content": str(given[-1]["content"]) + seen.added}
    columns: Mapping[str, Any] = {**task.columns, "tools": list(seen.tools)} if seen.tools else task.columns
    messages = policy.manner.offered([*given, *seen.messages], seen.tools) if policy.chat else [*given, *seen.messages]
    return replace(task, prompt=messages, columns=columns)


def asked(environment: Maker, policy: Policy, task: Task) -> Task:
    """A task as its environment puts it to the policy. Raises what that raises."""
    if not environment.answers:
        return task
    one = environment()
    try:
        return offered(task, one.reset(task), policy)
    finally:
        one.close()


def said(text: str, calls: list[Call]) -> Message:
    """A turn of the policy as a chat message."""
    message: Message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": c.name, "arguments": dict(c.arguments)},
                **({"error": c.error} if c.error else {}),
            }
            for c in calls
        ]
    return message


def _checked(seen: Any, step: Callable[[Any], Any]) -> Observation:
    """What an environment answered. Raises RecipeError where it is nothing that an environment answers."""
    who = getattr(step, "__qualname__", "the environment")
    if not isinstance(seen, Observation):
        raise RecipeError(
            f"environment.use: {who} returned {type(seen).__name__}; it must return an Observation, e.g. "
            "Observation([{'role': 'user', 'content': '…'}]) or Observation(done=True)"
        )
    for message in [seen.messages] if isinstance(seen.messages, str) else seen.messages:
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise RecipeError(
                f"environment.use: {who} returned the message {str(message)[:60]!r}; a message is a dict with `role` and `content`"
            )
    return seen
