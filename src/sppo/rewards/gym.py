"""reasoning-gym's own scorer, for `gym:` tasks. Each verdict runs in its own process, in a jail where one is available.

The answer is everything after the last `Answer:` (some families' answers take several lines), else the whole response.
A score below 1 keeps its value: some families give partial credit. inside/guards.py defines what an answer may be, and
corrects scorers that pay wrong answers.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import RecipeError, SandboxUnavailable
from ..sandbox.confined import REMEDY, command, confinement
from ..tasks.gym import make_dataset
from ..types import Rollout, Task, Verdict
from .extract import after_last_mark
from .inside.guards import EXPRESSIONS
from .workers import PATIENCE, WorkerPool

FIELDS = {"family": str, "seed": int, "size": int, "options": dict, "index": int}


def build(limit: float = 5.0, workers: int = 1) -> GymReward:
    """The reward for `reward.use = "gym:…"`. `limit` is processor seconds for one verdict."""
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= 600:
        raise RecipeError(f"reward gym: limit={limit} must be a number of seconds above 0 and at most 600")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise RecipeError(f"reward gym: workers={workers} must be a whole number above 0")
    return GymReward(limit, workers)


@lru_cache(maxsize=16)
def _dataset(family: str, seed: int, size: int, options: str) -> Any:
    return make_dataset(family, seed, size, json.loads(options))


@lru_cache(maxsize=4096)
def _problem(family: str, seed: int, size: int, options: str, index: int) -> tuple[str, Any]:
    """The problem as the scorer's process takes it, and its reference.

    Raises RecipeError, and whatever the library raises.
    """
    entry = _dataset(family, seed, size, options)[index]
    return base64.b64encode(pickle.dumps(entry)).decode(), entry["answer"]


def _key(where: Mapping[str, Any]) -> tuple[str, int, int, str, int]:
    return where["family"], where["seed"], where["size"], json.dumps(where["options"], sort_keys=True), where["index"]


class GymReward:
    """The family's scorer behind a process boundary."""

    def __init__(self, limit: float, workers: int) -> None:
        self.limit = limit
        script = Path(__file__).parent / "inside" / "scorer.py"
        self.pool = WorkerPool(
            "", workers=workers, limit=limit * PATIENCE + 60.0, command=lambda: command(script, "reasoning_gym")
        )

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct at a score of 1, wrong below it; invalid_task for rows that are not a gym task.

        Raises SandboxUnavailable for a family whose scorer evaluates answers, where there is no jail.
        """
        problems = [self.check(r.task) for r in rollouts]
        answers = [r.text.strip() if (marked := after_last_mark(r.text)) is None else marked for r in rollouts]
        todo = [i for i, problem in enumerate(problems) if problem is None]
        jobs = []
        for i in todo:
            where = rollouts[i].task.columns["gym"]
            more = {"limit": self.limit, "patience": self.limit * PATIENCE}
            jobs.append(where | more | {"entry": _problem(*_key(where))[0], "answer": answers[i]})
        verdicts = [Verdict(0.0, "invalid_task", {"reason": problem}) for problem in problems]
        for i, result in zip(todo, self.pool.run(jobs), strict=True):
            evidence = {"extracted": answers[i], "gold": rollouts[i].task.columns.get("answer")}
            verdicts[i] = self._verdict(result, evidence)
        return verdicts

    def _verdict(self, result: dict[str, Any], evidence: dict[str, Any]) -> Verdict:
        """The scorer's result as a verdict.

        Its form is checked, because it comes from the process that read the answer.
        """
        claim = result.get("ok")
        if "infra" in result or "timeout" in result:
            why = result.get("infra", "the scorer's process did not answer and was ended")
            return Verdict(0.0, "infra_error", evidence | {"reason": why})
        if not isinstance(claim, Mapping):
            return Verdict(0.0, "crashed", evidence | {"reason": str(result)[:300]})
        if "score" in claim:
            score = claim["score"]
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0.0 <= score <= 1.0:
                return Verdict(0.0, "crashed", evidence | {"reason": f"the scorer returned {score!r}"[:300]})
            return Verdict(float(score), "correct" if score >= 1.0 else "wrong", evidence)
        if "late" in claim:
            return Verdict(0.0, "infra_error", evidence | {"reason": f"no verdict after {claim['late']} s"})
        if "timeout" in claim:
            return Verdict(0.0, "timeout", evidence | {"limit_s": self.limit})
        if "masked" in claim:
            return Verdict(0.0, "invalid_task", evidence | {"reason": str(claim["masked"])[:300]})
        if "unread" in claim:
            return Verdict(0.0, "unparseable", evidence | {"reason": str(claim["unread"])[:300]})
        return Verdict(0.0, "crashed", evidence | {"reason": str(claim.get("crashed"))[:300]})

    def check(self, task: Task) -> str | None:
        """Why this is not a problem that reasoning-gym made, or None.

        Raises SandboxUnavailable for a family whose scorer evaluates answers, where there is no jail.
        """
        where = task.columns.get("gym")
        if not isinstance(where, dict):
            return "not a reasoning-gym task; use the reward `answer` or `math`"
        for name, kind in FIELDS.items():
            if not isinstance(where.get(name), kind) or isinstance(where[name], bool):
                return f"its column `gym` has no `{name}` of type {kind.__name__}; make the row with a gym: task"
        if where["family"] in EXPRESSIONS and confinement() == "none":
            raise SandboxUnavailable(
                f"gym:{where['family']}: reasoning-gym's scorer of this family evaluates answers, which needs a jail; {REMEDY}"
            )
        try:
            answer = _problem(*_key(where))[1]
        except RecipeError as error:
            return str(error)
        except Exception as error:
            return f"reasoning-gym cannot make problem {where['index']} of {where['family']}: {type(error).__name__}: {error}"
        if task.columns.get("answer") is not None and str(answer) != str(task.columns["answer"]):
            return (
                f"reasoning-gym makes another problem from this seed here than the row's: {where['family']} depends on the "
                "process, or the version is another"
            )
        return None

    def check_all(self, tasks: Sequence[Task]) -> list[str | None]:
        """`check` for each row; and its own answer, where it has one, must be paid in full."""
        reasons = [self.check(task) for task in tasks]
        todo = [i for i, why in enumerate(reasons) if why is None and tasks[i].columns.get("answer") is not None]
        golds = [Rollout.answer(tasks[i], [], [], [], "stop", f"Answer: {tasks[i].columns['answer']}") for i in todo]
        for i, verdict in zip(todo, self.judge(golds), strict=True):
            if verdict.score < 1.0 and verdict.outcome != "infra_error":
                said = verdict.evidence.get("reason", f"it scores {verdict.score:g}")
                reasons[i] = f"the row's own answer is not right for reasoning-gym's scorer: {said}"
        return reasons

    def close(self) -> None:
        """End the scorer's process; it starts again when needed."""
        self.pool.close()
