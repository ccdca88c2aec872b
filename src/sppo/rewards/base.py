"""The socket of a reward: `judge` turns rollouts into verdicts. `loading.py` makes one from a recipe's `reward.use`.

An example:

    class Exact:
        def judge(self, rollouts):
            right = [r.text == r.task.columns["answer"] for r in rollouts]
            return [Verdict(float(r), "correct" if r else "wrong") for r in right]

        def check(self, task):
            return None if "answer" in task.columns else "no reference answer"

        def close(self):
            return None
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..types import Rollout, Task, Verdict

KEPT = "judge.jsonl"
"""A run's file of what its reward was told by others, where it keeps that (`keep`)."""
TEST_COLUMNS = ("tests", "test_list", "test", "input_output")
"""Columns that may hold a row's tests, in the order in which they are looked at."""


class Reward(Protocol):
    """Judges responses; `check` says what is wrong with a task before anything is sampled for it.

    One whose verdicts depend on the other responses of a call, or whose numbers do, says `divisible = False`: verifier
    workers (cluster/verifiers.py) then never divide a call. It may also have `keep(path)`, to keep what it was told by others, and
    `begin(tasks, note)`, called with the first problems before a run: what it has to say of itself goes to `note`.
    """

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict for each rollout, in order."""

    def check(self, task: Task) -> str | None:
        """Why this task can never be graded, or None."""

    def close(self) -> None:
        """End what the reward started (worker processes); it may be used again."""


def divisible(reward: object) -> bool:
    """Whether a call may be divided into several with the same verdicts; a user's own may not, unless it says so."""
    return bool(getattr(reward, "divisible", True))
