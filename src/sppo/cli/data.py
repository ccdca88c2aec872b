"""`sppo data check`: read a dataset, and list what could not be graded before it costs a run."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import DataError, UserError
from ._shared import emit

SHOWN = 20
MADE = 1000
"""Problems that are looked at of a task that makes them: it may have a million."""


def add(subparsers: Any) -> None:
    """Register the command."""
    group = subparsers.add_parser("data", help="look at a dataset", description="Look at a dataset.")
    commands = group.add_subparsers(metavar="COMMAND", required=True)
    parser = commands.add_parser("check", help="list what cannot be graded", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="a .jsonl/.parquet file or a task spec")
    parser.add_argument(
        "--reward",
        help="the reward that will grade it; 'math' also parses every reference [by the first row: code, gym or answer]",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="exit 2 when more than this share of rows is bad [0]"
    )
    parser.add_argument("--model", help="count prompt tokens with this model's tokenizer")
    parser.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=1024,
        help="prompts above this are over-long [1024; 4 characters a token without --model]",
    )
    parser.add_argument(
        "--n", type=int, help="look at the first N rows only [all of a file, 1000 of a task that makes its problems]"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check every row; exit 2 above the threshold."""
    from ..rewards.base import fitting_reward, load_reward

    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is a share between 0 and 1, not {args.threshold}")
    reward = load_reward(args.reward) if args.reward else None  # a name that is none is said before the file is read
    problems: list[dict[str, Any]] = []
    tasks = _read(args, problems)
    n = len(tasks) + len(problems)
    if n == 0:
        raise DataError(f"{args.data} holds no rows")
    use = args.reward or (fitting_reward(tasks[0]) if tasks else "answer")
    reward = reward or load_reward(use)
    problems += _prompt_problems(args, tasks)
    check_all = getattr(reward, "check_all", None)
    reasons = check_all(tasks) if check_all else [reward.check(t) for t in tasks]
    problems += [
        {"row": t.id, "kind": "reference", "reason": why} for t, why in zip(tasks, reasons, strict=True) if why
    ]
    reward.close()
    bad = len({p["row"] for p in problems})
    kinds = dict(Counter(p["kind"] for p in problems))
    share = bad / n
    result = {"reward": use, "n": n, "bad": bad, "share": share, "kinds": kinds, "problems": problems}
    lines = [f"{p['row']}: {p['kind']}: {p['reason']}" for p in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN} more (--json lists them all)")
    lines.append(
        f"{bad} of {n} rows ({share:.2%}) have a problem for the reward {use}" + (f": {kinds}" if kinds else "")
    )
    emit(result, args.json, "\n".join(lines))
    return 2 if share > args.threshold else 0


def _read(args: argparse.Namespace, problems: list[dict[str, Any]]) -> list[Any]:
    """The tasks; unreadable rows go to `problems` instead of ending the check."""
    from ..tasks.base import is_records, load_tasks
    from ..tasks.records import read_rows, task_from

    if not is_records(args.data) or ":" in args.data:
        source = load_tasks(args.data)
        return [source[i] for i in range(min(args.n or MADE, len(source)))]
    tasks = []
    broken: list[tuple[int, str]] = []
    for number, row in read_rows(Path(args.data), broken):
        if args.n is not None and number > args.n:
            break
        try:
            tasks.append(task_from(row, f"{args.data}:{number}"))
        except DataError as error:
            problems.append({"row": f"{args.data}:{number}", "kind": "row", "reason": str(error).partition(": ")[2]})
    problems.extend({"row": f"{args.data}:{number}", "kind": "row", "reason": why} for number, why in broken)
    return tasks


def _prompt_problems(args: argparse.Namespace, tasks: list[Any]) -> list[dict[str, Any]]:
    from ..models.pretrained import load_tokenizer
    from ..tasks.records import is_empty

    tokenizer = load_tokenizer(args.model, "--model") if args.model else None
    seen: dict[bytes, str] = {}
    found = []
    for task in tasks:
        if is_empty(task.prompt):
            found.append({"row": task.id, "kind": "prompt", "reason": "the prompt is empty"})
            continue
        tokens = len(tokenizer(task.text)["input_ids"]) if tokenizer else len(task.text) // 4
        if tokens > args.max_prompt_tokens:
            about = "" if tokenizer else "about "
            found.append(
                {
                    "row": task.id,
                    "kind": "over-long",
                    "reason": f"the prompt has {about}{tokens} tokens, the limit is {args.max_prompt_tokens}",
                }
            )
        key = hashlib.blake2b(" ".join(task.text.split()).encode(), digest_size=16).digest()
        if key in seen:
            found.append({"row": task.id, "kind": "duplicate", "reason": f"the same prompt as {seen[key]}"})
        else:
            seen[key] = task.id
    return found
