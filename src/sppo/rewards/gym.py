"""reasoning-gym's own scorer, in killable worker processes: for `gym:` tasks.

The answer is everything after the last `Answer:` (some families' answers take several lines), else the whole response. A score below 1 keeps its
value: some families give partial credit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..types import Rollout, Task, Verdict
from .answer import after_last_mark
from .workers import WorkerPool


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
    return float(dataset.score_answer(answer=job["answer"], entry=dataset[where["index"]]))


class GymReward:
    """The family's scorer behind a process boundary."""

    def __init__(self, limit: float, workers: int) -> None:
        self.limit = limit
        self.pool = WorkerPool("sppo.rewards.gym:judge_one", workers=workers, limit=limit)

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct at a score of 1, wrong below it; invalid_task for rows that are not a gym task."""
        answers = [after_last_mark(r.text) or r.text.strip() for r in rollouts]
        todo = [i for i, r in enumerate(rollouts) if self.check(r.task) is None]
        results = self.pool.run([{"gym": rollouts[i].task.columns["gym"], "answer": answers[i]} for i in todo])
        verdicts = [Verdict(0.0, "invalid_task", {"reason": self.check(r.task)}) for r in rollouts]
        for i, result in zip(todo, results, strict=True):
            evidence: dict[str, Any] = {"extracted": answers[i], "gold": rollouts[i].task.columns.get("answer")}
            if "ok" in result:
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
