"""`sppo data check`: read a dataset, and list rows that cannot be graded."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, ModelError, UserError
from ..tasks.rows import columns_found
from ._shared import add_columns_option, emit

ROWS, REASONS = 5, 10
"""Rows printed for one reason, and reasons printed of one kind."""
WHAT = {
    "row": "cannot be read",
    "prompt": "ask nothing",
    "template": "are refused by the model's chat template",
    "reference": "have no reference or tests that the reward can judge by",
    "over-long": "are too long",
    "duplicate": "repeat a prompt",
}
KINDS = tuple(WHAT)
"""The order in which problems are listed, from unusable rows to mere duplicates."""
MADE = 1000
"""Problems checked of a generated task, which may have a million."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row."""

    row: str
    kind: str
    reason: str


def add(subparsers: Any) -> None:
    """Register the command."""
    group = subparsers.add_parser("data", help="look at a dataset", description="Look at a dataset.")
    commands = group.add_subparsers(metavar="COMMAND", required=True)
    parser = commands.add_parser("check", help="list what cannot be graded", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="a file of rows (.jsonl, .csv, .parquet, …) or a task spec")
    parser.add_argument(
        "--reward",
        help="the reward that will grade it; 'math' also reads every reference and gives it as its own answer [by the first row: code, gym or answer]",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="exit 2 when more than this share of rows is bad [0]"
    )
    add_columns_option(parser)
    parser.add_argument("--model", help="render and count prompts with this model's tokenizer and chat template")
    parser.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=1024,
        help="prompts with more tokens count as too long [1024; 4 characters per token without --model]",
    )
    parser.add_argument(
        "--n", type=int, help="look at the first N rows only [all of a file, 1000 of a task that makes its problems]"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check every row; exit 2 above the threshold."""
    from ..rewards.loading import fitting_reward, load_reward

    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is a share between 0 and 1, not {args.threshold}")
    reward = load_reward(args.reward) if args.reward else None  # an unknown reward is reported before the file is read
    problems: list[Problem] = []
    tasks, columns = _read(args, problems)
    n = len(tasks) + len(problems)
    if n == 0:
        raise DataError(f"{args.data} holds no rows")
    use = args.reward or (fitting_reward(tasks[0]) if tasks else "answer")
    reward = reward or load_reward(use)
    prompts, read = _prompt_problems(args, tasks)
    problems += prompts
    check_all = getattr(reward, "check_all", None)
    reasons = check_all(tasks) if check_all else [reward.check(t) for t in tasks]
    problems += [Problem(t.id, "reference", why) for t, why in zip(tasks, reasons, strict=True) if why]
    reward.close()
    problems.sort(key=lambda p: KINDS.index(p.kind))
    bad = len({p.row for p in problems})
    unusable = len({p.row for p in problems if p.kind != "duplicate"})
    kinds = dict(Counter(p.kind for p in problems))
    share = bad / n
    result = {
        "reward": use, "n": n, "bad": bad, "unusable": unusable, "share": share, "kinds": kinds, "columns": columns,
        "problems": [vars(p) for p in problems], "prompt": read,
    }  # fmt: skip
    lines = [line for kind in KINDS if kind in kinds for line in _shown([p for p in problems if p.kind == kind])]
    if columns:
        lines.append(f"columns: {columns_found(columns)}")
    if read:
        lines.append(read)
    lines.append(
        f"{bad} of {n} rows ({share:.2%}) have a problem for the reward {use}"
        + (
            f" ({unusable} cannot be used): {', '.join(f'{kinds[k]} {WHAT[k]}' for k in KINDS if k in kinds)}"
            if bad
            else ""
        )
    )
    emit(result, args.json, "\n".join(lines))
    return 2 if share > args.threshold else 0


def _shown(problems: list[Problem]) -> list[str]:
    """The problems of one kind, those that share a reason in one line."""
    by_reason: dict[str, list[str]] = {}
    for p in problems:
        by_reason.setdefault(p.reason, []).append(p.row)
    kind = problems[0].kind
    lines = []
    for reason, (first, *rest) in list(by_reason.items())[:REASONS]:
        numbers = ", ".join(row.rpartition(":")[2] for row in rest[:ROWS])
        also = f" (also {len(rest):,} more: {numbers}{', …' if len(rest) > ROWS else ''})" if rest else ""
        lines.append(f"{first}: {kind}: {reason}{also}")
    if len(by_reason) > REASONS:
        left = sum(len(rows) for rows in list(by_reason.values())[REASONS:])
        lines.append(f"… and {left:,} more: {kind} (--json lists them all)")
    return lines


def _read(args: argparse.Namespace, problems: list[Problem]) -> tuple[list[Any], list[str]]:
    """The tasks, and the columns that the rows have; unreadable rows go to `problems` instead of ending the check."""
    from ..spec import is_records
    from ..tasks.base import in_split
    from ..tasks.loading import load_tasks, record_options
    from ..tasks.records import rows_of, task_from

    if not is_records(args.data):
        source = load_tasks(args.data, columns=args.columns)
        return [source[i] for i in range(min(args.n or MADE, len(source)))], []
    tasks = []
    columns: dict[str, None] = {}
    broken: list[tuple[int, str]] = []
    options = record_options(args.data)
    split = str(options.pop("split", "all"))
    rows, where = rows_of(**options, broken=broken)
    for count, (number, row) in enumerate(rows):
        if args.n is not None and count >= args.n:
            break
        columns |= dict.fromkeys(row)
        name = f"{where}:{number}"
        try:
            task = task_from(row, name, args.columns)
        except DataError as error:
            problems.append(Problem(name, "row", str(error).removeprefix(f"{name}: ")))
            continue
        if in_split(task.text, split):
            tasks.append(task)
    problems.extend(Problem(f"{where}:{number}", "row", why) for number, why in broken)
    problems.sort(key=lambda p: int(p.row.rpartition(":")[2]))
    return tasks, list(columns)


def _prompt_problems(args: argparse.Namespace, tasks: list[Any]) -> tuple[list[Problem], str | None]:
    """What is wrong with prompts, and one prompt as the model of --model reads it."""
    from ..models.loading import load_tokenizer, prompt_ids
    from ..run.prompts import said_prompt
    from ..tasks.records import is_empty

    tokenizer = load_tokenizer(args.model, "--model") if args.model else None
    chat = bool(getattr(tokenizer, "chat_template", None))
    seen: dict[bytes, str] = {}
    found = []
    read = None
    for task in tasks:
        if is_empty(task.prompt):
            found.append(Problem(task.id, "prompt", "the prompt is empty"))
            continue
        tokens = len(task.text) // 4
        if tokenizer:
            try:
                ids = prompt_ids(tokenizer, task, chat)
            except ModelError as error:
                found.append(Problem(task.id, "template", str(error).removeprefix(f"task {task.id}: ")))
                continue
            tokens = len(ids)
            read = read or said_prompt("model", task.id, ids, tokenizer.decode(ids, skip_special_tokens=False))
        if tokens > args.max_prompt_tokens:
            about = "" if tokenizer else "about "
            found.append(
                Problem(
                    task.id,
                    "over-long",
                    f"the prompt has {about}{tokens} tokens, the limit is {args.max_prompt_tokens}",
                )
            )
        key = hashlib.blake2b(" ".join(_whole(task).split()).encode(), digest_size=16).digest()
        if key in seen:
            found.append(Problem(task.id, "duplicate", f"the same prompt as {seen[key]}"))
        else:
            seen[key] = task.id
    return found, read


def _whole(task: Any) -> str:
    """The identity of a prompt: its text, and the tools and tool calls of a conversation."""
    calls = [] if isinstance(task.prompt, str) else [m["tool_calls"] for m in task.prompt if "tool_calls" in m]
    return task.text if not calls else f"{task.text}{calls}"
