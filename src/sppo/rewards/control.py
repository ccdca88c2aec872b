"""Success of a control task's episode, as the engine recorded it at the last step: `reward.use = "control"`."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import Rollout, Task, Verdict


def build() -> ControlReward:
    """The reward for `control:` tasks."""
    return ControlReward()


class ControlReward:
    """1 for success, 0 for failure."""

    reference_free = True
    """It needs no reference answer, so the monitor `reference` skips it (audit/monitors.py)."""

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Read from the text that `ControlPolicy.text` makes of an episode."""
        verdicts = []
        for r in rollouts:
            outcome = r.text.partition(" ")[0]
            if outcome not in ("success", "failure"):
                verdicts.append(Verdict(0.0, "invalid_task", {"reason": "not an episode of a control task"}))
                continue
            success = outcome == "success"
            verdicts.append(Verdict(float(success), "correct" if success else "wrong", {"ended": r.text}))
        return verdicts

    def check(self, task: Task) -> str | None:
        """Whether it is a control task."""
        return None if "start" in task.columns else "it has no start: use task.train = 'control:…'"

    def close(self) -> None:
        """Nothing was started."""
