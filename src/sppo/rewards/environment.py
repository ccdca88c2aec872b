"""What the environment pays: `reward.use = "environment"`, a number in [0, 1] that it left as `evidence["reward"]` (TRL's `get_reward`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..types import Rollout, Task, Verdict


def build() -> EnvironmentReward:
    """The reward of environments that judge by themselves."""
    return EnvironmentReward()


class EnvironmentReward:
    """See the module."""

    reference_free = True
    """It needs no reference answer, so the monitor `reference` skips it (audit/monitors.py)."""

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """A trajectory whose environment paid nothing that is a number in [0, 1] is masked."""
        return [self._verdict(r.evidence.get("reward")) for r in rollouts]

    def _verdict(self, paid: object) -> Verdict:
        if isinstance(paid, bool | int | float) and math.isfinite(paid) and 0 <= paid <= 1:
            return Verdict(float(paid), "correct" if paid >= 0.5 else "wrong", {"paid by": "the environment"})
        return Verdict(
            0.0, "infra_error", {"reason": f"the environment paid {str(paid)[:100]}, which is no number in [0, 1]"}
        )

    def check(self, task: Task) -> str | None:
        """Whatever the task is, its environment knows."""
        return None

    def close(self) -> None:
        """Nothing was started."""
