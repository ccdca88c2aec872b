"""The final answer against the reference: exact text or equal numbers. Fast, in-process, no parser that can hang.

`answer`                      the last marked answer (`A:`, `Answer:`, `####`, `\\boxed{…}`), else the last number
`answer:extract=boxed`        only that mark: `boxed`, `marked`, `hash`, `number` or `whole`
`answer:mode=exact`           text only; `numeric` compares numbers only; `auto` takes numbers where both are
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict

_MARK = re.compile(r"(?i:\b(?:final answer|answer))\s*(?:is|:|=)\s*:?|(?<![A-Za-z])A:")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_HASH = re.compile(r"####\s*(.+?)\s*$", re.MULTILINE)
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?:[eE][-+]?\d+)?")
_FRACTION = re.compile(r"([-+−]?)\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
EXTRACT = ("auto", "boxed", "marked", "hash", "number", "whole")
MODES = ("auto", "exact", "numeric")


def build(extract: str = "auto", mode: str = "auto", tolerance: float = 0.0) -> AnswerReward:
    """The reward for `reward.use = "answer:…"`."""
    if extract not in EXTRACT:
        raise RecipeError(f"answer: extract={extract} is not one of {', '.join(EXTRACT)}")
    if mode not in MODES:
        raise RecipeError(f"answer: mode={mode} is not one of {', '.join(MODES)}")
    return AnswerReward(extract, mode, tolerance)


def gold_of(task: Task) -> str | None:
    """The reference answer of a row: `answer`, or the nested `reward_model.ground_truth`; None when there is none."""
    answer = task.columns.get("answer")
    if answer is None and isinstance(task.columns.get("reward_model"), dict):
        answer = task.columns["reward_model"].get("ground_truth")
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        answer = answer[0]
    if answer is None or isinstance(answer, (list, tuple, dict)):
        return None
    gold = str(answer)
    if marks := _HASH.findall(gold):  # GSM8K: a worked solution that ends with "#### 72"
        return marks[-1]
    return boxed(gold) or gold


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} with its braces balanced, or None (also when it never closes)."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    opening = text.find("{", start)
    if opening < 0 or text[start + len("\\boxed") : opening].strip():
        return None
    depth = 0
    for i in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[opening + 1 : i].strip()
    return None


def number(text: str) -> Fraction | None:
    """The number that a text *is* (commas, fractions, exponents, a currency or percent sign, a closing period), or None."""
    cleaned = (
        _FRACTION.sub(r"\1\2/\3", text.strip().strip("$ ").rstrip(".")).removesuffix("%").replace("−", "-").strip()
    )
    if _THOUSANDS.fullmatch(cleaned):  # other commas separate: `1,2` is a pair, not twelve
        cleaned = cleaned.replace(",", "")
    if len(cleaned) > 400 or re.search(r"[eE][-+]?\d{4,}", cleaned):
        return None  # exact rationals of absurd exponents are a memory bomb
    try:
        return Fraction(cleaned)
    except (ValueError, ZeroDivisionError):
        return None


def last_number(text: str) -> str | None:
    """The last number written in a text, or None."""
    found = [m.group() for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]
    return found[-1] if found else None


def after_last_mark(text: str) -> str | None:
    """Everything after the last `Answer:` (`A:`, `answer is`), or None when there is no such mark."""
    marks = list(_MARK.finditer(text))
    return text[marks[-1].end() :].strip() if marks else None


def extract_answer(text: str, how: str = "auto") -> str | None:
    """The final answer that a response gives, or None when it gives none."""
    if how == "whole":
        return text.strip() or None
    if how == "number":
        return last_number(text)
    if how in ("boxed", "auto") and (content := boxed(text)) is not None:
        return content
    if how in ("hash", "auto") and (marks := _HASH.findall(text)):
        return marks[-1]
    if how in ("marked", "auto"):
        after = after_last_mark(text)
        if after:
            return after.splitlines()[0].strip("*` ") or None
    return last_number(text) if how == "auto" else None


def looks_cut_off(gold: str) -> bool:
    r"""Golds of published sets are often cut at the first brace: `\frac{1`, `x_{0`. Every verifier scores these 0."""
    braces = [len(re.findall(rf"(?<!\\){brace}", gold)) for brace in (r"\{", r"\}")]
    return braces[0] != braces[1] or gold.rstrip().endswith(("\\", "^", "_", "\\frac", "\\sqrt"))


def reference_problem(task: Task) -> str | None:
    """What is wrong with a task's reference answer whatever compares it: missing, empty or cut off; or None."""
    gold = gold_of(task)
    if gold is None:
        return "no reference answer (column `answer` or `reward_model.ground_truth`)"
    if not gold.strip():
        return "the reference answer is empty"
    return f"the reference answer looks cut off: {gold!r}" if looks_cut_off(gold) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" .").casefold()


class AnswerReward:
    """Extract, then compare."""

    def __init__(self, extract: str, mode: str, tolerance: float) -> None:
        self.extract, self.mode, self.tolerance = extract, mode, tolerance

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct, wrong, unparseable (no answer found: score 0) or invalid_task (no gradable reference: masked)."""
        return [self._one(r) for r in rollouts]

    def _one(self, rollout: Rollout) -> Verdict:
        problem = self.check(rollout.task)
        gold = gold_of(rollout.task)
        if problem is not None or gold is None:
            return Verdict(0.0, "invalid_task", {"reason": problem})
        given = extract_answer(rollout.text, self.extract)
        evidence: dict[str, Any] = {"extracted": given, "gold": gold}
        if given is None:
            return Verdict(0.0, "unparseable", evidence)
        return Verdict(1.0, "correct", evidence) if self._equal(given, gold) else Verdict(0.0, "wrong", evidence)

    def _equal(self, given: str, gold: str) -> bool:
        a, b = number(given), number(gold)
        if self.mode != "exact" and a is not None and b is not None:
            return abs(a - b) <= Fraction(self.tolerance) * max(abs(b), Fraction(1))
        return self.mode != "numeric" and _plain(given) == _plain(gold)

    def check(self, task: Task) -> str | None:
        """Why the reference cannot be graded by comparing answers, or None."""
        problem = reference_problem(task)
        gold = gold_of(task) or ""
        if problem is None and self.mode == "numeric" and number(gold) is None:
            return f"the reference answer is not a number: {gold!r}"
        return problem

    def close(self) -> None:
        return None
