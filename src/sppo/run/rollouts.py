"""A step's rollouts as a table: one row per response, written as `rollouts/step-NNNNNN.parquet`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ..types import Rollout, Task

ROLLOUT_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("task_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("logps", pa.list_(pa.float32())),
        ("finish", pa.string()),
        ("score", pa.float32()),
        ("correct", pa.float32()),
        ("outcome", pa.string()),
        ("masked", pa.bool_()),
        ("evidence", pa.string()),
        ("difficulty", pa.float32()),
        ("value", pa.float32()),
        ("advantage", pa.float32()),
        ("task", pa.string()),
        ("tokens", pa.int32()),
        ("log_ratios", pa.list_(pa.float32())),
        ("clipped", pa.float32()),
        ("ids", pa.list_(pa.int32())),
        ("turns", pa.list_(pa.list_(pa.int32()))),
        ("messages", pa.string()),
        ("environment", pa.string()),
    ]
)


def rollout_table(
    step: int,
    rollouts: Sequence[Rollout],
    values: Sequence[float] | None,
    advantages: Sequence[float],
    log_ratios: Sequence[Sequence[float]],
    clipped: Sequence[float],
) -> pa.Table:
    """The table of a step's judged rollouts.

    Args:
        values: the critic's prediction for each rollout, where there is a critic.
        advantages: one per rollout; the mean over its tokens where each token has its own.
        log_ratios: log π_θ/π_old of each token, at least as long as the response.
        clipped: the share of each response's ratios that the clip cut off.

    `ids`, `turns` (spans of `ids` that the policy wrote) and `messages` are of trajectories with an environment, and
    `environment` is what it said of them. A masked rollout has been trained on by nothing: its advantage, ratios and clipping are null.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ROLLOUT_SCHEMA.names}
    made = zip(rollouts, values or (None,) * len(rollouts), advantages, log_ratios, clipped, strict=True)
    for r, value, advantage, ratios, cut in made:
        verdict = r.verdict
        assert verdict is not None
        trained = not verdict.masked
        row = (
            step, r.task.id, r.sample, r.task.text, r.text, list(r.prompt_ids), list(r.response_ids), list(r.logps), r.finish,
            verdict.score, verdict.correct, verdict.outcome, verdict.masked, json.dumps(dict(verdict.evidence), default=str),
            r.task.difficulty, value, advantage if trained else None,
            task_json(r.task), len(r.response_ids), ratios[: len(r.response_ids)] if trained else None, cut if trained else None,
            *trajectory_cells(r),
        )  # fmt: skip
        for name, cell in zip(columns, row, strict=True):
            columns[name].append(cell)
    return pa.table(columns, schema=ROLLOUT_SCHEMA)


def trajectory_cells(r: Rollout) -> tuple[Any, Any, Any, Any]:
    """`ids`, `turns`, `messages` and `environment` of a trajectory; null where a prompt and a response are all of it."""
    said = json.dumps(dict(r.evidence), default=str) if r.evidence else None
    if not r.messages and len(r.turns) == 1:
        return None, None, None, said
    return list(r.ids), [list(turn) for turn in r.turns], json.dumps(list(r.messages), default=str), said


def task_json(task: Task) -> str | None:
    """What a task's verdict can be replayed from, its prompt and columns; None where JSON would change them."""
    whole = {"prompt": task.prompt, "columns": dict(task.columns)}
    try:
        text = json.dumps(whole)
    except (TypeError, ValueError):
        return None
    return text if json.loads(text) == whole else None
