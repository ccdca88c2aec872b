"""The length of a response, and nothing else: 1 up to `free` tokens, then falling linearly to 0 at `limit`.

    answer + 0.5 * length:free=192,limit=256

One plus DAPO's soft overlong punishment (arXiv 2503.14476 eq. 13: L_max = limit, L_cache = limit − free). Only the
score is shaped: the critic still predicts whether the answer is right. (`rollout.overlong` subtracts the same from any
score after judging.) `limit` is usually `rollout.max_tokens`; tokens are counted as sampled, including EOS.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict


def build(free: int, limit: int) -> LengthReward:
    """The reward for `length:free=…,limit=…`. Raises RecipeError unless 0 ≤ free < limit."""
    if not 0 <= free < limit:
        raise RecipeError(f"reward length: free={free} must be at least 0 and below limit={limit}")
    return LengthReward(free, limit)


class LengthReward:
    """A score for length; see the module."""

    reference_free = True
    """It needs no reference answer, so the monitor `reference` skips it (audit/monitors.py)."""

    def __init__(self, free: int, limit: int) -> None:
        self.free, self.limit = free, limit

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """`correct` at a score of 0.5 or more."""
        return [self._verdict(len(r.response_ids)) for r in rollouts]

    def _verdict(self, tokens: int) -> Verdict:
        score = min(1.0, max(0.0, (self.limit - tokens) / (self.limit - self.free)))
        return Verdict(score, "correct" if score >= 0.5 else "wrong", {"tokens": tokens})

    def check(self, task: Task) -> str | None:
        """None: every task has a length."""
        return None

    def close(self) -> None:
        """Nothing was started."""
