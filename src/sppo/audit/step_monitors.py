"""Monitors of steps: numbers and texts of a step that show verifier failures, drift or collapse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..types import Rollout
from .detect import Level, Rate
from .verdict_monitors import rewarded

Finding = tuple[str, str, int, str, str, Sequence[int]]
"""(monitor, what, since, why, advice, rows of this step)."""


class Stepwise(ABC):
    """Looks at a step as a whole."""

    name = ""

    @abstractmethod
    def look(
        self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any], out: dict[str, float]
    ) -> list[Finding]:
        """What it found; it may add metrics to `out`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Take it back."""


WATCHED = {
    "timeout": ("more responses run into the verifier's time limit", "look at what they do; raise the limit if it is honest work"),
    "crashed": ("more responses crash the verifier's worker", "look at the evidence: a parser may be under attack, or out of memory"),
    "unparseable": ("more responses give no answer that can be read", "look at them: the format is being lost; reward it (gate format:…)"),
    "invalid_task": ("more problems cannot be graded", "these rows have no reference that can be read: fix the data"),
    "infra_error": ("the verifier fails more often", "its machinery is at fault, not the responses: see the evidence's reason"),
}  # fmt: skip


class Rated(Stepwise):
    """Watches rates, whose state is all of its own."""

    rates: dict[str, Rate]

    def state_dict(self) -> dict[str, Any]:
        """See `Stepwise`."""
        return {name: rate.state_dict() for name, rate in self.rates.items()}

    def load(self, state: dict[str, Any]) -> None:
        """See `Stepwise`."""
        for name, rate in self.rates.items():
            rate.load(state[name])


class Outcomes(Rated):
    """Failures of the verifier itself."""

    name = "outcomes"

    def __init__(self) -> None:
        self.rates = {name: Rate(0.2, level=10.0) for name in WATCHED}

    def look(
        self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any], out: dict[str, float]
    ) -> list[Finding]:
        found: list[Finding] = []
        for name, rate in self.rates.items():
            rows = [i for i, r in enumerate(rollouts) if r.verdict and r.verdict.outcome == name]
            of: dict[str, list[bool]] = {}
            for r in rollouts:  # each problem is a trial: sixteen samples of one bad row show one bad row
                of.setdefault(r.task.id, []).append(r.verdict is not None and r.verdict.outcome == name)
            if rate.feed(step, sum(sum(v) / len(v) for v in of.values()), len(of)):
                what, advice = WATCHED[name]
                why = f"{len(rows)} of {len(rollouts)} in this step, usual is {rate.usual:.0%} of the problems or less"
                found.append((name, what, rate.since, why, advice, rows))
        return found


class Text(Stepwise):
    """Responses that grow, repeat themselves or change their script while the reward does not rise, for right and for
    wrong ones."""

    name = "text"

    def __init__(self) -> None:
        names = [f"{what}_{kind}" for what in ("length", "repetition", "script") for kind in ("right", "wrong")]
        self.levels = {name: Level() for name in [*names, "reward"]}
        self.best = -1.0  # the reward's moving mean at its highest

    def look(
        self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any], out: dict[str, float]
    ) -> list[Finding]:
        reward = metrics.get("reward/correct")
        if reward is None:
            return []
        self.levels["reward"].feed(reward)
        if self.levels["reward"].now > self.best + 0.01:  # values that came with a better policy are the new normal
            self.best = self.levels["reward"].now
            for level in self.levels.values():
                level.start = level.now
        found: list[Finding] = []
        for kind in ("right", "wrong"):
            rows = [
                i
                for i, r in enumerate(rollouts)
                if r.verdict and not r.verdict.masked and rewarded(r) == (kind == "right")
            ]
            if len(rows) < 4:  # a mean over fewer is noise
                continue
            some = rows[:64]
            values = {
                "length": float(np.mean([len(rollouts[i].response_ids) for i in rows])),
                "repetition": float(np.mean([repetition(rollouts[i].response_ids) for i in some])),
                "script": float(np.mean([other_script(rollouts[i].text) for i in some])),
            }
            for what, value in values.items():
                out[f"text/{what}_{kind}"] = value
                level = self.levels[f"{what}_{kind}"]
                sure = level.feed(value)
                far = level.now > 2 * level.start + 4 if what == "length" else level.now > level.start + 0.25
                if sure and far:
                    worst = sorted(rows, key=lambda i: -len(rollouts[i].response_ids)) if what == "length" else some
                    found.append((f"{what}_{kind}", *self._words(what, kind, level, step), worst))
        return found

    def _words(self, what: str, kind: str, level: Level, step: int) -> tuple[str, int, str, str]:
        since = max(0, step - round(1 / level.weight))  # what its mean looks back on
        if what == "length":
            sentence, unit = f"{kind} responses grow longer, and no better", "tokens"
            advice = "long wrong answers may be paid too well: reward.use … + 0.1 * length, or ratio = 'sequence' instead of token means"
        elif what == "repetition":
            sentence, unit = f"{kind} responses repeat themselves", "of their 4-grams are repeats"
            advice = (
                "a loop often follows a learning rate that is too high; read some, lower training.lr, add objective.kl"
            )
        else:
            sentence, unit = (
                f"{kind} responses change their script",
                "of their letters are of another alphabet than Latin",
            )
            advice = "languages are mixed: gate a format on it, or add objective.kl to stay near the start"
        form = "{:.0f}" if what == "length" else "{:.0%}"
        return (
            sentence,
            since,
            f"{form.format(level.now)} {unit}, and {form.format(level.start)} when the reward last rose",
            advice,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"levels": {name: level.state_dict() for name, level in self.levels.items()}, "best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        for name, level in self.levels.items():
            level.load(state["levels"][name])


class Spread(Stepwise):
    """Nothing left to explore, or to learn from, before the problems are solved."""

    name = "spread"
    SOLVED, FLAT_STEPS = 0.8, 5

    def __init__(self) -> None:
        self.entropy = Level(learn=5)
        self.flat = 0

    def look(
        self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any], out: dict[str, float]
    ) -> list[Finding]:
        reward, entropy, spread = (metrics.get(k) for k in ("reward/correct", "policy/entropy", "advantage/std"))
        if reward is None:
            return []
        found: list[Finding] = []
        discrete = not (
            rollouts and "start" in rollouts[0].task.columns
        )  # of a control task's density it may be anything
        if discrete and entropy is not None and math.isfinite(entropy):
            sure = self.entropy.feed(float(entropy))
            if sure and self.entropy.now < 0.05 * self.entropy.start and reward < self.SOLVED:
                why = f"{self.entropy.now:.2g} nats per token, and {self.entropy.start:.2g} at the start, with {reward:.0%} solved"
                advice = "lower training.lr, widen the upper clip (objective.clip = [0.2, 0.28]), raise rollout.temperature, or set objective.entropy_bonus"
                found.append(
                    (
                        "entropy",
                        "the policy has stopped exploring before it solves the problems",
                        max(0, step - 5),
                        why,
                        advice,
                        (),
                    )
                )
        self.flat = self.flat + 1 if spread is not None and spread < 0.02 and reward < self.SOLVED else 0
        if self.flat >= self.FLAT_STEPS:
            why = f"for {self.flat} steps all advantages were the same within 0.02, with {reward:.0%} solved"
            advice = "easier problems first (curriculum.kind = 'staged'), [search] for the hard ones, or a [bootstrap] that solves some"
            found.append(("advantage", "there is nothing to learn from", step - self.flat + 1, why, advice, ()))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self.entropy.state_dict(), "flat": self.flat}

    def load(self, state: dict[str, Any]) -> None:
        self.entropy.load(state["entropy"])
        self.flat = state["flat"]


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """The share of a response's n-grams that were there before. [tokens] → [0, 1)."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def other_script(text: str) -> float:
    """The share of letters that are not of the Latin alphabet (Greek, which mathematics writes, aside)."""
    letters = [c for c in text[:20_000] if c.isalpha()]
    return sum(ord(c) > 0x3FF and not 0x1E00 <= ord(c) <= 0x1FFF for c in letters) / len(letters) if letters else 0.0
