"""Several rewards as one: their mean. The first is the correctness that the critic predicts; the others only shape."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import Rollout, Task, Verdict
from .base import Reward


class MeanReward:
    """The mean score of several rewards; a sample that any part cannot grade is masked. Each part's value is evidence."""

    def __init__(self, parts: Sequence[Reward]) -> None:
        self.parts = parts

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict each; outcome and correctness are those of the first part."""
        judged = zip(*(part.judge(rollouts) for part in self.parts), strict=True)
        return [self._merge(verdicts) for verdicts in judged]

    def _merge(self, verdicts: tuple[Verdict, ...]) -> Verdict:
        evidence = {"parts": [{"score": v.score, "outcome": v.outcome, **v.evidence} for v in verdicts]}
        masked = next((v for v in verdicts if v.masked), None)
        if masked is not None:
            return Verdict(0.0, masked.outcome, evidence, excluded=True)
        mean = sum(v.score for v in verdicts) / len(verdicts)
        return Verdict(mean, verdicts[0].outcome, evidence, correctness=verdicts[0].correct)

    def check(self, task: Task) -> str | None:
        """The first part's reason, if any has one."""
        return next((why for part in self.parts if (why := part.check(task))), None)

    def close(self) -> None:
        for part in self.parts:
            part.close()
