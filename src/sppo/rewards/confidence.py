"""The confidence that a response states, rewarded for being true: 1 − (q − c)², q the stated chance, c whether the
answer is right.

    answer + confidence            c + 1 − (q − c)², halved: RLCR (arXiv 2507.16806, eq. 3) moved into [0, 1]
    answer + 0.5 * confidence      calibration matters less
    math and mine:checked + 0 * confidence     measured and recorded, and pays nothing

It is a proper score: a response does best by being right and stating the true chance of it. The last statement of these
forms is read: `<confidence>0.8</confidence>`, `Confidence: 80%`, `confidence = 0.8`, and for short tasks `C:80` (two
digits, per cent). A response that states none scores 0. The critic's target stays c.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import RewardError
from ..types import Rollout, Verdict
from .user_reward import each_within

_NUMBER = r"(\d{1,3}(?:\.\d{1,6})?|\.\d{1,6})"
_END = r"(?!\d|[,./]\d)"  # "0,8" and "8/10" are not read as 0 and 8
_STATED = re.compile(
    rf"<confidence>\s*{_NUMBER}\s*(%?)\s*</confidence>|\bconfidence\W{{0,3}}(?:is|:|=)\W{{0,5}}{_NUMBER}{_END}\s*(%?)|(?<![A-Za-z])C:(\d\d)(?=;|\s*$)",
    re.IGNORECASE,
)


def build() -> ConfidenceReward:
    """The reward for `… + confidence`."""
    return ConfidenceReward()


def stated_confidence(text: str) -> float | None:
    """The chance in [0, 1] that a response states, or None. `80`, `80%` and `0.8` are the same; `1` is certain.

    >>> stated_confidence("The answer is 4.\\nConfidence: 85%"), stated_confidence("7*2=4;C:07;A:4"), stated_confidence("surely 4")
    (0.85, 0.07, None)
    """
    found = list(_STATED.finditer(text[-100_000:]))
    if not found:
        return None
    tag, tag_percent, word, percent, digits = found[-1].groups()
    if digits is not None:
        return int(digits) / 100
    value = float(tag or word)
    if tag_percent or percent or value > 1:
        value /= 100
    return value if value <= 1 else None


class ConfidenceReward:
    """A part of a sum; it reads the first part's verdict."""

    beside = True
    """A part of a sum, and not its first."""
    reference_free = True
    """It reads the first part's verdict, and needs no reference of its own."""

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """1 − (q − c)² each; `unparseable`, 0, where no confidence is stated.

        Raises RewardError where there is no first part.
        """
        return each_within(rollouts, self._one)

    def _one(self, rollout: Rollout) -> Verdict:
        if rollout.verdict is None:
            raise RewardError(
                "reward confidence says how true a stated confidence is, and of itself not what is right: write answer + confidence (or math, code)"
            )
        correct, stated = rollout.verdict.correct, stated_confidence(rollout.text)
        if stated is None:
            return Verdict(0.0, "unparseable", {"reason": "no confidence is stated"})
        error = (stated - correct) ** 2
        return Verdict(
            1 - error, "correct", {"confidence": stated, "measures": {"confidence": stated, "confidence_brier": error}}
        )

    def check(self, task: object) -> str | None:
        return None

    def close(self) -> None:
        return None
