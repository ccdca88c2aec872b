"""Judge recorded responses again: the same reward, the same responses, the same verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..errors import DataError, UserError
from ..files import open_regular, readable
from ..recipe.config import Config
from ..rewards.base import Reward
from ..rewards.combine import MixedReward
from ..rollout.collect import truncation_rule
from ..rollout.trajectory import failure
from ..types import Rollout, Task, Verdict
from .chain import step_file

TOLERANCE = 1e-6
"""Scores are kept in single precision."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One recorded verdict and the new one; `then` and `now` are (score, correct, outcome)."""

    step: int
    row: int
    task: str
    then: tuple[float, float, str]
    now: tuple[float, float, str]

    @property
    def same(self) -> bool:
        """Whether the verdict was reproduced."""
        numbers = zip(self.then[:2], self.now[:2], strict=True)
        return self.then[2] == self.now[2] and all(abs(a - b) <= TOLERANCE for a, b in numbers)


def rows_of(run: Path, step: int) -> list[dict[str, Any]]:
    """A step's rollouts as recorded. Raises DataError."""
    path = step_file(run, step)
    try:
        with readable(f"`sppo audit verify {run}` says more: {path} cannot be read"), open_regular(path) as file:
            rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
            return rows
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"{run} has no step {step} (steps are counted from 0)") from None
        raise


def recorded(row: dict[str, Any]) -> Rollout:
    """A recorded rollout, ready to be judged again. Raises UserError where its task was not recorded whole."""
    if row.get("task") is None:
        raise UserError(
            f"task {row['task_id']} was not recorded whole (an older run, or columns that JSON cannot hold), so its verdict cannot be replayed"
        )
    if not isinstance(row["response"], str) or not isinstance(row["response_ids"], list):
        raise ValueError("a response is missing")
    task = json.loads(row["task"])
    prompt, columns = task["prompt"], task["columns"]
    chat = isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt)
    if not isinstance(columns, dict) or not (isinstance(prompt, str) or chat):
        raise ValueError("a task is not one")
    task = Task(str(row["task_id"]), prompt, columns, difficulty=row["difficulty"])
    said = json.loads(row.get("environment") or "{}")
    if row.get("turns") is None:
        return Rollout.answer(
            task,
            row["prompt_ids"],
            row["response_ids"],
            row["logps"],
            row["finish"],
            row["response"],
            row["sample"],
            evidence=said,
        )
    turns = [(start, end) for start, end in row["turns"]]
    return Rollout(
        task, row["ids"], turns, row["logps"], row["finish"], row["response"], row["sample"], evidence=said,
        messages=json.loads(row["messages"]),
    )  # fmt: skip


def replay(run: Path, steps: list[int], reward: Reward, config: Config, most: int | None = None) -> Iterator[Replayed]:
    """Judge the rollouts of some steps again, `most` of each step at most."""
    for step in steps:
        rows = rows_of(run, step)[:most]
        with readable(f"`sppo audit verify {run}` says more: step {step} of {run} cannot be read"):
            fades = [float(json.loads(row["evidence"]).get("fade", 1.0)) for row in rows]
            then = [(float(row["score"]), float(row["correct"]), str(row["outcome"])) for row in rows]
            rollouts = [recorded(row) for row in rows]
        for fade, part in groupby(range(len(rows)), key=lambda i: fades[i]):
            index = list(part)
            if isinstance(reward, MixedReward):
                reward.fade = fade
            some = [rollouts[i] for i in index if failure(rollouts[i].evidence) is None]
            judged = iter(reward.judge(some) if some else [])
            for i in index:
                rollout = rollouts[i]
                verdict = failure(rollout.evidence) or next(judged)
                found = truncation_rule(rollout, verdict, config.rollout.truncated)
                yield Replayed(step, i, rollout.task.id, then[i], _said(found))


def _said(verdict: Verdict) -> tuple[float, float, str]:
    return verdict.score, verdict.correct, verdict.outcome
