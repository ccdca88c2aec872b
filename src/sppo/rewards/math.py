r"""Mathematics: symbolic equality through math-verify, in killable worker processes.

math-verify parses LaTeX and lets SymPy decide, and some expressions never come back. Its own time limit is a signal,
which only works in the main thread, and elsewhere scores everything 0 in silence. Here a hanging expression costs its own
time limit, whatever thread the trainer runs in, and is reported as `timeout`.

`math`, `math:limit=5,workers=2`, `math:extract=boxed` (auto: math-verify finds the answer; else boxed, marked, hash, number or whole)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict
from .answer import EXTRACT, extract_answer, gold_of, reference_problem
from .compare import number
from .workers import WorkerPool


def build(limit: float = 5.0, workers: int = 2, extract: str = "auto") -> MathReward:
    """The reward for `reward.use = "math:…"`. `limit` is seconds of wall time for one verdict."""
    if extract not in EXTRACT:
        raise RecipeError(f"math: extract={extract} is not one of {', '.join(EXTRACT)}")
    return MathReward(limit, workers, extract)


def warm_up() -> None:
    """Import and exercise what judging needs before the first verdict's clock runs."""
    judge_one({"gold": "$\\frac{1}{2}$", "response": "$0.5$"})


def judge_one(job: dict[str, Any]) -> dict[str, Any]:
    """One verdict, inside a worker. `{"gold", "response"}` → `{"outcome", "extracted"}` or `{"outcome": "invalid_task"}`."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    gold = parse(as_latex(job["gold"]), parsing_timeout=None)
    if not gold:
        return {"outcome": "invalid_task", "reason": f"math-verify cannot parse the reference answer {job['gold']!r}"}
    if job["response"] is None:
        return {"outcome": "correct", "extracted": str(gold[0])}
    given = parse(job["response"], parsing_timeout=None)
    if not given:
        return {"outcome": "unparseable", "extracted": None}
    right = verify(gold, given, timeout_seconds=None)
    return {"outcome": "correct" if right else "wrong", "extracted": str(given[0])[:500]}


def as_latex(gold: str) -> str:
    """A bare LaTeX answer is wrapped, because the parser looks for mathematics inside text."""
    gold = gold.strip()
    if "\\boxed" in gold or gold.startswith("$") or ("\\" not in gold and number(gold) is not None):
        return gold
    return f"${gold}$"


class MathReward:
    """math-verify behind a process boundary."""

    def __init__(self, limit: float, workers: int, extract: str = "auto") -> None:
        self.limit, self.extract = limit, extract
        self.pool = WorkerPool("sppo.rewards.math:judge_one", workers=workers, limit=limit)

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct, wrong, unparseable, timeout or crashed (score 0); invalid_task and infra_error (masked)."""
        problems = [reference_problem(r.task) for r in rollouts]
        said = [self._answer(r.text) for r in rollouts]
        verdicts = [
            Verdict(0.0, "unparseable", {"extracted": None})
            if problem is None
            else Verdict(0.0, "invalid_task", {"reason": problem})
            for problem in problems
        ]
        todo = [i for i, problem in enumerate(problems) if problem is None and said[i] is not None]
        answers = self.pool.run([{"gold": gold_of(rollouts[i].task), "response": said[i]} for i in todo])
        for i, answer in zip(todo, answers, strict=True):
            verdicts[i] = self._verdict(answer, gold_of(rollouts[i].task))
        return verdicts

    def _answer(self, text: str) -> str | None:
        """What math-verify reads: the whole response, or the answer at the place that the recipe chose."""
        if self.extract == "auto":
            return text
        found = extract_answer(text, self.extract)
        return None if found is None else as_latex(found)

    def _verdict(self, answer: dict[str, Any], gold: str | None) -> Verdict:
        evidence: dict[str, Any] = {"gold": gold}
        if "ok" in answer:
            result = dict(answer["ok"])
            outcome = result.pop("outcome")
            return Verdict(1.0 if outcome == "correct" else 0.0, outcome, evidence | result)
        if "timeout" in answer:
            return Verdict(0.0, "timeout", evidence | {"limit_s": self.limit})
        if "infra" in answer:
            return Verdict(0.0, "infra_error", evidence | {"reason": answer["infra"]})
        return Verdict(0.0, "crashed", evidence | {"reason": str(answer.get("error", answer.get("crashed")))})

    def check(self, task: Task) -> str | None:
        """Why the reference cannot be graded, math-verify's own parser included, or None."""
        return reference_problem(task) or self.check_all([task])[0]

    def check_all(self, tasks: Sequence[Task]) -> list[str | None]:
        """`check` for many tasks at once, in parallel."""
        problems = [reference_problem(t) for t in tasks]
        todo = [i for i, p in enumerate(problems) if p is None]
        for i, answer in zip(
            todo, self.pool.run([{"gold": gold_of(tasks[i]), "response": None} for i in todo]), strict=True
        ):
            if "ok" not in answer:
                problems[i] = f"the reference answer cannot be parsed within its limits: {answer}"
            elif answer["ok"]["outcome"] != "correct":
                problems[i] = answer["ok"]["reason"]
        return problems

    def close(self) -> None:
        self.pool.close()
