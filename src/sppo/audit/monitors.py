"""Is the policy getting better, or at fooling its verifier? Monitors that look at every step, and say what, since when, and what to do.

    reference   a rewarded response is judged as an answer to two other problems with other references. An honest one is right for neither; one
                that passes both is paid whatever the reference says. (It is what a canary prompt with a wrong reference tests, without
                sampling one: the policy never sees the reference.)
    hidden      programs that pass the visible tests and fail the hidden ones
    second      rewarded responses that a second verifier rejects (`monitors.second`)
    work        right answers that stay right when the chain of thought is cut to nothing and the answer is forced (audit/work.py)
    outcomes    the verifier times out, crashes, cannot grade or cannot read more often than it used to
    length, repetition, script      wrong (or right) responses that drift without the reward rising
    entropy, advantage              nothing is explored, or nothing can be learnt, while problems stay unsolved

A verifying monitor's responses can be quarantined: masked, never scored 0. State is plain numbers, kept in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import RewardError
from ..evaluation.intervals import wilson
from ..rewards.answer import gold_of
from ..rewards.base import TEST_COLUMNS, Reward, load_reward
from ..rewards.combine import MixedReward
from ..rollout.collect import sample_seed
from ..sections import MonitorsSection
from ..types import Rollout, Task
from .detect import Cusum, Level, Rate

EXAMPLES = 8
"""Rollouts that an alert points to."""
OTHERS = 2
"""References of other problems that a response is held against (fewer where there are fewer); it is objected to if it passes them all."""


@dataclass(frozen=True)
class Alert:
    """What a person is told. `evidence` names rollouts as `step:row`."""

    step: int
    monitor: str
    what: str
    since: int
    why: str
    advice: str
    action: str
    evidence: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For alerts.jsonl."""
        return {**self.__dict__, "evidence": list(self.evidence)}


class Monitors:
    """All of them. `inspect` comes between judging and learning, `look` after the update; `alerts` are those that are not fetched yet."""

    def __init__(self, section: MonitorsSection, reward: Reward, seed: int, limit: float) -> None:
        """Raises RecipeError where `second` names no reward."""
        self.section, self.seed = section, seed
        self.on = section.action != "off"
        self.verifying: list[_Verifying] = []
        if self.on:
            if section.sample and reads_reference(reward):
                self.verifying.append(_Reference(reward))
            self.verifying.append(_Hidden())
            if section.second:
                self.verifying.append(_Second(section.second, limit))
        self.stepwise: list[_Stepwise] = [_Outcomes(), _Text(), _Spread()] if self.on else []
        self.raised: dict[
            str, int
        ] = {}  # monitor: the step of its alert; one alert each, because a second one says nothing new
        self.alerts: list[Alert] = []
        self.recent: dict[str, list[str]] = {}  # the newest rollouts that a verifying monitor objected to

    def inspect(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], dict[str, float]]:
        """A step's judged rollouts, with those masked that are in quarantine; and metrics."""
        out, metrics = list(rollouts), {}
        for m in self.verifying:
            everything = self.section.action == "quarantine" and m.name in self.raised
            eligible = [i for i, r in enumerate(rollouts) if r.verdict and not r.verdict.masked and m.concerns(r)]
            chosen = eligible if everything else _sample(eligible, self.section.sample, (self.seed, m.name, step))
            flagged = m.object_to(rollouts, chosen)
            if flagged is None or not chosen:
                continue
            metrics[f"monitor/{m.name}"] = len(flagged) / len(chosen)
            kept = [*[f"{step}:{i}" for i in flagged], *self.recent.get(m.name, [])]
            self.recent[m.name] = kept[:EXAMPLES]
            if m.rate.feed(step, len(flagged), len(chosen)):
                low, high = wilson(len(flagged), len(chosen))
                share = f"{len(flagged)} of {len(chosen)} looked at in this step (95% interval {low:.0%} to {high:.0%})"
                self._raise(
                    step, m.name, m.what, m.rate.since, f"{share}; usual is {m.rate.usual:.0%} or less", m.advice
                )
            if self.section.action == "quarantine" and m.name in self.raised:
                for i in flagged:
                    out[i] = _quarantined(out[i], m.name)
        if self.section.action == "quarantine" and self.on:
            metrics["monitor/quarantined"] = sum("quarantined" in r.verdict.evidence for r in out if r.verdict)
        return out, metrics

    def look(self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any]) -> dict[str, float]:
        """After the update: what the step's numbers and texts tell; metrics of the texts."""
        found: dict[str, float] = {}
        for m in self.stepwise:
            for name, what, since, why, advice, rows in m.look(step, rollouts, metrics, found):
                self._raise(step, name, what, since, why, advice, tuple(f"{step}:{i}" for i in rows[:EXAMPLES]), "warn")
        return found

    def work(self, step: int, kept: dict[float, tuple[int, int]]) -> dict[str, float]:
        """After a look at answers without work (audit/work.py): of right answers, how many stayed right, by share of the chain that was left."""
        metrics = {f"monitor/right_with_{round(100 * share)}pct_of_work": k / n for share, (k, n) in kept.items() if n}
        right, n = kept.get(0.0, (0, 0))
        low, _ = wilson(right, n)
        if n and low > 0.7:
            why = f"{right} of {n} right answers stay right with the whole chain cut away and the answer forced"
            advice = "the chain is decoration: ask for problems that need it, reward steps, or save the tokens"
            self._raise(
                step, "work", "answers do not need the work that is written before them", step, why, advice, (), "warn"
            )
        return metrics

    def fetch(self) -> list[Alert]:
        """Alerts raised since the last call."""
        new, self.alerts = self.alerts, []
        return new

    def _raise(
        self,
        step: int,
        name: str,
        what: str,
        since: int,
        why: str,
        advice: str,
        rows: tuple[str, ...] | None = None,
        action: str = "",
    ) -> None:
        if name in self.raised:
            return
        self.raised[name] = step
        evidence = tuple(self.recent.get(name, ())) if rows is None else rows
        self.alerts.append(Alert(step, name, what, since, why, advice, action or self.section.action, evidence))

    def _parts(self) -> Iterator[_Verifying | _Stepwise]:
        yield from self.verifying
        yield from self.stepwise

    def close(self) -> None:
        """End what a second verifier started."""
        for m in self.verifying:
            m.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to raise the same alerts."""
        return {
            "raised": dict(self.raised),
            "recent": {k: list(v) for k, v in self.recent.items()},
            "parts": {p.name: p.state_dict() for p in self._parts()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.raised, self.recent = dict(state["raised"]), {k: list(v) for k, v in state["recent"].items()}
        for part in self._parts():
            if part.name in state["parts"]:
                part.load(state["parts"][part.name])


# -- what verdicts are worth -----------------------------------------------------------------------------------------


class _Verifying:
    """Objects to some responses. `rate` decides when objections are too many."""

    name, what, advice = "", "", ""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate

    def concerns(self, rollout: Rollout) -> bool:
        """Whether this rollout can be looked at."""
        return _rewarded(rollout)

    def object_to(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[int] | None:
        """Those of the chosen rows that it objects to; None where it could not look."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to end."""

    def state_dict(self) -> dict[str, Any]:
        return self.rate.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.rate.load(state)


class _Reference(_Verifying):
    """A response that passes for problems that it was not written for."""

    name = "reference"
    what = "responses are rewarded whatever the reference says"
    advice = "read them: the verifier has a hole; close it (a stricter extraction, hidden tests), or mask them: monitors.action = 'quarantine'"

    def __init__(self, reward: Reward) -> None:
        super().__init__(Rate(0.1, learn=0))
        self.rate.test = Cusum(0.01, 0.15)  # no honest response does it: nothing to learn first
        self.reward = reward
        self.broken = False

    def object_to(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[int] | None:
        if self.broken or not chosen:
            return None
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
        try:
            verdicts = self.reward.judge([r for _, r in held])
        except RewardError:
            self.broken = True  # a reward that cannot judge other pairs than its own
            return None
        passed: dict[int, bool] = {}
        for (i, _), verdict in zip(held, verdicts, strict=True):
            passed[i] = passed.get(i, True) and not verdict.masked and verdict.correct >= 0.5
        return [i for i, every in passed.items() if every]


class _Hidden(_Verifying):
    """A program that does what the visible tests ask, and not what the hidden ones do."""

    name = "hidden"
    what = "more programs pass the visible tests and fail the hidden ones"
    advice = (
        "programs are written for the tests that they see: reward hidden tests (reward.use = 'code:…'), or show fewer"
    )

    def __init__(self) -> None:
        super().__init__(Rate(0.15, most=0.3))

    def concerns(self, rollout: Rollout) -> bool:
        m = _measures(rollout)
        return "hidden_pass_rate" in m and m.get("visible_pass_rate", 0.0) >= 1

    def object_to(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[int] | None:
        return [i for i in chosen if _measures(rollouts[i])["hidden_pass_rate"] < 1]


class _Second(_Verifying):
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


def reads_reference(reward: Reward) -> bool:
    """Whether what this reward calls correct depends on a problem's reference (an answer, tests)."""
    if isinstance(reward, MixedReward):
        return any(reads_reference(p.reward) for i, p in enumerate(reward.parts) if i == 0 or p.role == "and")
    return not getattr(reward, "reference_free", False)


def reference_of(task: Task) -> str | None:
    """What a problem's responses are held against, as text; None where it has nothing of the kind."""
    for name in TEST_COLUMNS:
        if task.columns.get(name):
            return repr(task.columns[name])
    return gold_of(task) or None


def _rewarded(rollout: Rollout) -> bool:
    v = rollout.verdict
    return v is not None and not v.masked and v.outcome == "correct" and v.correct >= 0.5


def _measures(rollout: Rollout) -> dict[str, float]:
    found: dict[str, float] = rollout.verdict.evidence.get("measures", {}) if rollout.verdict else {}
    return found


def _quarantined(rollout: Rollout, monitor: str) -> Rollout:
    assert rollout.verdict is not None
    evidence = {**rollout.verdict.evidence, "quarantined": monitor}
    return rollout.judged(replace(rollout.verdict, excluded=True, evidence=evidence))


def _sample(rows: Sequence[int], most: int, key: tuple[int | str, ...]) -> list[int]:
    if len(rows) <= most:
        return list(rows)
    rng = np.random.Generator(np.random.Philox(key=sample_seed(*key)))
    return sorted(int(rows[i]) for i in rng.choice(len(rows), most, replace=False))


# -- what a step's numbers and texts tell ----------------------------------------------------------------------------

Finding = tuple[str, str, int, str, str, Sequence[int]]
"""(monitor, what, since, why, advice, rows of this step)."""


class _Stepwise:
    """Looks at a step as a whole."""

    name = ""

    def look(
        self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any], out: dict[str, float]
    ) -> list[Finding]:
        """What it found; it may add metrics to `out`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


WATCHED = {
    "timeout": ("more responses run into the verifier's time limit", "look at what they do; raise the limit if it is honest work"),
    "crashed": ("more responses crash the verifier's worker", "look at the evidence: a parser may be under attack, or out of memory"),
    "unparseable": ("more responses give no answer that can be read", "look at them: the format is being lost; reward it (gate format:…)"),
    "invalid_task": ("more problems cannot be graded", "these rows have no reference that can be read: mend the data"),
    "infra_error": ("the verifier fails more often", "its machinery is at fault, not the responses: see the evidence's reason"),
}  # fmt: skip


class _Outcomes(_Stepwise):
    """The verifier's own trouble."""

    name = "outcomes"

    def __init__(self) -> None:
        self.rates = {name: Rate(0.2, level=10.0) for name in WATCHED}

    def look(
        self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any], out: dict[str, float]
    ) -> list[Finding]:
        found: list[Finding] = []
        for name, rate in self.rates.items():
            rows = [i for i, r in enumerate(rollouts) if r.verdict and r.verdict.outcome == name]
            if rate.feed(step, len(rows), len(rollouts)):
                what, advice = WATCHED[name]
                why = f"{len(rows)} of {len(rollouts)} in this step, usual is {rate.usual:.0%} or less"
                found.append((name, what, rate.since, why, advice, rows))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {name: rate.state_dict() for name, rate in self.rates.items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, rate in self.rates.items():
            rate.load(state[name])


class _Text(_Stepwise):
    """Responses that grow, repeat themselves or change their script while the reward does not rise, for right and for wrong ones."""

    name = "text"

    def __init__(self) -> None:
        names = [f"{what}_{kind}" for what in ("length", "repetition", "script") for kind in ("right", "wrong")]
        self.levels = {name: Level() for name in [*names, "reward"]}

    def look(
        self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any], out: dict[str, float]
    ) -> list[Finding]:
        reward = metrics.get("reward/correct")
        if reward is None:
            return []
        self.levels["reward"].feed(reward)
        better = self.levels["reward"].now > self.levels["reward"].start + 0.02
        found: list[Finding] = []
        for kind in ("right", "wrong"):
            rows = [
                i
                for i, r in enumerate(rollouts)
                if r.verdict and not r.verdict.masked and _rewarded(r) == (kind == "right")
            ]
            if len(rows) < 4:  # the mean of fewer is anybody's
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
                if sure and far and not better:
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
            f"{form.format(level.now)} {unit}, and {form.format(level.start)} at the start; the reward has not risen",
            advice,
        )

    def state_dict(self) -> dict[str, Any]:
        return {name: level.state_dict() for name, level in self.levels.items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, level in self.levels.items():
            level.load(state[name])


class _Spread(_Stepwise):
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
        if entropy is not None and math.isfinite(entropy):
            sure = self.entropy.feed(float(entropy))
            if sure and self.entropy.now < 0.05 * self.entropy.start and reward < self.SOLVED:
                why = f"{self.entropy.now:.2g} nats a token, and {self.entropy.start:.2g} at the start, with {reward:.0%} solved"
                advice = "lower training.lr, widen the upper clip (objective.clip = [0.2, 0.28]), or raise rollout.temperature"
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
