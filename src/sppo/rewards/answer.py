"""The final answer against the reference. Fast, in-process, no parser that can hang; `math` does the symbolic kind.

`answer`                      the last marked answer (`A:`, `Answer:`, `####`, `\\boxed{…}`), else the last number
`answer:extract=boxed`        only that mark: `boxed`, `marked`, `hash`, `number` or `whole`
`answer:mode=…`               how it is compared:
    auto      numbers and quantities where both are, else text
    exact     text only
    numeric   numbers only; `tolerance=0.01` is relative (absolute for a reference of 0); `units=optional` (`12000 m` is `12 km`, `12` is too),
              `required`, or `ignore`
    set       members in any order: `{1, 2}`, `2 and 1`, or a list in the row; `list` in the same order
    choice    a letter: `B`, `(B) Paris`, `Option B`, or the option's text where the row has `choices` (or `options`)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict
from .compare import choice, members, number, plain, quantity, same_number, same_quantity

_MARK = re.compile(r"(?i:\b(?:final answer|answer))\s*(?:is|:|=)\s*:?|(?<![A-Za-z])A:")
_HASH = re.compile(r"####[^\S\n]*([^\n]+)")
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?:[eE][-+]?\d+)?")
_TAG = re.compile(r"<answer>([^<]*)</answer>")
_GOES_ON = re.compile(r"\*{0,2}\.\*{0,2}\s|,\s(?:since|because|as|which|so|where|and)\b|\s\(")
EXTRACT = ("auto", "boxed", "marked", "hash", "number", "whole")
MODES = ("auto", "exact", "numeric", "set", "list", "choice")
UNITS = ("optional", "required", "ignore")


def build(extract: str = "auto", mode: str = "auto", tolerance: float = 0.0, units: str = "optional") -> AnswerReward:
    """The reward for `reward.use = "answer:…"`."""
    for name, value, known in (("extract", extract, EXTRACT), ("mode", mode, MODES), ("units", units, UNITS)):
        if value not in known:
            raise RecipeError(f"answer: {name}={value} is not one of {', '.join(known)}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise RecipeError(f"answer: tolerance={tolerance} must be a number from 0 to below 1")
    return AnswerReward(extract, mode, tolerance, units)


def gold_of(task: Task) -> str | None:
    """The reference answer of a row: `answer`, or the nested `reward_model.ground_truth`; None when there is none."""
    answer = _given(task)
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        answer = answer[0]
    if answer is None or isinstance(answer, (list, tuple, dict)):
        return None
    gold = str(answer)
    if marks := _HASH.findall(gold):  # GSM8K: a worked solution that ends with "#### 72"
        return marks[-1].strip()
    return boxed(gold) or gold


def _given(task: Task) -> Any:
    answer = task.columns.get("answer")
    if answer is None and isinstance(task.columns.get("reward_model"), dict):
        answer = task.columns["reward_model"].get("ground_truth")
    return answer


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
    if how == "auto" and (tagged := _TAG.findall(text)):
        return tagged[-1].strip() or None
    if how in ("boxed", "auto") and (content := boxed(text)) is not None:
        return content
    if how in ("hash", "auto") and (marks := _HASH.findall(text)):
        return marks[-1].strip() or None
    if how in ("marked", "auto"):
        after = after_last_mark(text)
        if after:
            return _first_clause(after.splitlines()[0]) or None
    return last_number(text) if how == "auto" else None


def _first_clause(line: str) -> str:
    """The answer of a line that goes on after it: `18. It took 3 steps`, `18, since 9*2 = 18`. Cut only where a number stands before."""
    line = line.strip("*` ").removesuffix(".").strip("*` ")
    clause = _GOES_ON.split(line, maxsplit=1)[0].strip("*` ")
    return clause if clause != line and quantity(clause) is not None else line


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


class AnswerReward:
    """Extract, then compare."""

    def __init__(self, extract: str, mode: str, tolerance: float, units: str) -> None:
        self.extract, self.mode, self.tolerance, self.units = extract, mode, tolerance, units

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct, wrong, unparseable (no answer found: score 0) or invalid_task (no gradable reference: masked)."""
        return [self._one(r) for r in rollouts]

    def _one(self, rollout: Rollout) -> Verdict:
        problem = self.check(rollout.task)
        if problem is not None:
            return Verdict(0.0, "invalid_task", {"reason": problem})
        given, gold = extract_answer(rollout.text, self.extract), self._gold(rollout.task)
        if self.mode == "choice" and given is not None:
            given = choice(given, _options(rollout.task))
        elif self.mode == "choice" and self.extract == "auto":
            given = choice(rollout.text, _options(rollout.task))  # a bare letter has no mark, and is no number
        evidence: dict[str, Any] = {"extracted": given, "gold": gold}
        if given is None:
            return Verdict(0.0, "unparseable", evidence)
        right = self._same(given, gold)
        return Verdict(1.0, "correct", evidence) if right else Verdict(0.0, "wrong", evidence)

    def _gold(self, task: Task) -> Any:
        """The reference as this mode reads it: text, the letter of a choice, the members of a set or list."""
        answer, gold = _given(task), gold_of(task)
        if self.mode == "choice":
            return _letter(answer if gold is None else gold, _options(task))
        if self.mode in ("set", "list"):
            if isinstance(answer, (list, tuple)):
                return [str(member) for member in answer]
            return members(gold or "")
        return gold

    def _same(self, given: str, gold: Any) -> bool:
        if self.mode == "choice":
            return given == gold
        if self.mode not in ("set", "list"):
            return self._equal(given, gold)
        found = members(given)[: len(gold) + 1]
        if len(found) != len(gold):
            return False
        if self.mode == "list":
            return all(self._equal(a, b) for a, b in zip(found, gold, strict=True))
        left = list(gold)
        for member in found:
            match = next((i for i, other in enumerate(left) if self._equal(member, other)), None)
            if match is None:
                return False
            left.pop(match)
        return True

    def _equal(self, given: str, gold: str) -> bool:
        if self.mode != "exact":
            p, q = quantity(given), quantity(gold)
            if p is not None and q is not None:
                return same_quantity(p, q, self.tolerance, self.units)
            a, b = number(given), number(gold)
            if a is not None and b is not None:
                return same_number(a, b, self.tolerance)
        return self.mode != "numeric" and plain(given) == plain(gold)

    def check(self, task: Task) -> str | None:
        """Why the reference cannot be graded by comparing answers, or None."""
        many = isinstance(_given(task), (list, tuple)) and self.mode in ("set", "list")
        problem = None if many else reference_problem(task)
        gold = self._gold(task)
        if problem is None and self.mode == "numeric" and quantity(gold) is None and number(gold) is None:
            return f"the reference answer is not a number: {gold!r}"
        if problem is None and self.mode == "choice" and gold is None:
            return f"the reference answer is none of the choices: {_given(task)!r}"
        if problem is None and self.mode in ("set", "list") and not gold:
            return f"the reference answer has no members: {_given(task)!r}"
        return problem

    def close(self) -> None:
        return None


def choice_letter(task: Task) -> str | None:
    """The letter of a multiple-choice row's reference, or None where the row has no options."""
    options = _options(task)
    answer = _given(task)
    return None if options is None else _letter(answer if (gold := gold_of(task)) is None else gold, options)


def _options(task: Task) -> list[str] | None:
    """The row's options in order, from `choices` or `options`: a list, or an object from letter to text."""
    for name in ("choices", "options"):
        value = task.columns.get(name)
        if isinstance(value, dict):
            value = value.get("text", list(value.values()))
        if isinstance(value, (list, tuple)) and value:
            return [str(option) for option in value]
    return None


def _letter(answer: Any, options: list[str] | None) -> str | None:
    """A reference choice: a letter, the option's text, or its index from 0 (where the row has options)."""
    if answer is None:
        return None
    text = str(answer).strip()
    found = choice(text, options)
    if found is None and options and text.isdigit() and int(text) < len(options):
        return chr(ord("A") + int(text))
    return found
