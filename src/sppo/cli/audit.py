"""`sppo audit`: verify a run's hash chain, judge its responses again, or print one rollout whole."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

from ..errors import DataError, UserError
from ..files import is_folder, readable
from ._shared import conversation, emit

SHOWN = 10
"""Mismatches printed one by one."""


def add(subparsers: Any) -> None:
    """Register the command and its three verbs."""
    parser = subparsers.add_parser("audit", help="verify, replay or show what a run recorded", description=__doc__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    check = verbs.add_parser(
        "verify", help="find any changed, missing or added byte in the files of the run's hash chain"
    )
    check.add_argument(
        "--head", default="", metavar="HASH", help="the head that an earlier verify printed: is it still in the chain?"
    )
    check.add_argument(
        "--anchor", metavar="FILE", help="the heads that run.anchor kept; default: the file that the recipe names"
    )
    again = verbs.add_parser("replay", help="judge recorded responses again: every verdict must come out the same")
    again.add_argument("--step", type=int, metavar="N", help="one step only, counted from 0")
    again.add_argument("--n", type=int, metavar="K", help="at most K rollouts per step")
    show = verbs.add_parser("show", help="print one rollout complete")
    for verb, run in ((check, _verify), (again, _replay), (show, _show)):
        verb.add_argument("path", metavar="RUN", help="a run directory")
        verb.add_argument("--json", action="store_true", help="one JSON object as the last line")
        verb.set_defaults(run=run)
    show.add_argument("id", metavar="STEP:ROW", help="as metrics and replays name it, e.g. 12:3")


def _verify(args: argparse.Namespace) -> int:
    from ..audit.integrity import verify

    run = _run(args.path)
    if args.head and not re.fullmatch(r"[0-9a-f]{64}", args.head):
        raise UserError(f"--head takes the 64 hexadecimal digits that verify printed, not {args.head!r}")
    anchor, unanchored = _anchor(run, args.anchor)
    found = verify(run, args.head, anchor)
    if found.damage:  # a run that is going on may have been between a step's file and its line
        time.sleep(1)
        found = verify(run, args.head, anchor)
    notes = [*found.notes, *unanchored]
    for note in notes:
        print(f"note: {note}")
    for step, what in found.damage:
        print(f"step {step}: {what}")
    head = f"head {found.head} (line {found.lines})"
    kept = (
        ""
        if args.head or anchor
        else ": kept elsewhere, it shows later (--head) whether the record was cut or written anew"
    )
    text = (
        ""
        if found.damage
        else f"{run}: {found.steps} steps, all that the record names is as it was written\n{head}{kept}"
    )
    result = {
        "sound": not found.damage, "steps": found.steps, "damage": [{"step": s, "what": w} for s, w in found.damage], "notes": notes,
        "lines": found.lines, "head": found.head,
    }  # fmt: skip
    emit(result, args.json, text)
    return 1 if found.damage else 0


def _anchor(run: Path, given: str | None) -> tuple[Path | None, list[str]]:
    """The file of heads to compare the chain with, and a note where the recipe names one that is missing."""
    from ..recipe.config import Config

    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"--anchor: there is no file {given}")
        return Path(given), []
    with contextlib.suppress(UserError):  # a recipe that cannot be read is found by its hash
        named = Config.recalled(run / "recipe.toml").run.anchor
        if isinstance(named, str) and named:
            path = Path(named).expanduser()
            return (
                (path, [])
                if path.is_file()
                else (None, [f"the anchor {named} is not here, so a record written anew would not be noticed"])
            )
    return None, []


def _replay(args: argparse.Namespace) -> int:
    from ..audit.replay import replay
    from ..audit.verifier import verifier_sha256
    from ..recipe.config import Config
    from ..rewards.base import KEPT
    from ..rewards.loading import load_reward
    from ..spec import GIVEN

    run = _run(args.path)
    if args.n is not None and args.n < 1:
        raise UserError(f"--n must be 1 or more, not {args.n}")
    config = Config.load(run / "recipe.toml")
    if config.reward.use == GIVEN:
        raise UserError(
            f"{run} was judged by a reward given in Python, which no recipe names; replay it where that is known"
        )
    files = sorted((run / "rollouts").glob("step-*.parquet"))
    steps = (
        [int(p.stem[5:]) for p in files if re.fullmatch("[0-9]{6,9}", p.stem[5:])] if args.step is None else [args.step]
    )
    if not steps:
        raise DataError(f"{run} has no rollouts yet")
    reward = load_reward(config.reward.use, config.reward.limit)
    if callable(keep := getattr(reward, "keep", None)):
        keep(run / KEPT)
    changed = _other_verifier(run, steps, verifier_sha256(reward))
    if changed:
        print(
            f"the verifier is another one than the one that judged {_steps(changed)}: its code (this package's rewards and sandbox, or the file of "
            "your own reward) has changed since, so verdicts may differ for that reason"
        )
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
    result = {"replayed": count, "reproduced": count - len(wrong), "mismatches": mismatches, "other_verifier": changed}
    emit(result, args.json, text)
    return 1 if wrong else 0


def _other_verifier(run: Path, steps: list[int], now: str) -> list[int]:
    """The steps that the chain says were judged by other code than `now`."""
    from ..audit.chain import lines_of_steps

    judged = {step: entry.get("verifier_sha256") for step, entry in lines_of_steps(run).items()}
    return [s for s in steps if judged.get(s) is not None and judged[s] != now]


def _steps(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps ({steps[0]} to {steps[-1]})"


def _show(args: argparse.Namespace) -> int:
    from ..audit.chain import lines_of_steps, step_file
    from ..audit.replay import rows_of
    from ..files import file_sha256

    run = _run(args.path)
    step, _, row = args.id.partition(":")
    if not re.fullmatch("[0-9]{1,9}:[0-9]{1,9}", args.id):
        raise UserError(f"{args.id!r} names no rollout; write it as STEP:ROW, e.g. 12:3")
    rows = rows_of(run, int(step))
    if int(row) >= len(rows):
        raise DataError(f"step {step} of {run} has {len(rows)} rollouts, counted from 0; there is no {row}")
    found = rows[int(row)]
    entry = lines_of_steps(run).get(int(step), {})
    same = entry.get("rollouts_sha256") == file_sha256(step_file(run, int(step)))
    with readable(f"rollout {args.id} of {run} cannot be read (`sppo audit verify {run}` says more)"):
        text = _visible("\n".join(_lines(run, args.id, found, entry, same)))
        json.dumps(found)
    emit({"id": args.id, "sound": same, **found}, args.json, text)
    return 0 if same else 1


def _lines(run: Path, name: str, found: dict[str, Any], entry: dict[str, Any], same: bool) -> list[str]:
    return [
        f"rollout {name} of {run}: task {found['task_id']}, sample {found['sample']}",
        f"policy {entry.get('policy_fingerprint', '?')} · recipe {str(entry.get('recipe_sha256', '?'))[:16]} · seed {entry.get('seed', '?')} · "
        + ("the file's hash is the chain's" if same else "THE FILE IS NOT WHAT THE CHAIN SAYS"),
        "", *_prompt(run, found), "", *_response(found), "",
        f"verdict: {found['outcome']}, score {found['score']:g}, correct {found['correct']:g}{', masked' if found['masked'] else ''}",
        _indented(json.dumps(json.loads(found["evidence"]), indent=2, ensure_ascii=False)),
        f"predicted chance: {_number(found['value'])} · advantage: {_number(found['advantage'])} · log-probability of the response: "
        f"{sum(found['logps']):.3f}",
    ]  # fmt: skip


def _response(found: dict[str, Any]) -> list[str]:
    """What the policy wrote; of several turns the whole conversation, calls as `→` and what others said as `←`."""
    said = f"{len(found['response_ids'])} tokens, {found['finish']}"
    if not found.get("messages"):
        return [f"response ({said})", _indented(found["response"])]
    return [f"{len(found['turns'])} turns ({said})", _indented(conversation(json.loads(found["messages"])))]


def _prompt(run: Path, found: dict[str, Any]) -> list[str]:
    """The prompt as the policy read it, with special tokens; the row's own text where there is no tokenizer."""
    from ..report.reader import RunReader

    read = RunReader(run).rendered(found["prompt_ids"])
    if read is None:
        return ["prompt", _indented(found["prompt"])]
    return [f"prompt, as the policy read it ({len(found['prompt_ids'])} tokens)", _indented(read)]


def _run(path: str) -> Path:
    run = Path(path)
    if not is_folder(run / "rollouts"):
        raise UserError(f"{path} is not a run directory (it has no rollouts/)")
    return run


def _words(verdict: tuple[float, float, str]) -> str:
    return f"{verdict[2]} {verdict[0]:g}"


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _visible(text: str) -> str:
    """A model's text with control characters made visible, because terminals obey them."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
