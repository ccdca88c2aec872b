"""The data that flows through the loop, in the order in which it is made.

    Task ─(engine)─► Rollout ─(rewards)─► Rollout with a Verdict ─(pack)─► Batch ─(learner)─► new weights

Legend for array names, everywhere in code and docs: B sequences, T response tokens, P prompt tokens, L = P + T,
V vocabulary; a suffix names the axes, so `logp_BT` is [sequences, response tokens].

This module imports no torch: a `Batch` holds tensors, and lives with the learner that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Message = dict[str, Any]
"""A chat message: `role`, `content` (text), and what else a chat template may ask for (`tool_calls`, `name`, …)."""
Span = tuple[int, int]
"""A stretch of token positions, [start, end)."""
Prompt = str | list[Message]

Outcome = Literal["correct", "wrong", "unparseable", "timeout", "crashed", "invalid_task", "infra_error"]
OUTCOMES: tuple[Outcome, ...] = (
    "correct",
    "wrong",
    "unparseable",
    "timeout",
    "crashed",
    "invalid_task",
    "infra_error",
)
MASKED: frozenset[Outcome] = frozenset({"invalid_task", "infra_error"})
"""Outcomes that say nothing about the response: such a sample is masked and counted, never a silent 0."""


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. `prompt` is text (used as it is) or chat messages (put through the chat template).

    `columns` holds what the rewards may ask for by name (`answer`, `tests`, any column of the user's);
    `solution` is a worked response for supervised training, or a conversation with calls of tools and what they gave;
    `difficulty` is the task's own dial, if it has one; `weight` is what its advantages are multiplied by, where a curriculum
    draws some tasks rather than others (run/curriculum.py).

    >>> Task(id="chain/0", prompt=[{"role": "user", "content": "3+4*2?"}], columns={"answer": "4"},
    ...      solution="3+4=7;7*2=4;A:4", difficulty=2).text
    '3+4*2?'
    """

    id: str
    prompt: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict)
    solution: str | list[Message] | None = None
    difficulty: float | None = None
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The prompt as plain text, for people and for models without a chat template."""
        return self.prompt if isinstance(self.prompt, str) else "\n\n".join(m["content"] for m in self.prompt)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rewards say of one response.

    `score` in [0, 1] is what the policy is trained on; `correct` in [0, 1] is the correctness part alone, the critic's
    target (shaping never reaches it). Both are ignored when the outcome is masked, or when a recipe's rule excludes the
    sample (`excluded`, e.g. truncated responses under `truncated = "mask"`).

    >>> Verdict(1.0, "correct", {"extracted": "4", "gold": "4"}).masked
    False
    """

    score: float
    outcome: Outcome
    evidence: Mapping[str, Any] = field(default_factory=dict)
    correctness: float | None = None
    excluded: bool = False

    @property
    def correct(self) -> float:
        """The critic's target: `correctness` where a reward is shaped, else the score itself."""
        return self.score if self.correctness is None else self.correctness

    @property
    def masked(self) -> bool:
        """True when this sample must not train anything, and leaves every denominator."""
        return self.excluded or self.outcome in MASKED


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled trajectory: token ids, the stretches of them that the policy wrote, and what the engine thought of these as it sampled.

    `ids` holds everything in order: the task's prompt, what the policy wrote, and what an environment answered in between. `turns` are the
    spans that the policy wrote; they are what is trained on, and all of them together are one action. A single answer is one turn
    (`Rollout.answer`). A response ends with the EOS that the model chose (`finish == "stop"`), which is an action like any other; a truncated
    one (`finish == "length"`) has none.

    `logps[t]` is the log-probability of the t-th token that the policy wrote, under the distribution it was sampled from, temperature (and
    any cut) included; `kept[t]`, where there is a cut, the log of the mass that it left. `text` leaves special tokens out. `greedy` is the judged
    greedy response to the same prompt, where the algorithm asks for one. `version` is the number of steps after which the weights that wrote it were taken.
    `evidence` is what an environment says of the trajectory, for the reward; `messages` is the whole conversation after the prompt, where there was
    more than one turn, and `text` its last turn. `environment` is the object itself, while the reward judges.
    """

    task: Task
    ids: Sequence[int]
    turns: Sequence[Span]
    logps: Sequence[float]
    finish: Literal["stop", "length"]
    text: str
    sample: int = 0
    verdict: Verdict | None = None
    kept: Sequence[float] = ()
    greedy: Rollout | None = None
    version: int = 0
    evidence: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Message] = ()
    environment: Any = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> list[Any]:
        """All but the environment, which stays in its process."""
        return [None if f.name == "environment" else getattr(self, f.name) for f in fields(self)]

    @classmethod
    def answer(
        cls,
        task: Task,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        logps: Sequence[float],
        finish: Literal["stop", "length"],
        text: str,
        sample: int = 0,
        verdict: Verdict | None = None,
        **more: Any,
    ) -> Rollout:
        """A trajectory of one turn: a prompt and the response to it.

        >>> r = Rollout.answer(Task("t", "3+4?"), [5, 6], [7, 1], [-0.1, -0.2], "stop", "7")
        >>> list(r.prompt_ids), list(r.response_ids), r.action_mask
        ([5, 6], [7, 1], [False, False, True, True])
        """
        ids = (*prompt_ids, *response_ids)
        return cls(task, ids, ((len(prompt_ids), len(ids)),), logps, finish, text, sample, verdict, **more)

    @property
    def prompt_ids(self) -> Sequence[int]:
        """What the policy read before its first token."""
        return self.ids[: self.turns[0][0]]

    @property
    def response_ids(self) -> Sequence[int]:
        """All tokens that the policy wrote, in order: what `logps` and `kept` are of."""
        if len(self.turns) == 1:
            start, end = self.turns[0]
            return self.ids[start:end]
        return [i for start, end in self.turns for i in self.ids[start:end]]

    @property
    def action_mask(self) -> list[bool]:
        """For each of `ids` whether the policy wrote it."""
        out = [False] * len(self.ids)
        for start, end in self.turns:
            out[start:end] = [True] * (end - start)
        return out

    def judged(self, verdict: Verdict) -> Rollout:
        """The same rollout with its verdict."""
        return replace(self, verdict=verdict)

    def answered(self, response_ids: Sequence[int], text: str, **changes: Any) -> Rollout:
        """The same prompt, answered in one turn by something else; without log-probabilities or a verdict unless `changes` has them."""
        prompt = self.prompt_ids
        ids = (*prompt, *response_ids)
        blank: dict[str, Any] = {"logps": [0.0] * len(response_ids), "kept": (), "verdict": None}
        return replace(self, ids=ids, turns=((len(prompt), len(ids)),), text=text, **(blank | changes))
