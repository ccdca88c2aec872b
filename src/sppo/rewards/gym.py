"""reasoning-gym's own scorer, in killable worker processes: for `gym:` tasks.

The answer is everything after the last `Answer:` (some families' answers take several lines), else the whole response. A score below 1 keeps its
value: some families give partial credit.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..types import Rollout, Task, Verdict
from .answer import after_last_mark
from .workers import WorkerPool

MATHEMATICS = frozenset({
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "pi",
    "Abs", "abs", "sign", "factorial", "Rational", "Integer", "and", "or", "not", "in", "if", "else",
})  # fmt: skip
"""What an answer may put before a parenthesis where a family's scorer evaluates it."""


def build(limit: float = 5.0, workers: int = 1) -> GymReward:
    """The reward for `reward.use = "gym:…"`. `limit` is seconds of wall time for one verdict."""
    return GymReward(limit, workers)


@lru_cache(maxsize=16)
def _dataset(family: str, seed: int, size: int, options: str) -> Any:
    from ..tasks.gym import make_dataset

    return make_dataset(family, seed, size, json.loads(options))


def warm_up() -> None:
    """Import what judging needs before the first verdict's clock runs."""
    import reasoning_gym  # noqa: F401


def judge_one(job: dict[str, Any]) -> float:
    """The family's score, inside a worker; the problem is made again from its index."""
    where = job["gym"]
    dataset = _dataset(where["family"], where["seed"], where["size"], json.dumps(where["options"], sort_keys=True))
    entry = dataset[where["index"]]
    if job["gold"] is not None and str(entry["answer"]) != str(job["gold"]):
        return -1.0  # another process, another problem
    if _evaluates(type(dataset).__module__) and not harmless(str(job["answer"])):
        return 0.0
    return float(dataset.score_answer(answer=job["answer"], entry=entry))


@lru_cache(maxsize=256)
def _evaluates(module: str) -> bool:
    """Whether a family's scorer runs what it is given (`eval`, SymPy's parser): looked up in its source."""
    source = inspect.getsource(sys.modules[module])
    return re.search(r"\b(?:eval|exec|parse_expr|sympify|parse_latex)\s*\(", source) is not None


def harmless(answer: str) -> bool:
    """Whether an answer may be evaluated: plain literals, or nothing that calls anything but mathematics, and no attributes."""
    if len(answer) > 10_000:
        return False
    try:
        ast.literal_eval(answer)
        return True
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    if re.search(r"\.\s{0,9}[A-Za-z_]|__|[\\`@#;]|:=", answer) or not answer.isascii():
        return False
    called = re.findall(r"([A-Za-z_][A-Za-z_0-9]*|[)\]}'\"])\s*\(", answer)
    return all(name in MATHEMATICS or (len(name) == 1 and name.isalpha()) for name in called)


class GymReward:
    """The family's scorer behind a process boundary."""

    def __init__(self, limit: float, workers: int) -> None:
        self.limit = limit
        self.pool = WorkerPool("sppo.rewards.gym:judge_one", workers=workers, limit=limit)

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct at a score of 1, wrong below it; invalid_task for rows that are not a gym task."""
        answers = [after_last_mark(r.text) or r.text.strip() for r in rollouts]
        todo = [i for i, r in enumerate(rollouts) if self.check(r.task) is None]
        results = self.pool.run(
            [
                {"gym": (c := rollouts[i].task.columns)["gym"], "answer": answers[i], "gold": c.get("answer")}
                for i in todo
            ]
        )
        verdicts = [Verdict(0.0, "invalid_task", {"reason": self.check(r.task)}) for r in rollouts]
        for i, result in zip(todo, results, strict=True):
            evidence: dict[str, Any] = {"extracted": answers[i], "gold": rollouts[i].task.columns.get("answer")}
            if result.get("ok") == -1.0:
                why = (
                    "reasoning-gym makes another problem from this seed in another process; the family cannot be judged"
                )
                verdicts[i] = Verdict(0.0, "invalid_task", evidence | {"reason": why})
            elif "ok" in result:
                score = min(max(result["ok"], 0.0), 1.0)
                verdicts[i] = Verdict(score, "correct" if score >= 1.0 else "wrong", evidence)
            elif "timeout" in result:
                verdicts[i] = Verdict(0.0, "timeout", evidence | {"limit_s": self.limit})
            elif "infra" in result:
                verdicts[i] = Verdict(0.0, "infra_error", evidence | {"reason": result["infra"]})
            else:
                verdicts[i] = Verdict(0.0, "crashed", evidence | {"reason": str(result)})
        return verdicts

    def check(self, task: Task) -> str | None:
        """Why this is not a problem that reasoning-gym made, or None."""
        return (
            None
            if isinstance(task.columns.get("gym"), dict)
            else "not a reasoning-gym task; use the reward `answer` or `math`"
        )

    def close(self) -> None:
        self.pool.close()
