"""`sppo compare`: several algorithms on one recipe with paired seeds: learning curves, costs to a target, intervals."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import RecipeError, RunFailure, UserError
from ..recipe.presets import PRESETS
from ._comparison import Entry, Work, bootstrap, entries_of, flat, stoppable, write_recipes
from ._shared import add_recipe_options, emit, overrides

DEFAULT = "sppo,sppo-optimal,grpo,rloo,reinforce"
AMBITION = 0.8
"""The target without --target, as a share of the way from the start to the best final mean accuracy."""
AFTER = "chosen after the runs; fix it before them with --target"


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "compare", help="compare algorithms on one recipe: paired seeds, equal tokens, intervals", description=__doc__
    )
    add_recipe_options(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="short for --training.steps")
    parser.add_argument(
        "--algorithms", default=DEFAULT, metavar="A,B,…",
        help=f"presets, each with optional keys of its own: sppo,grpo:training.lr=1e-4 [{DEFAULT}]; known: {', '.join(PRESETS)}",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="K", help="seeds per algorithm, starting at the recipe's [5]"
    )
    parser.add_argument(
        "--target", type=float, metavar="ACCURACY",
        help=f"the held-out accuracy whose cost is compared [{100 * AMBITION:.0f}%% of the way to the best one's end]",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs side by side, on their share of the cores [1]"
    )
    parser.set_defaults(run=run)


LEGEND = """\
value [low, high]: 95% interval over seeds; – means that half of the seeds (or the worst one) never reached
the target. Seconds and tokens exclude evaluations and the shared start. Mean Â: the mean advantage over
the run. Entropy (nats per token) and pass@k are those of the last evaluation; pass@k needs
--evaluation.samples of at least k. Against the first algorithm, on the same seeds: ratios use the seeds on
which both started below the target and reached it; missed 2–1: this algorithm alone missed the target on
two seeds, the first one alone on one."""


def run(args: argparse.Namespace) -> int:
    """Run what is not finished yet, then compare; exit 0 when every run finished, 1 when one failed, 130 when
    interrupted."""
    changes = overrides(args)
    out = _folder(args, changes)
    changes.setdefault("training.measure_noise", True)  # a large model may rather not hold copies of its gradient
    labels, entries = entries_of(args, changes, out)
    try:
        write_recipes(entries, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    if not args.quiet:
        print(_differences(entries, labels), file=sys.stderr)
    target, chosen = _target(args.target, entries, out)
    try:
        with stoppable():
            for entry in entries:
                if entry.start is not None and not entry.finished:
                    bootstrap(entry.start, args.quiet)
            failed = Work(entries, args.jobs, quiet=args.quiet).do()
    except KeyboardInterrupt:
        print(f"interrupted; everything is saved in {out}: the same command continues", file=sys.stderr)
        return 130
    _conclude(args, labels, entries, failed, target, chosen, out)
    return 1 if failed else 0


def _folder(args: argparse.Namespace, changes: dict[str, Any]) -> Path:
    """The comparison's folder, taken out of `changes`. Raises UserError for arguments that no comparison can have."""
    if args.recipe is None:
        raise RecipeError("give a recipe to compare on (recipes/ has some)")
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be 1 or more")
    if args.target is not None and not 0 < args.target < 1:
        raise UserError(f"--target must lie between 0 and 1, not {args.target}")
    out = Path(changes.pop("run.out", None) or f"runs/compare-{Path(args.recipe).stem}")
    if (out / "recipe.toml").exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out} is a run or a file, not a folder for a comparison: choose another")
    if "run.threads" in changes:
        raise UserError("--run.threads has no place in a comparison: --jobs decides it")
    return out


def _conclude(
    args: argparse.Namespace,
    labels: list[str],
    entries: list[Entry],
    failed: list[str],
    target: float | None,
    chosen: str,
    out: Path,
) -> None:
    """Write the comparison of what finished, and print it. Raises RunFailure where nothing did."""
    from ..evaluation.compare import compare
    from ..report.curves import figure, read_curve, table

    curves: dict[str, dict[int, Any]] = {label: {} for label in labels}
    for entry in sorted(entries, key=lambda e: e.seed):
        curves[entry.algorithm][entry.seed] = read_curve(entry.folder) if entry.finished else None
    known = {label: [c for c in runs.values() if c is not None] for label, runs in curves.items()}
    if not any(known.values()):
        raise RunFailure(f"no run finished: {failed[0] if failed else 'nothing was run'}")
    if target is None:
        target, chosen = _target_of(known)
    result = compare(curves, target) | {"target_was": chosen, "failed": failed}
    (out / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    (out / "comparison.md").write_text(text)
    where = f"\n{out}/comparison.md, comparison.json"
    try:
        figure({label: runs for label, runs in known.items() if runs}, target, out / "curves.svg")
        where += ", curves.svg"
    except UserError as error:
        where += f"; {error}"
    emit(result, args.json, f"{text}\n{LEGEND}{where}; the target was {chosen}")


def _target_of(curves: dict[str, list[Any]]) -> tuple[float, str]:
    """The target where none was given: AMBITION of the way from the mean start to the best mean end."""
    starts = [c.accuracy[0] for runs in curves.values() for c in runs]
    ends = [sum(c.accuracy[-1] for c in runs) / len(runs) for runs in curves.values() if runs]
    start, chosen = sum(starts) / len(starts), AFTER
    if max(ends) <= start:
        chosen += " (no algorithm ended above its start, so there is nothing to reach)"
    return start + AMBITION * (max(ends) - start), chosen


def _target(given: float | None, entries: list[Entry], out: Path) -> tuple[float | None, str]:
    """The target and when it was fixed. A target given before the first results is kept in the folder."""
    kept = out / "target.json"
    before = json.loads(kept.read_text()) if kept.exists() else None
    if given is None and before is not None:
        return before, "given before the runs"
    if given is None:
        return None, AFTER
    if before is None and not any(e.steps_done for e in entries):
        kept.write_text(json.dumps(given))
        before = given
    return given, "given before the runs" if given == before else "given when there were results already"


def _differences(entries: list[Entry], labels: list[str]) -> str:
    """The recipe keys in which each algorithm differs from the first one."""
    one = {
        e.algorithm: dict(flat(e.config.settled()[0].model_dump(mode="json", exclude={"run", "bootstrap", "seed"})))
        for e in entries
    }
    first, lines = one[labels[0]], []
    for label in labels[1:]:
        other = {
            k: v
            for k, v in one[label].items()
            if v != first.get(k) and k not in ("objective.algorithm", "policy.model")
        }
        lines.append(
            f"{label}: as {labels[0]} but " + (", ".join(f"{k} = {v}" for k, v in other.items()) or "for nothing")
        )
    return "\n".join(lines)
