"""Compares the final answer with the reference: fast, in-process, no parser that can hang. `math` compares
symbolically.

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

import math
from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict
from .choice import choice
from .extract import EXTRACT, after_hashes, after_thinking, boxed, extract_answer
from .quantity import quantity, same_quantity
from .reading import read
from .text import members, plain
from .tokens import Unreadable
from .user_reward import each_within

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
    return after_hashes(gold) or boxed(gold) or gold  # GSM8K: a worked solution that ends with "#### 72"


def _given(task: Task) -> Any:
    answer = task.columns.get("answer")
    if answer is None and "tests" not in task.columns and isinstance(task.columns.get("reward_model"), dict):
        answer = task.columns["reward_model"].get("ground_truth")
    return None if isinstance(answer, float) and math.isnan(answer) else answer


def looks_cut_off(gold: str) -> bool:
    r"""Golds of published sets are often cut at the first brace: `\frac{1`, `x_{0`. Every verifier scores these 0."""
    bare = gold.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
    return bare.count("{") != bare.count("}") or gold.rstrip().endswith(("\\", "^", "_", "\\frac", "\\sqrt"))


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
        """Correct, wrong, unparseable (no answer found: score 0), timeout, or invalid_task (no gradable reference:
        masked)."""
        return each_within(rollouts, self._one)

    def _one(self, rollout: Rollout) -> Verdict:
        problem = self._problem(rollout.task)
        if problem is not None:
            return Verdict(0.0, "invalid_task", {"reason": problem})
        given, gold = extract_answer(rollout.text, self.extract), self._gold(rollout.task)
        if self.mode == "choice" and given is not None:
            given = choice(given, _options(rollout.task))
        elif self.mode == "choice" and self.extract == "auto":
            given = choice(
                after_thinking(rollout.text), _options(rollout.task)
            )  # a bare letter has no mark, and is not a number
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
        if self.mode == "numeric":
            return False
        return plain(given) == plain(gold) or (self.mode != "exact" and _written_the_same(given, gold))

    def check(self, task: Task) -> str | None:
        """Why the reference cannot be graded by comparing answers, or None.

        A reference that is given as the answer must be right.
        """
        problem = self._problem(task)
        if problem is not None or isinstance(_given(task), (list, tuple)) or self.extract not in ("auto", "boxed"):
            return problem
        verdict = self._one(Rollout.answer(task, [], [], [], "stop", f"\\boxed{{{gold_of(task)}}}"))
        return (
            None
            if verdict.outcome == "correct"
            else f"the reference answer is not taken for itself: {gold_of(task)!r} is {verdict.outcome}"
        )

    def _problem(self, task: Task) -> str | None:
        """Why the reference cannot be compared with anything, or None."""
        many = isinstance(_given(task), (list, tuple)) and self.mode in ("set", "list")
        problem = None if many else reference_problem(task)
        gold = self._gold(task)
        if problem is None and self.mode == "numeric" and quantity(gold) is None:
            return f"the reference answer is not a number: {gold!r}"
        if problem is None and self.mode == "choice" and gold is None:
            return f"the reference answer is none of the choices: {_given(task)!r}"
        if problem is None and self.mode in ("set", "list") and not gold:
            return f"the reference answer has no members: {_given(task)!r}"
        return problem

    def close(self) -> None:
        return None


def _written_the_same(a: str, b: str) -> bool:
    r"""Whether two answers are one expression, spelt differently: `2\sqrt 3` and `2 \sqrt{3}`. Nothing is evaluated."""
    try:
        return read(a)[0] == read(b)[0]
    except Unreadable:
        return False


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
