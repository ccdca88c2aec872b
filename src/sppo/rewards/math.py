r"""Mathematics by value: an answer is read whole by a grammar (`latex.py`) and compared exactly (`same.py`), in
killable worker processes.

A reference that the grammar cannot read whole makes its row `invalid_task`; such an answer in a response is
`unparseable`. A number inside it is never taken instead. No library parses a response, and nothing in it is executed.
Evaluation has a budget; a verdict that still takes longer than `limit` costs only its worker, in whichever thread the
trainer runs, and is reported as `timeout`.

`math`, `math:limit=5,workers=2`, `math:extract=boxed` (auto: tags, box, `####`, `Answer:`, else the last formula or
number; or boxed, marked, hash, number, whole)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict
from .answer import gold_of, reference_problem
from .extract import EXTRACT, extract_answer
from .reading import read
from .same import same
from .tokens import Unreadable
from .workers import WorkerPool


def build(limit: float = 5.0, workers: int = 2, extract: str = "auto") -> MathReward:
    """The reward for `reward.use = "math:…"`. `limit` is seconds of wall time for one verdict."""
    if extract not in EXTRACT:
        raise RecipeError(f"math: extract={extract} is not one of {', '.join(EXTRACT)}")
    return MathReward(limit, workers, extract)


def warm_up() -> None:
    """Import and exercise what judging needs before the first verdict is timed."""
    judge_one({"gold": r"\sqrt{2}", "response": r"\boxed{2^{1/2}}"})


def judge_one(job: dict[str, Any]) -> dict[str, Any]:
    """One verdict, inside a worker. `{"gold", "response", "extract"}` → `{"outcome", "extracted"}`, or `{"outcome":
    "invalid_task", "reason"}`.

    A response of None asks about the reference alone: it must be readable, and in a box it must be right.
    """
    gold = job["gold"]
    try:
        references = read(gold)
    except Unreadable as why:
        return {"outcome": "invalid_task", "reason": f"the reference answer {gold!r} cannot be read: {why}"}
    response = job["response"] if job["response"] is not None else f"\\boxed{{{gold}}}"
    said = extract_answer(response, job.get("extract", "auto"), mathematics=True)
    if said is None:
        return {"outcome": "unparseable", "extracted": None}
    try:
        answers = read(said)
    except Unreadable as why:
        return {"outcome": "unparseable", "extracted": said[:500], "reason": f"the answer cannot be read: {why}"}
    right = any(same(reference, answer) for reference in references for answer in answers)
    return {"outcome": "correct" if right else "wrong", "extracted": said[:500]}


class MathReward:
    """Reading and comparing behind a process boundary."""

    def __init__(self, limit: float, workers: int, extract: str = "auto") -> None:
        self.limit, self.extract = limit, extract
        self.pool = WorkerPool("sppo.rewards.math:judge_one", workers=workers, limit=limit)

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct, wrong, unparseable, timeout or crashed (score 0); invalid_task and infra_error (masked)."""
        problems = [reference_problem(r.task) for r in rollouts]
        verdicts = [Verdict(0.0, "invalid_task", {"reason": problem}) for problem in problems]
        todo = [i for i, problem in enumerate(problems) if problem is None]
        jobs = [
            {"gold": gold_of(rollouts[i].task), "response": rollouts[i].text, "extract": self.extract} for i in todo
        ]
        for i, answer in zip(todo, self.pool.run(jobs), strict=True):
            verdicts[i] = self._verdict(answer, gold_of(rollouts[i].task))
        return verdicts

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
        """Why the reference cannot be graded, or None: it must be readable, and be right when it is given as the
        answer."""
        return reference_problem(task) or self.check_all([task])[0]

    def check_all(self, tasks: Sequence[Task]) -> list[str | None]:
        """`check` for many tasks at once, in parallel."""
        problems = [reference_problem(t) for t in tasks]
        todo = [i for i, p in enumerate(problems) if p is None]
        jobs = [{"gold": gold_of(tasks[i]), "response": None} for i in todo]
        for i, answer in zip(todo, self.pool.run(jobs), strict=True):
            if "ok" not in answer:
                problems[i] = f"the reference answer cannot be judged within its limits: {answer}"
            elif answer["ok"]["outcome"] == "invalid_task":
                problems[i] = answer["ok"]["reason"]
            elif answer["ok"]["outcome"] != "correct":
                problems[i] = (
                    f"the reference answer is not taken for itself: {jobs[todo.index(i)]['gold']!r} is {answer['ok']['outcome']}"
                )
        return problems

    def close(self) -> None:
        self.pool.close()
