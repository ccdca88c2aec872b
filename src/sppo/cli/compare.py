"""`sppo compare`: several algorithms on one recipe with paired seeds: learning curves, costs to a target, intervals."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..errors import RecipeError, RunFailure, UserError
from ..recipe.config import Config, parse_value
from ..recipe.presets import PRESETS
from ..spec import nearest, parse_spec, split_specs
from ._shared import add_recipe_options, emit, overrides

DEFAULT = "sppo,sppo-optimal,grpo,rloo,reinforce"
START = "checkpoints/step-000000/policy"
AMBITION = 0.8
"""Without --target: so much of the way from the start to the best mean accuracy at the end."""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "compare", help="compare algorithms on one recipe: paired seeds, equal tokens, intervals", description=__doc__
    )
    add_recipe_options(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="short for --training.steps")
    parser.add_argument(
        "--algorithms", default=DEFAULT, metavar="A,B,…",
        help=f"presets, each with keys of its own if need be: sppo,grpo:training.lr=1e-4 [{DEFAULT}]; known: {', '.join(PRESETS)}",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="K", help="seeds an algorithm, from the recipe's on [5]"
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
value [low, high]: 95% over seeds; – means that half of the seeds (or the worst one) never reached the
target. Seconds are of training alone: evaluations (the one of training problems that a critic starts
from among them) and the shared start are outside clock and tokens. Mean Â: of the advantages, over the
run. Entropy (nats a token) and pass@k: of the last evaluation; pass@k with --evaluation.samples of k.
Against the first one, on the same seeds: ratios are of those where both began below the target and
reached it; missed 2–1: it alone did not on two seeds, the first one alone did not on one."""
SHARED = ("seed", "run.", "bootstrap", "policy.", "task.", "reward.", "evaluation.", "training.measure_noise")
"""What all runs of a comparison have in common, so that it is one."""


@dataclass(frozen=True)
class Start:
    """The supervised start that the algorithms of a seed share."""

    folder: Path
    config: Config

    @property
    def policy(self) -> Path:
        """What they begin with."""
        return self.folder / START


@dataclass(frozen=True, eq=False)
class Entry:
    """One run of the comparison."""

    algorithm: str
    seed: int
    folder: Path
    config: Config
    start: Start | None

    @property
    def recipe(self) -> Path:
        """What it is given."""
        return self.folder.with_suffix(".toml")

    @property
    def log(self) -> Path:
        """What it said."""
        return self.folder.with_suffix(".log")

    @property
    def finished(self) -> bool:
        """Whether it has done all its steps."""
        try:
            return json.loads((self.folder / "summary.json").read_text())["stopped"] == "finished"
        except (OSError, json.JSONDecodeError, KeyError):
            return False

    @property
    def steps_done(self) -> int:
        """Lines of metrics."""
        try:
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0


def run(args: argparse.Namespace) -> int:
    """Run what is not finished yet, then compare; exit 0 when every run finished, 1 when one failed, 130 when interrupted."""
    changes = overrides(args)
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
    changes.setdefault("training.measure_noise", True)  # a large model may rather not hold copies of its gradient
    labels, entries = _entries(args, changes, out)
    try:
        _write_recipes(entries, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    if not args.quiet:
        print(_differences(entries, labels), file=sys.stderr)
    target, chosen = _target(args.target, entries, out)
    from ..evaluation.compare import compare
    from ..report.curves import figure, read_curve, table

    try:
        with _stoppable():
            for entry in entries:
                if entry.start is not None and not entry.finished:
                    _bootstrap(entry.start, args.quiet)
            failed = _Work(entries, args.jobs, quiet=args.quiet).do()
    except KeyboardInterrupt:
        print(f"interrupted; everything is saved in {out}: the same command goes on", file=sys.stderr)
        return 130
    curves: dict[str, dict[int, Any]] = {label: {} for label in labels}
    for entry in sorted(entries, key=lambda e: e.seed):
        curves[entry.algorithm][entry.seed] = read_curve(entry.folder) if entry.finished else None
    known = {label: [c for c in runs.values() if c is not None] for label, runs in curves.items()}
    if not any(known.values()):
        raise RunFailure(f"no run finished: {failed[0] if failed else 'nothing was run'}")
    if target is None:
        starts = [c.accuracy[0] for runs in known.values() for c in runs]
        ends = [sum(c.accuracy[-1] for c in runs) / len(runs) for runs in known.values() if runs]
        start = sum(starts) / len(starts)
        target, chosen = (
            start + AMBITION * (max(ends) - start),
            "chosen after the runs; fix it before them with --target",
        )
        if max(ends) <= start:
            chosen += " (no algorithm ended above its start, so there is nothing to reach)"
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
    return 1 if failed else 0


def _target(given: float | None, entries: list[Entry], out: Path) -> tuple[float | None, str]:
    """The target and when it was fixed. One that was given while there was nothing to see yet is kept in the folder."""
    kept = out / "target.json"
    before = json.loads(kept.read_text()) if kept.exists() else None
    if given is None and before is not None:
        return before, "given before the runs"
    if given is None:
        return None, "chosen after the runs; fix it before them with --target"
    if before is None and not any(e.steps_done for e in entries):
        kept.write_text(json.dumps(given))
        before = given
    return given, "given before the runs" if given == before else "given when there were results already"


def _differences(entries: list[Entry], labels: list[str]) -> str:
    """What each algorithm has otherwise than the first one, in words of the recipe."""
    one = {
        e.algorithm: dict(_flat(e.config.settled()[0].model_dump(mode="json", exclude={"run", "bootstrap", "seed"})))
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


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _entries(args: argparse.Namespace, changes: dict[str, Any], out: Path) -> tuple[list[str], list[Entry]]:
    """The algorithms, and every run: seeds outside, the order of the algorithms turning with the seed."""
    named: dict[str, tuple[str, dict[str, Any]]] = {}
    for text in split_specs(args.algorithms):
        spec = parse_spec(text)
        if spec.name not in PRESETS:
            raise UserError(f"--algorithms: {spec.name!r} is unknown: {nearest(spec.name, list(PRESETS))}")
        if spec.words:
            raise UserError(f"--algorithms: {text}: {spec.words[0]!r} is no key=value")
        options = {key: parse_value(v) if isinstance(v, str) else v for key, v in spec.options.items()}
        for key in options:
            if key.startswith(SHARED):
                raise UserError(
                    f"--algorithms: {text}: {key} is the same for all runs of a comparison; give it as --{key}, or in the recipe"
                )
        if (spec.name, options) in named.values():
            raise UserError(f"--algorithms: {text} is there twice")
        named[text.strip()] = (spec.name, options)
    if not named:
        raise UserError("--algorithms names none: " + ", ".join(PRESETS))
    first = Config.load(args.recipe, changes)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    entries = []
    for n in range(args.seeds):
        seed = first.seed + n
        labels = [*named][n % len(named) :] + [*named][: n % len(named)]
        for label in labels:
            algorithm, options = named[label]
            folder = out / re.sub(r"[^\w.=-]+", "-", label) / f"seed-{seed}"
            fixed = {"seed": seed, "run.out": str(folder), "run.threads": threads}
            config = first.as_algorithm(algorithm, options | fixed)
            start = None
            if config.bootstrap is not None:
                folder_of_start = out / "starts" / f"seed-{seed}"
                start = Start(
                    folder_of_start, Config.load(args.recipe, changes | {"seed": seed, "run.out": str(folder_of_start)})
                )
                policy = config.policy.model_copy(update={"model": str(start.policy)})
                config = config.model_copy(update={"bootstrap": None, "policy": policy})
            entries.append(Entry(label, seed, folder, config, start))
    return [*named], entries


def _write_recipes(entries: list[Entry], out: Path) -> None:
    """Each run's own recipe, and each start's. Raises RecipeError when the folder holds a comparison of other ones."""
    recipes = {entry.recipe: entry.config for entry in entries}
    recipes |= {
        entry.start.folder.with_suffix(".toml"): entry.start.config for entry in entries if entry.start is not None
    }
    for path, config in recipes.items():
        if path.exists() and path.read_text() != config.to_toml():
            before, now = (dict(_flat(tomllib.loads(text))) for text in (path.read_text(), config.to_toml()))
            key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
            hint = "; --jobs decides it" if key == "run.threads" else ""
            raise RecipeError(
                f"{out} holds a comparison with another recipe ({path}: {key} is {before.get(key)} there and {now.get(key)} now{hint}): choose another --out"
            )
    for path, config in recipes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config.to_toml())


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A closed terminal or a kill is an interruption, as Ctrl-C is: the runs save themselves, and none goes on alone."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bootstrap(start: Start, quiet: bool) -> None:
    """Make a start, if it is not there yet."""
    from ..report.progress import ProgressDisplay
    from ..run.run import Run
    from .train import interruptible

    if start.policy.exists():
        return
    shutil.rmtree(start.folder, ignore_errors=True)
    display = ProgressDisplay(quiet=quiet)
    job = Run.new(start.config, display)
    try:
        with interruptible(job, display):
            job.begin()
    finally:
        display.stop()
        job.close()
    if job.interrupted:
        raise KeyboardInterrupt


class _Work:
    """The runs that are not finished, `jobs` at a time, each `sppo train` in a process of its own."""

    def __init__(self, entries: list[Entry], jobs: int, quiet: bool) -> None:
        from ..report.progress import clock  # not above: it needs torch, and `sppo --help` does not

        self.entries, self.jobs, self.quiet, self.clock = entries, jobs, quiet, clock
        self.waiting = [e for e in entries if not e.finished]
        self.running: dict[Entry, subprocess.Popen[bytes]] = {}
        self.failed: list[str] = []
        self.console = Console(stderr=True, highlight=False)
        self.total = sum(e.config.training.steps for e in entries)

    def do(self) -> list[str]:
        """Run everything; returns a sentence for each run that failed. Ctrl-C lets the runs save themselves."""
        began, before = time.monotonic(), self.steps_done
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[left]}")
        live = self.console.is_terminal and not self.quiet
        with Progress(*columns, console=self.console, disable=not live) as progress:
            bar = progress.add_task("", total=self.total, left="")
            try:
                while self.waiting or self.running:
                    while self.waiting and len(self.running) < self.jobs:
                        self._start(self.waiting.pop(0))
                    time.sleep(0.3)
                    done = self.steps_done
                    pace = (time.monotonic() - began) / max(done - before, 1)
                    left = f"left {self.clock(pace * (self.total - done))}" if done > before else ""
                    progress.update(bar, completed=done, left=left, description=self._state())
                    for entry in [e for e, process in self.running.items() if process.poll() is not None]:
                        self._finish(entry, left)
            except KeyboardInterrupt:
                for process in self.running.values():
                    process.send_signal(signal.SIGINT)
                for process in self.running.values():
                    process.wait()
                raise
        return self.failed

    @property
    def steps_done(self) -> int:
        """Over all runs."""
        return sum(min(e.steps_done, e.config.training.steps) for e in self.entries)

    def _state(self) -> str:
        return ", ".join(f"{e.algorithm} seed {e.seed}: {e.steps_done}/{e.config.training.steps}" for e in self.running)

    def _start(self, entry: Entry) -> None:
        command = [sys.executable, "-P", "-m", "sppo", "train"]
        if any((entry.folder / "checkpoints").glob("step-*")):
            command += ["--resume", str(entry.folder)]
        else:
            shutil.rmtree(entry.folder, ignore_errors=True)
            command += [str(entry.recipe)]
        environment = os.environ | {"OMP_NUM_THREADS": str(entry.config.run.threads)}
        with entry.log.open("wb") as log:
            # a session of its own: Ctrl-C comes from here, once
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.running[entry] = process

    def _finish(self, entry: Entry, left: str) -> None:
        code = self.running.pop(entry).returncode
        if entry.finished:
            summary = json.loads((entry.folder / "summary.json").read_text())
            if not self.quiet:
                self.console.print(
                    f"{entry.algorithm} seed {entry.seed}: {summary['accuracy_before']:.3f} → {summary['accuracy_after']:.3f} in "
                    f"{self.clock(summary['seconds'])}, {summary['generated_tokens'] / 1e6:.2f}M tokens   {left}", markup=False,
                )  # fmt: skip
            return
        lines = entry.log.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
        why = next((line for line in reversed(lines) if line.startswith(("error:", "failed:"))), lines[-1])
        if code < 0:
            why = f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        self.failed.append(f"{entry.algorithm} seed {entry.seed} (exit {code}): {why}")
        self.console.print(f"warning: {self.failed[-1]}; see {entry.log}", style="yellow", markup=False)
