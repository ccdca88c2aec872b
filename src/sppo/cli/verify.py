"""`sppo verify`: score given responses without a model, which is how to debug a verifier."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import DataError, UserError
from ..types import Rollout, Verdict
from ._shared import add_columns_option, emit


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("verify", help="score given responses with a reward", description=__doc__)
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a file of rows (.jsonl, .csv, .parquet, …) with `response` and the row's answer or tests",
    )
    parser.add_argument(
        "--reward", required=True, help="a reward: 'answer', 'math', 'answer:extract=boxed', package.module:object"
    )
    parser.add_argument(
        "--response", metavar="COLUMN", help="the column to score instead of `response`, e.g. canonical_solution"
    )
    add_columns_option(parser)
    parser.add_argument("--out", metavar="VERDICTS.jsonl", help="write one verdict per row")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Judge every row."""
    from ..rewards.loading import load_reward
    from ..tasks.rows import read_rows

    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out: {args.out} is a folder; name a file")
    reward = load_reward(args.reward)
    rollouts = [_rollout(dict(row), f"{args.file}:{number}", args) for number, row in read_rows(Path(args.file))]
    if not rollouts:
        raise DataError(f"{args.file} holds no rows")
    verdicts = reward.judge(rollouts)
    reward.close()
    judged = list(zip(rollouts, verdicts, strict=True))
    if args.out:
        _write(Path(args.out), judged)
    graded = [v for v in verdicts if not v.masked]
    outcomes = dict(Counter(v.outcome for v in verdicts).most_common())
    mean = sum(v.score for v in graded) / len(graded) if graded else None
    result = {"n": len(verdicts), "graded": len(graded), "mean_score": mean, "outcomes": outcomes}
    of = f"{len(graded)} graded rows of {len(verdicts)}"
    shown = "no row could be graded" if mean is None else f"mean score {mean:.4f} over {of}"
    for r, v in [(r, v) for r, v in judged if v.masked][:3]:
        shown += f"\n  {r.task.id} could not be graded: {v.evidence.get('reason', v.outcome)}"
    if not args.out:
        shown += "\n  (--out VERDICTS.jsonl writes every verdict with its evidence)"
    emit(result, args.json, shown + "\n" + "\n".join(f"  {name:<13} {count}" for name, count in outcomes.items()))
    return 0


def _rollout(row: dict[str, Any], name: str, args: argparse.Namespace) -> Rollout:
    """A row with its response, as if it had been sampled. Raises DataError where the row has none."""
    from ..tasks.records import has_prompt, renamed, task_from
    from ..tasks.rows import columns_found

    row = renamed(row, args.columns or {}, name)
    if args.response:
        response = row.get(args.response)
    else:
        response = row.pop("response", None)
        if response is None:
            response = row.pop("completion", None)
    if isinstance(response, list) and response and isinstance(response[-1], dict):
        response = response[-1].get("content")
    if not isinstance(response, str):
        raise DataError(
            f"{name}: the row has no `{args.response or 'response'}` text to score; its columns are {columns_found(row)}"
            + ("" if args.response else "; name another one with --response")
        )
    if not has_prompt(row):
        row["prompt"] = ""
    return Rollout.answer(task_from(row, name), [], [], [], "stop", response)


def _write(path: Path, judged: list[tuple[Rollout, Verdict]]) -> None:
    """One JSON object per row."""
    from ..files import write_atomic
    from ..run.directory import no_space

    rows = [
        {"row": r.task.id, "score": v.score, "outcome": v.outcome, "masked": v.masked, "evidence": dict(v.evidence)}
        for r, v in judged
    ]
    with no_space(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "\n".join(json.dumps(row, default=str) for row in rows) + "\n")
