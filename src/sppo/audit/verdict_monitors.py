"""Monitors of verdicts: each objects to some of the responses judged right; a sequential test watches its rate of
objections.

The trials of a test are problems, not responses, because samples of one problem are not independent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..rewards.answer import choice_letter, gold_of
from ..rewards.base import TEST_COLUMNS, Reward
from ..rewards.combine import MixedReward
from ..rewards.loading import load_reward
from ..rewards.user_reward import CallableReward, UserJudge
from ..rollout.sampler import sample_seed
from ..types import Rollout, Task
from .detect import Cusum, Rate

OTHERS = 2
"""References of other problems that a response is held against (fewer where there are fewer); it is objected to if it
passes them all."""


class Verifying(ABC):
    """Objects to some responses.

    `rate` decides when objections are too many; `free`: looking costs nothing, so every response is looked at.
    """

    name, what, advice, free = "", "", "", False

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.broken = False  # it could not judge what it was given, and is not asked again

    def concerns(self, rollout: Rollout) -> bool:
        """Whether this rollout can be looked at."""
        return rewarded(rollout)

    @abstractmethod
    def object_to(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[int] | None:
        """Those of the chosen rows that it objects to; None where it could not look. Raises RewardError."""

    def feed(self, step: int, rollouts: Sequence[Rollout], flagged: Sequence[int], chosen: Sequence[int]) -> bool:
        """Give the test what was found: each problem is a trial, its event the share of its responses that were
        objected to."""
        of: dict[str, list[bool]] = {}
        bad = set(flagged)
        for i in chosen:
            of.setdefault(rollouts[i].task.id, []).append(i in bad)
        return self.rate.feed(step, sum(sum(v) / len(v) for v in of.values()), len(of))

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Close what it started."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        return {"rate": self.rate.state_dict(), "broken": self.broken}

    def load(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.rate.load(state["rate"])
        self.broken = state["broken"]


class Reference(Verifying):
    """A response that passes for problems that it was not written for."""

    name = "reference"
    what = "responses are rewarded whatever the reference says"
    advice = (
        "read them: the verifier has a hole. A stricter reward shows what the policy can do: sppo eval RUN --reward …. Close the hole, or mask what uses it: "
        "monitors.action = 'quarantine'"
    )

    def __init__(self, reward: Reward) -> None:
        super().__init__(Rate(0.1, learn=0))
        self.rate.test = Cusum(0.01, 0.15)  # no honest response does it: nothing to learn first
        self.reward = reward

    def object_to(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[int] | None:
        references: dict[str, Task] = {}
        for r in rollouts:  # one problem for each reference
            if (key := reference_of(r.task)) is not None:
                references.setdefault(key, r.task)
        held: list[tuple[int, Rollout]] = []
        keys = sorted(references)
        for i in chosen:
            own = reference_of(rollouts[i].task)
            others = [k for k in keys if k != own]
            if own is None or not others:
                continue
            first, apart = sample_seed("others", rollouts[i].task.id), max(1, len(others) // OTHERS)
            for k in {(first + n * apart) % len(others) for n in range(OTHERS)}:
                held.append((i, replace(rollouts[i], task=references[others[k]], verdict=None)))
        if not held:
            return None
        passed: dict[int, bool] = {}
        for (i, _), found in zip(held, self.reward.judge([r for _, r in held]), strict=True):
            judged = rollouts[i].verdict
            whole = judged is not None and found.outcome == "correct" and found.correct >= judged.correct - 1e-6
            passed[i] = (
                passed.get(i, True) and whole and not found.masked
            )  # partial credit for what all answers have is no hole
        return [i for i, every in passed.items() if every]


class Hidden(Verifying):
    """A program that does what the visible tests ask, and not what the hidden ones do."""

    name, free = "hidden", True
    what = "more programs pass the visible tests and fail the hidden ones"
    advice = (
        "programs are written for the tests that they see: reward hidden tests (reward.use = 'code:…'), or show fewer"
    )

    def __init__(self) -> None:
        super().__init__(Rate(0.15, most=0.4))

    def concerns(self, rollout: Rollout) -> bool:
        m = measures(rollout)
        return "hidden_pass_rate" in m and m.get("visible_pass_rate", 0.0) >= 1

    def object_to(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[int] | None:
        return [i for i in chosen if measures(rollouts[i])["hidden_pass_rate"] < 1]


class Second(Verifying):
    """A response that another verifier does not pass."""

    name = "second"
    what = "the second verifier rejects more of what is rewarded"
    advice = "read those that the two disagree on: one of them is wrong, and the policy learns from the first"

    def __init__(self, use: str, limit: float) -> None:
        super().__init__(Rate(0.15, most=0.1))
        self.reward = load_reward(use, limit)

    def object_to(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[int] | None:
        verdicts = self.reward.judge([replace(rollouts[i], verdict=None) for i in chosen])
        return [i for i, v in zip(chosen, verdicts, strict=True) if not v.masked and v.correct < 0.5]

    def close(self) -> None:
        self.reward.close()


def reads_reference(reward: Any) -> bool:
    """Whether what this reward calls correct depends on a problem's reference (an answer, tests). One that says
    `reference_free = True` (a class, an object or a function of yours may) does not."""
    if isinstance(reward, MixedReward):
        return any(reads_reference(p.reward) for i, p in enumerate(reward.parts) if i == 0 or p.role == "and")
    inner = reward.function if isinstance(reward, CallableReward) else getattr(reward, "inner", reward)
    if isinstance(inner, MixedReward | CallableReward | UserJudge):  # judged elsewhere (cluster/verifiers.py)
        return reads_reference(inner)
    return not getattr(inner, "reference_free", False)


def reference_of(task: Task) -> str | None:
    """What a problem's responses are held against, as text (of a multiple choice its letter); None where it has nothing
    of the kind."""
    for name in TEST_COLUMNS:
        if task.columns.get(name):
            return repr(task.columns[name])
    return choice_letter(task) or gold_of(task) or None


def rewarded(rollout: Rollout) -> bool:
    """Whether a response was judged right and is paid for it."""
    v = rollout.verdict
    return v is not None and not v.masked and v.outcome == "correct" and v.correct >= 0.5 and v.score > 0


def measures(rollout: Rollout) -> dict[str, float]:
    """What its reward measured besides the score."""
    found: dict[str, float] = rollout.verdict.evidence.get("measures", {}) if rollout.verdict else {}
    return found
