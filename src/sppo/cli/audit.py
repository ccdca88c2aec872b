"""`sppo audit`: is a run what it says it is? Verify its hash chain, judge its responses again, or print one chain of reasoning whole."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..errors import DataError, UserError
from ._shared import emit

SHOWN = 10
"""Mismatches printed one by one."""


def add(subparsers: Any) -> None:
    """Register the command and its three verbs."""
    parser = subparsers.add_parser("audit", help="verify, replay or show what a run recorded", description=__doc__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    check = verbs.add_parser("verify", help="find any changed, missing or reordered byte of the chain and the rollouts")
    again = verbs.add_parser("replay", help="judge recorded responses again: every verdict must come out the same")
    again.add_argument("--step", type=int, metavar="N", help="one step only, counted from 0")
    again.add_argument("--n", type=int, metavar="K", help="at most so many of each step")
    show = verbs.add_parser("show", help="print one rollout complete")
    for verb, run in ((check, _verify), (again, _replay), (show, _show)):
        verb.add_argument("path", metavar="RUN", help="a run directory")
        verb.add_argument("--json", action="store_true", help="one JSON object as the last line")
        verb.set_defaults(run=run)
    show.add_argument("id", metavar="STEP:ROW", help="as metrics and replays name it, e.g. 12:3")


def _verify(args: argparse.Namespace) -> int:
    from ..audit.chain import verify

    run = _run(args.path)
    damage = list(verify(run))
    if damage:  # a run that is going on may have been between a step's file and its line
        time.sleep(1)
        damage = list(verify(run))
    steps = len((run / "audit.jsonl").read_bytes().splitlines())
    for step, what in damage:
        print(f"step {step}: {what}")
    text = "" if damage else f"{run}: {steps} steps, every line and every rollouts file is as it was written"
    emit({"sound": not damage, "steps": steps, "damage": [{"step": s, "what": w} for s, w in damage]}, args.json, text)
    return 1 if damage else 0


def _replay(args: argparse.Namespace) -> int:
    from ..audit.replay import replay
    from ..config import Config
    from ..rewards.base import load_reward
    from ..tasks.base import GIVEN

    run = _run(args.path)
    if args.n is not None and args.n < 1:
        raise UserError(f"--n must be 1 or more, not {args.n}")
    config = Config.load(run / "recipe.toml")
    if config.reward.use == GIVEN:
        raise UserError(
            f"{run} was judged by a reward given in Python, which no recipe names; replay it where that is known"
        )
    files = sorted((run / "rollouts").glob("step-*.parquet"))
    steps = [int(p.stem.removeprefix("step-")) for p in files] if args.step is None else [args.step]
    if not steps:
        raise DataError(f"{run} has no rollouts yet")
    reward = load_reward(config.reward.use, config.reward.limit)
    count, wrong = 0, []
    try:
        for found in replay(run, steps, reward, config, args.n):
            count += 1
            if not found.same:
                wrong.append(found)
                if len(wrong) <= SHOWN:
                    print(f"{found.step}:{found.row} ({found.task}): was {_words(found.then)}, is {_words(found.now)}")
    finally:
        reward.close()
    if len(wrong) > SHOWN:
        print(f"… and {len(wrong) - SHOWN} more")
    text = f"{count - len(wrong)} of {count} verdicts reproduced ({len(steps)} step{'s' * (len(steps) != 1)}, reward {config.reward.use!r})"
    mismatches = [{"id": f"{w.step}:{w.row}", "task": w.task, "then": w.then, "now": w.now} for w in wrong]
    emit({"replayed": count, "reproduced": count - len(wrong), "mismatches": mismatches}, args.json, text)
    return 1 if wrong else 0


def _show(args: argparse.Namespace) -> int:
    from ..audit.chain import file_sha256, step_file
    from ..audit.replay import rows_of

    run = _run(args.path)
    step, colon, row = args.id.partition(":")
    if not (colon and step.isdigit() and row.isdigit()):
        raise UserError(f"{args.id!r} names no rollout; write it as STEP:ROW, e.g. 12:3")
    rows = rows_of(run, int(step))
    if int(row) >= len(rows):
        raise DataError(f"step {step} of {run} has {len(rows)} rollouts, counted from 0; there is no {row}")
    found = rows[int(row)]
    try:
        json.loads(found["evidence"])
        sum(found["logps"], found["score"] + found["correct"])
        whole = isinstance(found["response"], str) and isinstance(found["prompt"], str)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise DataError(f"rollout {args.id} of {run} cannot be read; `sppo audit verify {run}` says more")
    entries = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    entry: dict[str, Any] = next((e for e in entries if e["step"] == int(step)), {})
    same = entry.get("rollouts_sha256") == file_sha256(step_file(run, int(step)))
    lines = [
        f"rollout {args.id} of {run}: task {found['task_id']}, sample {found['sample']}",
        f"policy {entry.get('policy_fingerprint', '?')} · recipe {str(entry.get('recipe_sha256', '?'))[:16]} · seed {entry.get('seed', '?')} · "
        + ("the file's hash is the chain's" if same else "THE FILE IS NOT WHAT THE CHAIN SAYS"),
        "", "prompt", _indented(found["prompt"]), "", f"response ({len(found['response_ids'])} tokens, {found['finish']})",
        _indented(found["response"]), "",
        f"verdict: {found['outcome']}, score {found['score']:g}, correct {found['correct']:g}{', masked' if found['masked'] else ''}",
        _indented(json.dumps(json.loads(found["evidence"]), indent=2, ensure_ascii=False)),
        f"predicted chance: {_number(found['value'])} · advantage: {_number(found['advantage'])} · log-probability of the response: "
        f"{sum(found['logps']):.3f}",
    ]  # fmt: skip
    emit({"id": args.id, "sound": same, **found}, args.json, "\n".join(lines))
    return 0 if same else 1


def _run(path: str) -> Path:
    run = Path(path)
    if not (run / "rollouts").is_dir():
        raise UserError(f"{path} is no run directory (it has no rollouts/)")
    return run


def _words(verdict: tuple[float, float, str]) -> str:
    return f"{verdict[2]} {verdict[0]:g}"


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def _indented(text: str) -> str:
    """Text of a model's, which may hold what terminals obey: control characters are shown, not sent."""
    shown = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "\n".join(f"    {line}" for line in shown.split("\n"))
