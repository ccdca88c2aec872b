"""`sppo critic`: export a run's critic, which predicts from the prompt alone whether the policy solves it, or rank
prompts with one."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import DataError, ModelError, UserError
from ._shared import add_columns_option, columns_for, critic_beside, emit

SHOWN = 5


def add(subparsers: Any) -> None:
    """Register the command and its verbs."""
    group = subparsers.add_parser("critic", help="export a run's critic, or rank prompts with one", description=__doc__)
    verbs = group.add_subparsers(metavar="VERB", required=True)
    export = verbs.add_parser("export", help="a model folder with a card that says what it predicts and how well")
    export.add_argument("path", metavar="RUN", help="a run directory or a checkpoint")
    export.add_argument("--to", "--out", dest="out", default="models/critic", metavar="DIR", help="[models/critic]")
    export.set_defaults(run=_export)
    score = verbs.add_parser("score", help="the predicted chance that each prompt is solved, the lowest first")
    score.add_argument("model", metavar="MODEL", help="an exported critic, or a run")
    score.add_argument("--data", required=True, metavar="FILE", help="rows or a task, as --task.train: prompts to rank")
    score.add_argument("--n", type=int, metavar="N", help="the first N rows only (needed for endless tasks)")
    score.add_argument(
        "--out", metavar="SCORES.jsonl", help="write every prompt with its chance, in the order of the data"
    )
    add_columns_option(score)
    score.set_defaults(run=_score)
    for verb in (export, score):
        verb.add_argument("--json", action="store_true", help="one JSON object as the last line")


def _export(args: argparse.Namespace) -> int:
    from ..models.adapter_critic import open_critic
    from ..models.adapters import is_adapter
    from ..models.critic import HEAD_FILE
    from ..models.export import copy_adapter
    from ..models.loading import pick_device
    from ..run.directory import newest_policy, write_atomic

    policy, out = newest_policy(Path(args.path)), Path(args.out)
    if policy.resolve().name != "policy" or not (policy.resolve().parent / "state.pt").exists():
        raise UserError(f"{args.path} is not a run with a checkpoint")
    source = critic_beside(policy)
    if source is None:
        raise UserError(f"{args.path} has no critic beside its policy: its algorithm trains none")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is not empty; choose another folder for the critic")
    run = source.parent.parent.parent
    open_critic(str(source), dtype="auto", device=pick_device(), seed=0)  # an unreadable critic is not exported
    card, base = _card(run, source), ""
    if is_adapter(str(source)):
        base = copy_adapter(source, out, out)["name"]
        card += _of_adapter(base, out)
    else:
        shutil.copytree(source, out, dirs_exist_ok=True)
        card += (
            f"The folder holds a transformers backbone (`AutoModel.from_pretrained`), its tokenizer, and the read-out "
            f"`{HEAD_FILE}`: {READ_OUT}\n"
        )
    write_atomic(out / "README.md", card)
    how = f"load it with PeftModel on {base}" if base else "load it with AutoModel"
    emit({"critic": str(out)}, args.json, f"{out}: {how}, or rank prompts: sppo critic score {out} --data FILE")
    return 0


READ_OUT = "one linear map of the last hidden state at the prompt's last token, then a sigmoid. `sppo critic score` applies it."


def _of_adapter(base: str, out: Path) -> str:
    """What a critic's folder holds that is an adapter."""
    from ..models.critic import HEAD_FILE

    beside = Path(base).is_absolute() and Path(base).parent == out.resolve()
    where = "in its folder `base`" if beside else f"`{base}`"
    return (
        f"The folder holds an adapter (`PeftModel.from_pretrained`) for the policy's frozen base, which is {where}, the "
        f"tokenizer, and the read-out `{HEAD_FILE}`: {READ_OUT}\n"
    )


def _card(run: Path, source: Path) -> str:
    """What it predicts, in words and numbers of the run that it comes from."""
    from ..recipe.config import Config
    from ..report.reader import RunReader

    if not (run / "recipe.toml").exists():
        return f"# A prompt-only critic\n\nFrom {source}; its run is not known here.\n\n"
    config = Config.load(run / "recipe.toml")
    if config.critic_reads != "prompt":
        raise UserError(
            f"the critic of objective.baseline = {config.objective.baseline!r} reads responses too, so it ranks no prompts"
        )
    last = source.parent.name.removeprefix("step-")
    steps = [m for m in RunReader(run).metrics() if not last.isdecimal() or m["step"] < int(last)][-20:]

    def mean(name: str) -> str:
        known = [m[name] for m in steps if name in m]
        return f"{sum(known) / len(known):.3f}" if known else "not measured"

    return f"""# A prompt-only critic

Predicts, from the prompt alone, the chance that the policy it was trained beside solves a problem.

| | |
| --- | --- |
| policy | `{config.policy.model}`, {source.parent.name} of the run `{run.name}` |
| problems | `{config.task.train}`{f", with the instruction {config.task.instruction!r}" if config.task.instruction else ""} |
| judged by | `{config.reward.use}` |
| solved (mean of the last {len(steps)} steps) | {mean("reward/correct")} |
| calibration error (ECE) | {mean("critic/ece")} |
| Brier score | {mean("critic/brier")} |
| explained variance of single outcomes | {mean("critic/explained_variance")} |

Measured on training problems, before the critic had seen their outcomes. It says nothing of other problems, of another policy, or of this policy
after more training.

"""


def _score(args: argparse.Namespace) -> int:
    from ..models.adapter_critic import open_critic
    from ..models.critic import HEAD_FILE
    from ..models.loading import pick_device
    from ..run.directory import newest_policy, write_atomic
    from ..tasks.loading import load_tasks
    from ._shared import _recipe_near

    path = Path(args.model).expanduser()
    own = path if (path / HEAD_FILE).exists() else critic_beside(newest_policy(path)) if path.is_dir() else None
    folder = own or path
    if not (folder / HEAD_FILE).exists():
        raise ModelError(f"{args.model} is not a critic: it has no {HEAD_FILE} (export one: sppo critic export RUN)")
    if args.n is not None and args.n < 1:
        raise UserError(f"--n must be 1 or more, not {args.n}")
    recipe = _recipe_near(folder)
    source = load_tasks(args.data, instruction=recipe.task.instruction if recipe else "", columns=columns_for(args))
    count = len(source) if args.n is None else min(args.n, len(source))
    if count > 200_000:
        raise UserError(f"--data {args.data} holds {count:,} problems; say how many: --n N")
    critic, stated = open_critic(str(folder), dtype="auto", device=pick_device(), seed=0)
    tasks = [source[i] for i in range(count)]
    limit = critic.context
    readable = [t for t in tasks if 0 < len(critic.prompt_ids(t)) <= (limit or 10**9)]
    if not readable:
        raise DataError(
            f"none of the {count} prompts of {args.data} can be read: they are empty, or longer than the critic's {limit} tokens"
        )
    chances = dict(zip((id(t) for t in readable), critic.chances(readable).tolist(), strict=True))
    rows: list[dict[str, Any]] = [{"id": t.id, "prompt": t.text, "chance": chances.get(id(t))} for t in tasks]
    if args.out:
        write_atomic(Path(args.out), "".join(json.dumps(row) + "\n" for row in rows))
    ranked = sorted((r for r in rows if r["chance"] is not None), key=lambda r: r["chance"])
    mean = sum(r["chance"] for r in ranked) / len(ranked)
    too_long = count - len(ranked)
    text = [
        stated,
        *(
            f"warning: {too_long} of {count} prompts are empty or longer than the critic reads, and have no score"
            for _ in range(too_long > 0)
        ),
    ]
    if not args.json or not args.out:
        shown = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], None, *ranked[-SHOWN:]]
        text += ["…" if r is None else f"{r['chance']:6.1%}  {_short(r['prompt'])}" for r in shown]
    text.append(
        f"{len(ranked)} prompts, mean predicted chance {mean:.1%}"
        + (f"; all of them in {args.out}" if args.out else "")
    )
    result = {
        "scored": len(ranked),
        "too_long": too_long,
        "mean_chance": mean,
        "ranked": ranked if not args.out else args.out,
    }
    emit(result, args.json, "\n".join(text))
    return 0


def _short(text: str) -> str:
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    return line if len(line) <= 100 else line[:99] + "…"
