"""Whether a response has the requested form, and nothing else: a gate for a reward of correctness.

    math gate format:tags=think+answer      <think>…</think> then <answer>…</answer>, each once, only white space outside
    math gate format:boxed=true             exactly one non-empty \\boxed{…}
    answer + 0.2 * format:pattern=A:\\d+$   a regular expression that must match somewhere (without commas)

Patterns are RE2's (https://github.com/google/re2/wiki/Syntax); `^` and `$` match at every line. Matching takes linear
time whatever the pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import re2

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict
from .user_reward import each_within


def build(tags: str = "", boxed: bool = False, pattern: str = "") -> FormatReward:
    """The reward for `format:…`; every named condition must hold.

    Raises RecipeError for no condition, or one that cannot be read.
    """
    names = [t for t in tags.split("+") if t]
    bad = next((t for t in names if not t.isidentifier()), None)
    if bad is not None or len(set(names)) < len(names):
        raise RecipeError(f"reward format: tags={tags} must be different words joined by +, e.g. tags=think+answer")
    if not (names or boxed or pattern):
        raise RecipeError("reward format: say what a response must have: tags=think+answer, boxed=true, or pattern=…")
    return FormatReward(names, bool(boxed), _linear(str(pattern)) if pattern else None)


def _linear(pattern: str) -> Any:
    """A pattern that takes linear time on any text.

    Raises RecipeError for what RE2 cannot match so: look-around, back-references.
    """
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile("(?m)" + pattern, options)
    except re2.error as error:
        why = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else str(error)
        raise RecipeError(
            f"reward format: pattern={pattern} is not a regular expression that is matched in linear time (RE2 has no look-around and "
            f"no back-references): {why}"
        ) from None


class FormatReward:
    """1 for the requested form, else 0."""

    reference_free = True
    """It needs no reference answer, so the monitor `reference` skips it (audit/monitors.py)."""

    def __init__(self, tags: Sequence[str], boxed: bool, pattern: Any) -> None:
        self.tags, self.boxed, self.pattern = tags, boxed, pattern

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """1 or 0; the evidence says what is missing."""
        return each_within(rollouts, lambda rollout: self._verdict(rollout.text))

    def _verdict(self, text: str) -> Verdict:
        missing = self._missing(text)
        return Verdict(0.0, "unparseable", {"reason": missing}) if missing else Verdict(1.0, "correct")

    def _missing(self, text: str) -> str:
        at = 0
        for tag in self.tags:
            start, end = f"<{tag}>", f"</{tag}>"
            if text.count(start) != 1 or text.count(end) != 1:
                return f"{start}…{end} must be there once"
            begins, ends = text.index(start), text.index(end)
            if not at <= begins < ends:
                return f"{start}…{end} is not in its place"
            if text[at:begins].strip():
                return f"there is text before {start}"
            at = ends + len(end)
        if self.tags and text[at:].strip():
            return f"there is text after </{self.tags[-1]}>"
        if self.boxed and not (
            text.count(r"\boxed{") == 1 and text.partition(r"\boxed{")[2].lstrip()[:1] not in ("", "}")
        ):
            return r"one \boxed{…} with something in it must be there"
        if self.pattern is not None and not self.pattern.search(text):
            return f"nothing matches {self.pattern.pattern.removeprefix('(?m)')}"
        return ""

    def check(self, task: Task) -> str | None:
        """None: every task is gradable."""
        return None

    def close(self) -> None:
        """Nothing was started."""
