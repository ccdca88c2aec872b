"""The data that flows through the loop, in the order in which it is made.

    Task ─(engine)─► Rollout ─(rewards)─► Rollout with a Verdict ─(pack)─► Batch ─(learner)─► StepReport

Legend for array names, everywhere in code and docs: B sequences, T response tokens, P prompt tokens, L = P + T,
V vocabulary; a suffix names the axes, so `logp_BT` is [sequences, response tokens].

This module imports no torch: a `Batch` holds tensors, and lives with the learner that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Message = dict[str, Any]
"""A chat message: `role`, `content` (text), and what else a chat template may ask for (`tool_calls`, `name`, …)."""
Fork = tuple[int, int, int]
"""Where a response was one of several that go on from a prefix: how many tokens that has, which child this is, of how many."""
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
    `solution` is a worked response for supervised training; `difficulty` is the task's own dial, if it has one; `weight` is what its
    advantages are multiplied by, where a curriculum draws some tasks rather than others (run/curriculum.py).

    >>> Task(id="chain/0", prompt=[{"role": "user", "content": "3+4*2?"}], columns={"answer": "4"},
    ...      solution="3+4=7;7*2=4;A:4", difficulty=2).text
    '3+4*2?'
    """

    id: str
    prompt: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict)
    solution: str | None = None
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
    """One sampled response: the ids that were sampled, and what the engine thought of them as it sampled.

    `response_ids` ends with the EOS the model chose (`finish == "stop"`), which is an action like any other; a
    truncated response (`finish == "length"`) has none. `logps[t]` is the log-probability of `response_ids[t]` under the
    sampling distribution, temperature (and any cut) included; `kept[t]`, where there is a cut, the log of the mass that it left.
    `text` leaves special tokens out. `greedy` is the judged greedy response to the same prompt, where the algorithm asks for one.
    `version` is the number of steps after which the weights that wrote it were taken.
    `forks` says where it left others of its prompt's tree (rollout/tree.py).
    """

    task: Task
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    logps: Sequence[float]
    finish: Literal["stop", "length"]
    text: str
    sample: int = 0
    verdict: Verdict | None = None
    kept: Sequence[float] = ()
    greedy: Rollout | None = None
    version: int = 0
    forks: tuple[Fork, ...] = ()

    @property
    def share(self) -> float:
        """Its part of the prompt's outcome: 1, or the product of 1 / children over the forks of a tree."""
        return 1 / math.prod(children for _, _, children in self.forks)

    def judged(self, verdict: Verdict) -> Rollout:
        """The same rollout with its verdict."""
        return replace(self, verdict=verdict)


@dataclass(slots=True)
class StepReport:
    """What one training step leaves in `metrics.jsonl`: plain numbers by name, `None` where one cannot be measured."""

    step: int
    metrics: dict[str, float | int | str | None]
