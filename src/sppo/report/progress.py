"""The terminal's view of a run: one live line on a terminal, plain lines elsewhere (logs, CI), silence under --quiet."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

if TYPE_CHECKING:  # `sppo view` needs no torch, and starts without it
    from ..evaluation.evaluate import Evaluation

PLAIN_EVERY = 15.0
"""Seconds between plain progress lines."""
PARTS = ("sampling", "judging", "updating")
"""The parts of a step, in order."""
WITHIN_EVERY, ENDING_EVERY = 60.0, 10.0
"""Seconds between plain lines within one step; and within the last step of a run that is ending."""


def clock(seconds: float) -> str:
    """`4:05`, `1:02:09`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class ProgressDisplay:
    """An observer (`run/observer.py`) that draws on stderr, so that stdout stays machine-readable."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self.progress: Progress | None = None
        self.bar: TaskID | None = None
        self.name, self.total, self.first, self.began, self.printed = "", 0, 0, 0.0, 0.0
        self.accuracy = ""
        self.done = 0
        self.what, self.n, self.of, self.what_began, self.said = "", 0, 0, 0.0, time.monotonic()
        self.took: dict[str, float] = {}  # seconds of a step's parts, the last time
        self.ending = False
        self.status = ""

    def note(self, text: str) -> None:
        """Print a statement; warnings stand out, and are printed even under --quiet."""
        if text.startswith("warning:"):
            self.console.print(text, style="yellow", markup=False, soft_wrap=True)
        elif not self.quiet:
            self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage."""
        self.stop()
        self.name, self.total, self.first, self.began, self.printed = name, total, done, time.monotonic(), 0.0
        self.done, self.what, self.said, self.took, self.status = done, "", time.monotonic(), {}, ""
        if self.live:
            self.progress = Progress(
                TextColumn("[bold]{task.description:<9}"), BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[status]}", markup=False), console=self.console, refresh_per_second=4,
            )  # fmt: skip
            self.bar = self.progress.add_task(name, total=total, completed=done, status="")
            self.progress.start()

    def step(self, done: int, metrics: dict[str, Any]) -> None:
        """Show a finished step."""
        now = time.monotonic()
        self._part_ends(now)
        self.done, self.what, self.said = done, "", now
        elapsed = now - self.began
        left = elapsed / max(done - self.first, 1) * (self.total - done)
        status = f"{self._status(metrics)} · left {clock(left)}"
        if self.progress is not None and self.bar is not None:
            self.status = status
            self.progress.update(self.bar, completed=done, status=status)
        elif not self.quiet and (done == self.total or elapsed - self.printed >= PLAIN_EVERY or done == self.first + 1):
            self.printed = elapsed
            self.console.print(f"{self.name} {done}/{self.total}  {status}", markup=False, soft_wrap=True)
        if done >= self.total:
            self.stop()

    def within(self, what: str, done: int, total: int) -> None:
        """Show how far a step is: on a terminal beside the bar, elsewhere in a line per minute at most."""
        now = time.monotonic()
        if what != self.what:
            self._part_ends(now)
            self.what, self.what_began = what, now
        self.n, self.of = done, total
        if self.progress is not None and self.bar is not None:
            self.progress.update(
                self.bar, status=f"{self.whereabouts()} · {self.status}" if self.status else self.whereabouts()
            )
        elif not self.quiet and now - self.said >= (ENDING_EVERY if self.ending else WITHIN_EVERY):
            self.said = now
            step = f"{self.name} {self.done}/{self.total}  " if self.name else ""
            self.console.print(f"{step}{self.whereabouts()}", markup=False, soft_wrap=True)

    def whereabouts(self) -> str:
        """`updating 3 of 8, about 0:20 left`: the progress of the step, with an estimate of the time left where there
        is one."""
        if not self.what:
            return ""
        text = f"{self.what} {self.of}" if self.what == "judging" else f"{self.what} {self.n} of {self.of}"
        left = self._left(time.monotonic())
        return text if left is None else f"{text}, about {clock(left)} left"

    def _left(self, now: float) -> float | None:
        """Seconds until the step's end: of this part by how far it is, of the next ones by how long they took the last
        time."""
        spent = now - self.what_began
        if self.n:
            left = spent / self.n * (self.of - self.n)
        elif self.what in self.took:
            left = max(0.0, self.took[self.what] - spent)
        else:
            return None
        if self.what not in PARTS:
            return left
        return left + sum(self.took.get(later, 0.0) for later in PARTS[PARTS.index(self.what) + 1 :])

    def _part_ends(self, now: float) -> None:
        if self.what:
            self.took[self.what] = now - self.what_began

    def end_soon(self) -> None:
        """Announce that the run ends with this step, and keep reporting its progress."""
        self.ending = True
        where = self.whereabouts()
        step = f"finishing step {self.done + 1}" if self.name == "train" else "stopping as soon as it can"
        self.note(f"warning: {step}{': ' if where else ''}{where}, then saves (press Ctrl-C again to stop at once)")

    def hang_up(self) -> None:
        """The terminal is gone: nothing may be written to it any more."""
        self.quiet, self.live = True, False
        with contextlib.suppress(OSError):
            self.stop()
        self.progress, self.console = None, Console(file=io.StringIO())

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Show a held-out accuracy with its interval."""
        self.accuracy = f"{result.accuracy:.3f}"
        if not self.quiet:
            beside = _beside(result.pass_at_k, result.entropy)
            masked = f", {result.masked} could not be graded" if result.masked else ""
            masked += f", {cut_share(result.truncated, result.overruled)}" if result.truncated else ""
            self.console.print(
                f"held-out accuracy after step {step}: {result.accuracy:.3f} [{result.low:.3f}, {result.high:.3f}] "
                f"(n={result.n}, {beside}{result.mean_tokens:.0f} tokens per response{masked})",
                style="bold", markup=False, soft_wrap=True,
            )  # fmt: skip

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _status(self, m: dict[str, Any]) -> str:
        if "reward/mean" not in m:  # supervised: the bootstrap, a reward model
            right = f" · {m['accuracy']:.0%} right" if "accuracy" in m else ""
            return f"loss {m['loss']:.3f}{right}"
        pieces = [f"reward {_number(m['reward/mean'])}"]
        if m.get("rollout/truncated"):
            pieces.append(cut_share(m["rollout/truncated"], m.get("rollout/overruled", 0.0)))
        if self.accuracy:
            pieces.append(f"held-out {self.accuracy}")
        if "critic/ece" in m:
            pieces.append(f"critic EV {_number(m['critic/explained_variance'])} ECE {_number(m['critic/ece'])}")
        pieces.append(f"{m['rollout/mean_tokens']:.0f} tok each, {m['tokens_per_second']:,.0f} tok/s")
        return " · ".join(pieces)


def cut_share(truncated: float, overruled: float) -> str:
    """The share of responses cut by rollout.max_tokens, and the share that the reward would have paid."""
    lost = f", {overruled:.0%} would have been paid" if overruled else ""
    return f"{truncated:.0%} cut at rollout.max_tokens{lost}"


def _beside(pass_at_k: Mapping[str, float] | None, entropy: float | None) -> str:
    """`pass@4 0.512, entropy 0.310, `: what an evaluation measured besides accuracy, which is pass@1."""
    found = {**(pass_at_k or {}), **({} if entropy is None else {"entropy": entropy})}
    return "".join(f"{name} {value:.3f}, " for name, value in found.items() if name != "pass@1")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _peak(memory: Mapping[str, Any]) -> str:
    """`3.62 GiB (planned: 3.71)`: of a GPU's memory, where there is one."""
    planned = memory["planned_bytes"]
    return f"{memory['peak_bytes'] / 2**30:.2f} GiB" + (f" (planned: {planned / 2**30:.2f})" if planned else "")


def print_summary(summary: dict[str, Any], out: str) -> None:
    """Print the end of a run: what changed, what it cost, what to do next."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for when in ("before", "after"):
        if summary[f"accuracy_{when}"] is not None:
            low, high = summary[f"accuracy_{when}_low"], summary[f"accuracy_{when}_high"]
            beside = _beside(summary[f"pass_at_k_{when}"], summary[f"entropy_{when}"]).removesuffix(", ")
            table.add_row(
                f"held-out accuracy {when}",
                f"{summary[f'accuracy_{when}']:.3f}  (95% interval {low:.3f} to {high:.3f})  {beside}",
            )
    table.add_row(
        "steps",
        f"{summary['steps']} in {clock(summary['seconds'])} of training, {clock(summary['seconds_evaluating'])} of evaluation",
    )
    table.add_row("generated tokens", f"{summary['generated_tokens']:,}")
    if summary["truncated"]:
        table.add_row("cut off", f"{cut_share(summary['truncated'], summary['overruled'])} in training")
    if summary["masked"] or summary["passed_over"]:
        table.add_row(
            "not used",
            f"{summary['masked']} samples that could not be graded, {summary['passed_over']} prompts over the limit",
        )
    if summary["alerts"]:
        table.add_row("alerts", f"{', '.join(summary['alerts'])}: read them before you believe the accuracy")
    table.add_row("peak memory", _peak(summary["memory"]))
    table.add_row("policy", str(summary["policy"]))
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    from ..models.mlp import is_control

    if summary["policy"] and is_control(summary["policy"]):
        return  # there is nothing to ask
    console.print(
        f'Look at it:  sppo view {out}      Ask it something:  sppo solve {out} "…"      Measure it:  sppo eval {out} --tasks …',
        markup=False,
    )
