"""Is the policy solving more problems, or exploiting its verifier? Monitors look at every step and raise alerts: what,
since when, what to do.

    reference   a rewarded response is judged as an answer to two other problems with other references. An honest one is right for neither; one
                that passes both is paid whatever the reference says. (It is what a canary prompt with a wrong reference tests, without
                sampling one: the policy never sees the reference.)
    hidden      programs that pass the visible tests and fail the hidden ones
    second      rewarded responses that a second verifier rejects (`monitors.second`)
    work        right answers that stay right when the chain of thought is cut to nothing and the answer is forced (audit/work.py)
    outcomes    the verifier times out, crashes, cannot grade or cannot read more often than it used to
    length, repetition, script      wrong (or right) responses that drift without the reward rising
    entropy, advantage              nothing is explored, or nothing can be learnt, while problems stay unsolved

Responses that a monitor of verdicts objects to can be quarantined: masked, never scored 0. State is plain numbers, kept
in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import RewardError
from ..evaluation.intervals import wilson
from ..recipe.sections import MonitorsSection
from ..rewards.base import Reward
from ..rollout.sampler import sample_seed
from ..types import Rollout
from .step_monitors import Outcomes, Spread, Stepwise, Text
from .tool_monitors import ToolUse
from .verdict_monitors import Hidden, Reference, Second, Verifying, reads_reference

EXAMPLES = 8
"""Rollouts that an alert points to."""


@dataclass(frozen=True)
class Alert:
    """A finding for the user. `evidence` names rollouts as `step:row`."""

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
    """All monitors of a run.

    `inspect` comes between judging and learning, `look` after the update; `fetch` gives what was raised.
    """

    def __init__(self, section: MonitorsSection, reward: Reward, seed: int, limit: float) -> None:
        """Raises RecipeError where `second` names no reward."""
        self.section, self.seed = section, seed
        self.on = section.action != "off"
        self.verifying: list[Verifying] = []
        if self.on:
            if section.sample and reads_reference(reward):
                self.verifying.append(Reference(reward))
            self.verifying.append(Hidden())
            if section.second:
                self.verifying.append(Second(section.second, limit))
        self.stepwise: list[Stepwise] = [Outcomes(), Text(), Spread(), ToolUse()] if self.on else []
        self.raised: dict[str, int] = {}  # the step of each monitor's alert; a second alert would say nothing new
        self.recent: dict[str, list[str]] = {}  # the newest rollouts that a monitor objected to
        self.alerts: list[Alert] = []
        self.notes: list[str] = []

    def inspect(self, step: int, rollouts: Sequence[Rollout], recorded: int) -> tuple[list[Rollout], dict[str, float]]:
        """A step's judged rollouts, with those masked that are in quarantine; and metrics.

        The first `recorded` are in the step's file.
        """
        out, metrics = list(rollouts), {}
        for m in self.verifying:
            eligible = [i for i, r in enumerate(rollouts) if r.verdict and not r.verdict.masked and m.concerns(r)]
            everything = m.free or self._quarantines(m)
            chosen = eligible if everything else _sample(eligible, self.section.sample, (self.seed, m.name, step))
            flagged = self._objections(m, rollouts, chosen)
            if flagged is None:
                continue
            metrics[f"monitor/{m.name}"] = len(flagged) / len(chosen)
            kept = [*[f"{step}:{i}" for i in flagged if i < recorded], *self.recent.get(m.name, [])]
            self.recent[m.name] = kept[:EXAMPLES]
            if m.feed(step, rollouts, flagged, chosen):
                low, high = wilson(len(flagged), len(chosen))
                why = f"{len(flagged)} of {len(chosen)} looked at in this step (95% interval {low:.0%} to {high:.0%}); usual is {m.rate.usual:.0%} or less"
                self._raise(
                    Alert(
                        step,
                        m.name,
                        m.what,
                        m.rate.since,
                        why,
                        m.advice,
                        self.section.action,
                        tuple(self.recent[m.name]),
                    )
                )
            if self._quarantines(m):
                for i in flagged:
                    out[i] = _quarantined(out[i], m.name)
        if self.section.action == "quarantine":
            metrics["monitor/quarantined"] = sum(
                "quarantined" in r.verdict.evidence for r in out[:recorded] if r.verdict
            )
        return out, metrics

    def refuses(self, rollouts: Sequence[Rollout]) -> set[int]:
        """Of judged responses that are to be learnt in another way (search), those that are in quarantine."""
        refused: set[int] = set()
        for m in self.verifying:
            if self._quarantines(m):
                eligible = [i for i, r in enumerate(rollouts) if r.verdict and not r.verdict.masked and m.concerns(r)]
                refused |= set(self._objections(m, rollouts, eligible) or ())
        return refused

    def _quarantines(self, monitor: Verifying) -> bool:
        return self.section.action == "quarantine" and monitor.name in self.raised

    def _objections(self, monitor: Verifying, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[int] | None:
        if monitor.broken or not chosen:
            return None
        try:
            return monitor.object_to(rollouts, chosen)
        except RewardError as error:  # a run does not end for what only looks on
            monitor.broken = True
            self.notes.append(f"warning: the monitor {monitor.name!r} is off from now on: {error}")
            return None

    def look(self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any]) -> dict[str, float]:
        """After the update: looks at the step's numbers and texts, and returns metrics of the texts."""
        found: dict[str, float] = {}
        for m in self.stepwise:
            for name, what, since, why, advice, rows in m.look(step, rollouts, metrics, found):
                evidence = tuple(f"{step}:{i}" for i in rows[:EXAMPLES])
                self._raise(Alert(step, name, what, since, why, advice, self._warn_or_stop, evidence))
        return found

    def work(self, step: int, kept: dict[float, tuple[int, int]]) -> dict[str, float]:
        """After a look at answers without work (audit/work.py): of right answers, how many stayed right, by share of
        the chain that was left."""
        metrics = {f"monitor/right_with_{round(100 * share)}pct_of_work": k / n for share, (k, n) in kept.items() if n}
        right, n = kept.get(0.0, (0, 0))
        low, _ = wilson(right, n)
        if n and low > 0.7:
            what = "answers do not need the work that is written before them"
            why = f"{right} of {n} right answers stay right with the whole chain cut away and the answer forced"
            advice = "the chain is decoration: ask for problems that need it, reward steps, or save the tokens"
            self._raise(Alert(step, "work", what, step, why, advice, self._warn_or_stop))
        return metrics

    def fetch(self) -> tuple[list[Alert], list[str]]:
        """Alerts, and notes for the terminal, since the last call."""
        new = self.alerts, self.notes
        self.alerts, self.notes = [], []
        return new

    @property
    def _warn_or_stop(self) -> str:
        """Where there is nothing that could be masked."""
        return "stop" if self.section.action == "stop" else "warn"

    def _raise(self, alert: Alert) -> None:
        if alert.monitor not in self.raised:
            self.raised[alert.monitor] = alert.step
            self.alerts.append(alert)

    def _parts(self) -> Iterator[Verifying | Stepwise]:
        yield from self.verifying
        yield from self.stepwise

    def close(self) -> None:
        """Close the second verifier."""
        for m in self.verifying:
            m.close()

    def state_dict(self) -> dict[str, Any]:
        """The state from which a resumed run raises the same alerts."""
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


def _quarantined(rollout: Rollout, monitor: str) -> Rollout:
    """Masked, if it is paid: what scores 0 already teaches what it should."""
    if rollout.verdict is None or rollout.verdict.score <= 0:
        return rollout
    evidence = {**rollout.verdict.evidence, "quarantined": monitor}
    return rollout.judged(replace(rollout.verdict, excluded=True, evidence=evidence))


def _sample(rows: Sequence[int], most: int, key: tuple[int | str, ...]) -> list[int]:
    if len(rows) <= most:
        return list(rows)
    rng = np.random.Generator(np.random.Philox(key=sample_seed(*key)))
    return sorted(int(rows[i]) for i in rng.choice(len(rows), most, replace=False))
