"""`sppo train`: a recipe, or a model and data, to a better reasoner and a run directory."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import UserError
from ._shared import add_recipe_options, emit, overrides, read_recipe


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("train", help="train a policy with sequence-level PPO", description=__doc__)
    add_recipe_options(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="short for --training.steps")
    parser.add_argument("--resume", metavar="RUN", help="go on with an interrupted run, to the identical result")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; exit 0 when finished, 130 when interrupted, 1 when an alert stopped it (everything is saved)."""
    from ..recipe.config import CLUSTER_KEYS, DATA_KEYS, MEMORY_KEYS
    from ..report.progress import ProgressDisplay, print_summary
    from ..run.loop import train
    from ..run.run import Run

    display = ProgressDisplay(quiet=args.quiet)
    job: Run | None = None
    try:
        if args.resume is not None:
            given = overrides(args)
            data = {key: given.pop(key) for key in DATA_KEYS if key in given}
            memory = {key: given.pop(key) for key in (*MEMORY_KEYS, *CLUSTER_KEYS) if key in given}
            given.pop("training.steps", None)
            if args.recipe or given:
                what = args.recipe or f"--{sorted(given)[0]}"
                raise UserError(
                    f"--resume goes on with the run's own recipe; leave {what} out (only --steps may change, where the data is, and "
                    f"what needs less memory: {', '.join(MEMORY_KEYS)}, reward.workers, and cluster.* but its lag)"
                )
            job = Run.resume(Path(args.resume), display, steps=args.steps, data=data, memory=memory)
        else:
            job = Run.new(read_recipe(args), display)
        with interruptible(job, display):
            summary = train(job)
    except KeyboardInterrupt:
        if job is None:
            raise
        return _stopped(job, args.json)
    finally:
        display.stop()
        if job is not None:
            job.close()
    out = job.components.config.run.out
    if not args.json:
        print_summary(summary, out)
    if summary["stopped"] == "interrupted":
        state = f"after step {summary['steps']}; everything is saved"
        if summary["policy"] is None:
            state = "in the supervised start, which a resumed run makes again from its beginning"
        display.note(f"warning: interrupted {state}. Go on with: sppo train --resume {out}")
    stopped = str(summary["stopped"])
    if stopped.startswith("alert"):
        go_on = f"look at it: sppo view {out}. Go on all the same: sppo train --resume {out}"
        display.note(f"warning: stopped by an {stopped}; {go_on}")
    emit(summary, args.json, "")
    return {"finished": 0, "interrupted": 130}.get(stopped, 1)


def _stopped(job: Any, as_json: bool) -> int:
    """Say what there is of a run that was stopped in the middle of a step."""
    out = job.components.config.run.out
    saved = job.components.directory.checkpoints()
    kept = f"step {int(saved[-1].name.removeprefix('step-'))} is saved" if saved else "nothing is saved yet"
    text = f"in step {job.state.step + 1}; {kept}. Go on with: sppo train --resume {out}"
    print(f"stopped: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps({"stopped": text, "exit": 130}))
    return 130


class interruptible:  # noqa: N801 - reads as a verb in a with statement
    """Ctrl-C (or SIGTERM, or SIGHUP: the terminal is gone) finishes the step and saves; a second one stops at once, and so does a
    cluster's run that takes longer than `cluster.grace` after a SIGTERM: what was sampled by then is in its journal."""

    def __init__(self, job: Any, display: Any) -> None:
        self.job, self.display, self.asked = job, display, False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.job.interrupt()
        if number == signal.SIGTERM and self.job.grace is not None:  # of a machine that is taken back: it will not wait
            signal.signal(signal.SIGALRM, self._handle)
            signal.setitimer(signal.ITIMER_REAL, max(self.job.grace, 1e-3))
        if number == signal.SIGHUP:
            self._leave_the_terminal()
        self.display.end_soon()

    def _leave_the_terminal(self) -> None:
        """Whatever is written to a terminal that is gone fails; files and pipes stay."""
        self.display.hang_up()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (sys.stdout, sys.stderr):
            if stream.isatty():
                os.dup2(nowhere, stream.fileno())

    def __enter__(self) -> None:
        caught = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else of nohup: the run outlives the terminal
            caught.append(signal.SIGHUP)
        self.previous = {s: signal.signal(s, self._handle) for s in caught}

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
