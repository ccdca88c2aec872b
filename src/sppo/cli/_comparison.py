"""The runs of a comparison, and running the unfinished ones in parallel."""

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

from ..errors import RecipeError, UserError
from ..recipe.config import Config, parse_value
from ..recipe.presets import PRESETS
from ..spec import nearest, parse_spec, split_specs

START = "checkpoints/step-000000/policy"
SHARED = ("seed", "run.", "bootstrap", "policy.", "task.", "reward.", "evaluation.", "training.measure_noise")
"""Keys that all runs of a comparison share."""


@dataclass(frozen=True)
class Start:
    """The supervised start that the algorithms of a seed share."""

    folder: Path
    config: Config

    @property
    def policy(self) -> Path:
        """The policy that they start from."""
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
        """The recipe file of the run."""
        return self.folder.with_suffix(".toml")

    @property
    def log(self) -> Path:
        """The log of the run."""
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
        """The number of lines in metrics.jsonl."""
        try:
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0


def entries_of(args: argparse.Namespace, changes: dict[str, Any], out: Path) -> tuple[list[str], list[Entry]]:
    """The algorithms, and every run: seed by seed, with the order of the algorithms rotating."""
    named = _algorithms(args.algorithms)
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
            config, start = first.as_algorithm(algorithm, options | fixed), None
            if config.bootstrap is not None:
                shared = out / "starts" / f"seed-{seed}"
                start = Start(shared, Config.load(args.recipe, changes | {"seed": seed, "run.out": str(shared)}))
                policy = config.policy.model_copy(update={"model": str(start.policy)})
                config = config.model_copy(update={"bootstrap": None, "policy": policy})
            entries.append(Entry(label, seed, folder, config, start))
    return [*named], entries


def _algorithms(texts: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """`sppo,grpo:training.lr=1e-4` as label → (preset, keys of its own).

    Raises UserError for an unknown, repeated or shared key.
    """
    named: dict[str, tuple[str, dict[str, Any]]] = {}
    for text in split_specs(texts):
        spec = parse_spec(text)
        if spec.name not in PRESETS:
            raise UserError(f"--algorithms: {spec.name!r} is unknown: {nearest(spec.name, list(PRESETS))}")
        if spec.words:
            raise UserError(f"--algorithms: {text}: {spec.words[0]!r} is not key=value")
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
    return named


def write_recipes(entries: list[Entry], out: Path) -> None:
    """Each run's own recipe, and each start's. Raises RecipeError when the folder holds a comparison of other ones."""
    recipes = {entry.recipe: entry.config for entry in entries}
    recipes |= {
        entry.start.folder.with_suffix(".toml"): entry.start.config for entry in entries if entry.start is not None
    }
    for path, config in recipes.items():
        if path.exists() and path.read_text() != config.to_toml():
            before, now = (dict(flat(tomllib.loads(text))) for text in (path.read_text(), config.to_toml()))
            key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
            hint = "; --jobs decides it" if key == "run.threads" else ""
            raise RecipeError(
                f"{out} holds a comparison with another recipe ({path}: {key} is {before.get(key)} there and {now.get(key)} now{hint}): choose another --out"
            )
    for path, config in recipes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config.to_toml())


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Treat a closed terminal or a kill like Ctrl-C: the runs save themselves, and none continues alone."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bootstrap(start: Start, quiet: bool) -> None:
    """Make a start unless it exists."""
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


class Work:
    """The unfinished runs, `jobs` at a time, each `sppo train` in its own process."""

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
        lines = entry.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        why = next((line for line in reversed(lines) if line.startswith(("error:", "failed:"))), lines[-1])
        if code < 0:
            why = f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        self.failed.append(f"{entry.algorithm} seed {entry.seed} (exit {code}): {why}")
        self.console.print(f"warning: {self.failed[-1]}; see {entry.log}", style="yellow", markup=False)
