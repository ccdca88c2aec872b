"""`sppo verify`: score given responses without a model, which is how to debug a verifier."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import DataError, UserError
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
    parser.add_argument("--out", metavar="VERDICTS.jsonl", help="write one verdict a row")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Judge every row."""
    from ..rewards.loading import load_reward
    from ..run.directory import no_space, write_atomic
    from ..tasks.records import has_prompt, renamed, task_from
    from ..tasks.rows import columns_found, read_rows
    from ..types import Rollout

    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out: {args.out} is a folder; name a file")
    reward = load_reward(args.reward)
    rollouts = []
    for number, row in read_rows(Path(args.file)):
        name = f"{args.file}:{number}"
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
        rollouts.append(Rollout.answer(task_from(row, name), [], [], [], "stop", response))
    if not rollouts:
        raise DataError(f"{args.file} holds no rows")
    verdicts = reward.judge(rollouts)
    reward.close()
    if args.out:
        lines = [
            json.dumps(
                {
                    "row": r.task.id,
                    "score": v.score,
                    "outcome": v.outcome,
                    "masked": v.masked,
                    "evidence": dict(v.evidence),
                },
                default=str,
            )
            for r, v in zip(rollouts, verdicts, strict=True)
        ]
        with no_space(Path(args.out)):
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(args.out), "\n".join(lines) + "\n")
    graded = [v for v in verdicts if not v.masked]
    outcomes = dict(Counter(v.outcome for v in verdicts).most_common())
    mean = sum(v.score for v in graded) / len(graded) if graded else None
    result = {"n": len(verdicts), "graded": len(graded), "mean_score": mean, "outcomes": outcomes}
    shown = (
        "no row could be graded"
        if mean is None
        else f"mean score {mean:.4f} over {len(graded)} graded rows of {len(verdicts)}"
    )
    for r, v in [(r, v) for r, v in zip(rollouts, verdicts, strict=True) if v.masked][:3]:
        shown += f"\n  {r.task.id} could not be graded: {v.evidence.get('reason', v.outcome)}"
    if not args.out:
        shown += "\n  (--out VERDICTS.jsonl writes every verdict with its evidence)"
    emit(result, args.json, shown + "\n" + "\n".join(f"  {name:<13} {count}" for name, count in outcomes.items()))
    return 0
