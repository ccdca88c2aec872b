"""Kills and stops processes of a run on a cluster, and looks whether the run notices: it must end as an undisturbed one does.

The run is quickstart's, cut down, on two learner ranks, two rollout workers and a verifier. It runs once undisturbed; then again and again, each time
with one process struck at a moment drawn uniformly between the start of its actors and its end:

    SIGKILL   worker, rank, verifier, driver (then `sppo train --resume`)     --rounds moments each
    SIGSTOP   worker, rank, verifier                                          one moment each

Each time it is checked that the exit code is 0, that `policy_sha256` is the undisturbed run's, that every step's rollouts are (the same tasks and
the same tokens in the same order: no prompt is lost or doubled), that it took no longer than it may, and that no process of it is left.

A table as it goes; the last line is one JSON object; exit code 1 where a check failed. `make chaos`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
OPTIONS = {
    "steps": 4, "seed": 5, "bootstrap.steps": 20, "evaluation.n": 16, "rollout.prompts": 32, "run.threads": 1, "run.checkpoint_every": 2,
    "cluster.learners": 2, "cluster.rollouts": 2, "cluster.timeout": 20, "cluster.start_timeout": 120, "reward.workers": 1,
}  # fmt: skip
TITLES = {"worker": "ray::RolloutWorker", "rank": "ray::LearnerRank", "verifier": "ray::VerifierWorker"}
"""Of processes, by what is struck; the driver is the command itself."""
KINDS = ("worker", "rank", "verifier", "driver", "stop-worker", "stop-rank", "stop-verifier")
MARK = "SPPO_CHAOS"
"""A variable of the environment of all processes of a run, by which those are found that outlive their parents."""
GLANCE = 0.2
"""Seconds between two looks at a run's processes."""
LEAVING = 30.0
"""Seconds that processes may take to end after the run."""
ORPHANED = 90.0
"""The same after the driver was killed: two of Ray's own agents try for 60 seconds to report it to a server that is gone."""


@dataclass(frozen=True)
class Blow:
    """What is done to whom, how many seconds after the actors are there."""

    kind: str
    at: float

    @property
    def whom(self) -> str:
        """Without what is done to it."""
        return self.kind.removeprefix("stop-")

    @property
    def sent(self) -> signal.Signals:
        """SIGKILL, or SIGSTOP."""
        return signal.SIGSTOP if self.kind.startswith("stop-") else signal.SIGKILL


@dataclass
class Ended:
    """How a run ended."""

    code: int | None
    """None: it had to be ended, because it took too long."""
    seconds: float
    started: float
    """Seconds until its actors were there."""
    struck: list[str] = field(default_factory=list)
    """The kinds that a blow landed on; a blow may come too late."""
    over: float = 0.0
    """When that was, by the monotonic clock."""
    said: str = ""


class Watched:
    """A command, and every process that comes of it."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        with log.open("ab") as out:
            self.driver = psutil.Popen(
                command, stdout=out, stderr=out, env={**os.environ, MARK: self.mark}, cwd=RECIPE.parents[1]
            )
        self.seen: dict[tuple[int, float], psutil.Process] = {}

    def look(self) -> None:
        """Take note of what the driver has started by now, and what that has: Ray's processes rename themselves, and lose their environment by it."""
        try:
            for process in self.driver.children(recursive=True):
                self._note(process)
        except psutil.Error:
            return

    def look_around(self) -> None:
        """Take note of what was started with this environment, whoever its parent is now."""
        for process in psutil.process_iter():
            try:
                if process.pid != self.driver.pid and process.environ().get(MARK) == self.mark:
                    self._note(process)
            except psutil.Error:
                continue

    def _note(self, process: psutil.Process) -> None:
        try:
            self.seen[process.pid, process.create_time()] = process
        except psutil.Error:
            return

    def actors(self, whom: str) -> list[psutil.Process]:
        """Those of a kind that live and are not stopped."""
        return [
            p for p in self.seen.values() if title(p).startswith(TITLES[whom]) and state(p) != psutil.STATUS_STOPPED
        ]

    def left(self, deadline: float) -> list[str]:
        """Titles of what still lives at a time (of the monotonic clock); it is ended then."""
        while True:
            self.look_around()
            alive = [p for p in self.seen.values() if state(p) not in ("", psutil.STATUS_ZOMBIE)]
            if not alive or time.monotonic() > deadline:
                break
            time.sleep(GLANCE)
        names = [title(p).strip()[:60] for p in alive]
        for process in alive:
            try:
                process.kill()
            except psutil.Error:
                continue
        return names


def title(process: psutil.Process) -> str:
    """What a process calls itself; empty when it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def state(process: psutil.Process) -> str:
    """psutil's status; empty when it is gone."""
    try:
        return str(process.status()) if process.is_running() else ""
    except psutil.Error:
        return ""


def watch(
    command: Sequence[str], log: Path, needed: dict[str, int], blows: Sequence[Blow], limit: float, rng: random.Random
) -> tuple[Watched, Ended]:
    """Run a command to its end, with blows; `needed` says how many actors of each kind there must be before time counts."""
    began, one, there = time.monotonic(), Watched(command, log), 0.0
    todo, ended = sorted(blows, key=lambda b: b.at), Ended(None, 0.0, 0.0)
    while one.driver.poll() is None and time.monotonic() - began < limit:
        one.look()
        now = time.monotonic()
        if not there and all(len(one.actors(whom)) >= count for whom, count in needed.items()):
            there = now
            ended.started = now - began
        if there and todo and now - there >= todo[0].at:
            victims = [one.driver] if todo[0].whom == "driver" else one.actors(todo[0].whom)
            if victims:
                blow = todo.pop(0)
                rng.choice(victims).send_signal(blow.sent)
                ended.struck.append(blow.kind)
        time.sleep(GLANCE)
    ended.seconds, ended.code = time.monotonic() - began, one.driver.poll()
    if ended.code is None:
        one.driver.kill()
    one.driver.wait()
    ended.over, ended.said = time.monotonic(), log.read_text(errors="replace")[-2000:]
    one.look_around()
    return one, ended


class Chaos:
    """The undisturbed run, and what others are held against."""

    def __init__(self, folder: Path, options: dict[str, Any], seed: int) -> None:
        """Runs it. Raises RuntimeError where already that fails."""
        self.folder, self.options, self.rng, self.count = folder, {**OPTIONS, **options}, random.Random(seed), 0
        self.needed = {
            "worker": self.options["cluster.rollouts"],
            "rank": self.options["cluster.learners"],
            "verifier": self.options["reward.workers"],
        }
        command, log = self.command(folder / "undisturbed"), folder / "undisturbed.log"
        one, self.undisturbed = watch(command, log, self.needed, [], 1800, self.rng)
        left = one.left(self.undisturbed.over + LEAVING)
        if self.undisturbed.code or left:
            raise RuntimeError(f"the undisturbed run failed, or left {left}: {self.undisturbed.said}")
        self.result = result_of(folder / "undisturbed")

    @property
    def moments(self) -> float:
        """Seconds between the actors' start and the end of the undisturbed run."""
        return self.undisturbed.seconds - self.undisturbed.started

    @property
    def limit(self) -> float:
        """Seconds that a run may take: three undisturbed ones (one that starts again, on a machine that is busier now), and what it
        takes to notice."""
        return 3 * self.undisturbed.seconds + self.options["cluster.timeout"] + self.options["cluster.start_timeout"]

    def command(self, out: Path) -> list[str]:
        """Of a new run."""
        given = [word for key, value in self.options.items() for word in (f"--{key}", str(value))]
        return [sys.executable, "-m", "sppo.cli.main", "train", str(RECIPE), *given, "--out", str(out), "--quiet"]

    def round(self, *kinds: str) -> tuple[list[Blow], list[Ended], list[str]]:
        """One run with a blow of each of these kinds, in this order, at random moments; resumed where its driver was killed. Returns the blows,
        how it ended (both times), and what is wrong."""
        self.count += 1
        out, log = self.folder / f"run-{self.count:03d}", self.folder / f"run-{self.count:03d}.log"
        moments = sorted(self.rng.uniform(0, self.moments) for _ in kinds)
        blows = [Blow(kind, at) for kind, at in zip(kinds, moments, strict=True)]
        runs = [watch(self.command(out), log, self.needed, blows, self.limit, self.rng)]
        killed = "driver" in runs[0][1].struck
        if killed:
            again = [sys.executable, "-m", "sppo.cli.main", "train", "--resume", str(out), "--quiet"]
            runs.append(watch(again, log, self.needed, [], self.limit, self.rng))
        ends, wrong = [end for _, end in runs], list[str]()
        for i, (one, end) in enumerate(runs):
            if left := one.left(end.over + (ORPHANED if killed and i == 0 else LEAVING)):
                wrong.append(f"left running: {', '.join(left)}")
        if ends[-1].code is None:
            wrong.append(f"no end after {self.limit:.0f} s")
        elif ends[-1].code:
            wrong.append(f"exit code {ends[-1].code}: {ends[-1].said.strip().splitlines()[-1:]}")
        else:
            wrong += differences(self.result, result_of(out))
        return blows, ends, wrong


def result_of(run: Path) -> dict[str, Any]:
    """The hash of a run's policy, and each step's tasks and tokens."""
    steps = {
        path.stem: pq.read_table(path, columns=["task_id", "sample", "response_ids"]).to_pylist()
        for path in sorted((run / "rollouts").glob("step-*.parquet"))
    }
    return {"policy": json.loads((run / "summary.json").read_text())["policy_sha256"], "steps": steps}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What of two results is not the same, in words."""
    found = [] if one["policy"] == other["policy"] else ["another policy_sha256"]
    for step in sorted({*one["steps"], *other["steps"]}):
        if one["steps"].get(step) != other["steps"].get(step):
            found.append(f"other rollouts in {step}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="random moments of each SIGKILL [10]")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        return report(Chaos(Path(folder), {}, args.seed), kinds, args.rounds, print)


def report(chaos: Chaos, kinds: Sequence[str], rounds: int, say: Callable[..., None]) -> int:
    """Run all rounds, and say how each went; 1 where a check failed."""
    base = chaos.undisturbed
    say(f"undisturbed: {base.seconds:.0f} s, of which {base.started:.0f} s until all actors were there", flush=True)
    say(f"{'struck':>13} {'after':>7} {'took':>7}  result", flush=True)
    failed, late, slowest = list[str](), 0, 0.0
    plan = [kind for kind in kinds for _ in range(1 if kind.startswith("stop-") else rounds)]
    for kind in plan:
        (blow,), ends, wrong = chaos.round(kind)
        landed, took = bool(ends[0].struck), sum(end.seconds for end in ends)
        slowest, late = max(slowest, took), late + (not landed)
        failed += [f"{kind} at {blow.at:.1f} s: {why}" for why in wrong]
        words = "; ".join(wrong) or ("the same" if landed else "the same (it had ended before)")
        say(f"{kind:>13} {blow.at:6.1f}s {took:6.0f}s  {words}", flush=True)
    say(
        json.dumps(
            {"runs": len(plan), "late": late, "failed": failed, "undisturbed_s": base.seconds, "slowest_s": slowest}
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
