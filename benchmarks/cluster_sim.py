"""How long a step takes on a cluster, which part binds, and how to divide the GPUs, by simulation. `make cluster-sim`

    python benchmarks/cluster_sim.py --calibrate runs/mine --out mine.json    # what this machine takes, from a run of one learner and one worker
    python benchmarks/cluster_sim.py --measured mine.json --learners 2 --rollouts 6 --lag 0 1
    python benchmarks/cluster_sim.py --measured mine.json --check runs/two runs/three  # predictions against measured step times
    python benchmarks/cluster_sim.py --assume 8B --gpus 8 64 512              # the best split of a published shape, by arithmetic

What happens in a step is in cluster/events.py. `--assume` takes a shape of layouts.py with the assumptions that stand there; nothing of it was
measured. Without `--learners` and `--rollouts` the GPUs are divided so that a step is shortest. One GPU is used for both in turns.

`--check` takes folders of runs, or JSON files: a list of objects such as {"learners": 1, "rollouts": 2, "lag": 0, "step_seconds": 4.1}; chunk, shards,
gather and verifiers may stand beside them, and so may any key of a calibration that was different there (responses, slots). It exits with 1 where
a prediction is off by more than `--within` (0.15). With `--json` the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from cluster.calibrate import calibrate, read
from cluster.events import Found, simulate
from cluster.model import Layout, Measured
from sppo.errors import DataError, UserError
from sppo.files import readable

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LAYOUT = tuple(f.name for f in fields(Layout))


def candidates(gpus: int, per_rollout: int, shards: int) -> list[int]:
    """Numbers of learners worth trying for so many GPUs: multiples of the shards, at most 16, denser where they are few."""
    unit = max(1, shards)
    most = (gpus - per_rollout) // unit
    return sorted({unit * round(most ** (k / 15)) for k in range(16)}) if most > 0 else []


def best(m: Measured, layout: Layout, gpus: int, per_rollout: int, steps: int) -> tuple[Layout, Found] | None:
    """The split of the GPUs whose step is shortest; of those within 1% of it the one with the fewest learners. None where there is none."""
    if gpus == 1:
        whole = replace(layout, learners=1, rollouts=1, lag=0, shards=1)
        return None if layout.lag or per_rollout > 1 or layout.shards > 1 else (whole, simulate(m, whole, steps))
    seconds: dict[int, float] = {}

    def split(learners: int) -> Layout:
        return replace(layout, learners=learners, rollouts=(gpus - learners) // per_rollout)

    def trial(tried: Iterable[int]) -> int:
        for learners in tried:
            if learners not in seconds:
                seconds[learners] = simulate(m, split(learners), min(steps, 4)).step_seconds
        return min(seconds, key=lambda n: (seconds[n], n))

    tried = candidates(gpus, per_rollout, layout.shards)
    if not tried:
        return None
    at, unit = tried.index(trial(tried)), max(1, layout.shards)
    low, high = tried[max(0, at - 1)], tried[min(len(tried) - 1, at + 1)]
    least = seconds[trial(range(low, high + 1, max(unit, (high - low) // 8 // unit * unit)))]
    chosen = split(min(n for n, taken in seconds.items() if taken <= 1.01 * least))
    return chosen, simulate(m, chosen, steps)


def row(layout: Layout, found: Found, m: Measured, gpus: int) -> dict[str, Any]:
    """A line of the table, as JSON."""
    return {
        "gpus": gpus, **asdict(layout), "step_seconds": found.step_seconds, "binds": found.binds, "parts": found.parts, "used": found.used,
        "responses_per_second": m.responses / found.step_seconds if found.step_seconds else None,
    }  # fmt: skip


def said(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table for people."""
    yield f"{'GPUs':>6}{'learners':>10}{'rollouts':>10}{'lag':>5}{'step, s':>10}{'learners':>10}{'rollouts':>10}{'verifiers':>11}  binds"
    yield f"{'':>6}{'':>10}{'':>10}{'':>5}{'':>10}{'busy':>10}{'busy':>10}{'busy':>11}"
    for r in rows:
        used = r["used"]
        shares = f"{used['learners']:>10.0%}{used['rollouts']:>10.0%}{used['verifiers']:>11.0%}"
        part = r["parts"][r["binds"]]
        yield (
            f"{r['gpus']:>6}{r['learners']:>10}{r['rollouts']:>10}{r['lag']:>5}{r['step_seconds']:>10.2f}{shares}  {r['binds']} ({part:.2f} s)"
        )


def tabulate(args: argparse.Namespace, m: Measured) -> dict[str, Any]:
    """Simulate what was asked for; prints the table."""
    rows = []
    base = Layout(chunk=args.chunk, gather=args.gather, verifiers=args.verifiers, sync=args.sync)
    for lag in args.lag:
        if args.learners or args.rollouts:
            layout = replace(
                base, learners=args.learners or 1, rollouts=args.rollouts or 1, shards=args.shards, lag=lag
            )
            gpus = layout.learners + layout.rollouts * args.rollout_gpus
            rows.append(row(layout, simulate(m, layout, args.steps), m, gpus))
            continue
        for gpus in args.gpus:
            split = best(
                m,
                replace(base, lag=lag, learners=max(1, args.shards), shards=args.shards),
                gpus,
                args.rollout_gpus,
                args.steps,
            )
            if split is not None:
                rows.append(row(*split, m, gpus))
    if not rows:
        raise UserError("no split of so few GPUs: a worker and one copy of the weights must find room")
    rows.sort(key=lambda r: r["gpus"])
    print("\n".join(said(rows)))
    return {"rows": rows}


def taken(path: Path, skip: int) -> list[dict[str, Any]]:
    """Measured steps: a JSON list, or a run's folder, whose step takes the median of what its phases add up to. Raises DataError."""
    if path.is_dir():
        ran = read(path, skip)
        r, t = ran.config.rollout, ran.config.training
        phases = [sum(v or 0.0 for k, v in m.items() if k.startswith("seconds/")) for m in ran.metrics]
        other = {
            "responses": r.prompts * r.samples,
            "slots": r.batch,
            "minibatches": t.minibatches * t.epochs,
            "evaluate_every": 0,
        }
        return [{**asdict(ran.layout), **other, "step_seconds": statistics.median(phases), "source": str(path)}]
    with readable(f"{path} is no list of measured steps"):
        entries: list[dict[str, Any]] = json.loads(path.read_text())
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} is no list of measured steps: a JSON list of objects with step_seconds")
    return entries


def checks(m: Measured, paths: Sequence[Path], within: float, steps: int, skip: int) -> dict[str, Any]:
    """Predictions against measured step times; prints them. Raises DataError where there are none."""
    rows, known = [], {f.name for f in fields(Measured)}
    print(f"{'learners':>9}{'rollouts':>10}{'lag':>5}{'predicted':>11}{'measured':>10}{'error':>8}")
    for path in paths:
        for entry in taken(path, skip):
            with readable(f"{path} is no list of measured steps"):
                layout = Layout(**{key: entry[key] for key in LAYOUT if key in entry})
                other = {key: value for key, value in entry.items() if key in known}
                seconds = float(entry["step_seconds"])
            predicted = simulate(replace(m, **other), layout, steps).step_seconds
            error = predicted / seconds - 1
            rows.append({**entry, "predicted": predicted, "error": error})
            print(
                f"{layout.learners:>9}{layout.rollouts:>10}{layout.lag:>5}{predicted:>11.2f}{seconds:>10.2f}{error:>+8.1%}"
            )
    worst = max(abs(r["error"]) for r in rows)
    print(f"the worst is off by {worst:.1%}; {within:.0%} is the aim: {'met' if worst <= within else 'NOT met'}")
    return {"checks": rows, "worst": worst, "ok": worst <= within}


def measured(args: argparse.Namespace) -> Measured:
    """What the options name, with what `--set` changes."""
    if args.assume:
        from layouts import assumed

        m = assumed(args.assume)
    elif args.measured:
        m = Measured.load(args.measured)
    else:
        raise UserError("name a calibration (--measured FILE, made by --calibrate RUN) or a shape (--assume 8B)")
    found = m.as_json()
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set takes KEY=VALUE, not {text!r}")
        with readable(f"--set {text}: the value is no JSON"):
            found[key] = json.loads(value)
    with readable("--set"):
        return Measured.of(found)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, metavar="FILE", help="a calibration")
    parser.add_argument(
        "--assume", metavar="SHAPE", help="a published shape on H100s by arithmetic: 1.5B, 8B, 32B, 70B"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change keys of either, e.g. responses=4096",
    )
    parser.add_argument("--calibrate", type=Path, nargs="+", metavar="RUN", help="make a calibration from runs")
    parser.add_argument("--skip", type=int, default=1, metavar="N", help="leave the first N steps of each run out (1)")
    parser.add_argument(
        "--verdict", type=float, metavar="SECONDS", help="of one verdict; default: recorded responses are judged again"
    )
    parser.add_argument(
        "--no-curve", action="store_true", help="fit a straight line instead of timing decoding passes here"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the calibration goes")
    parser.add_argument(
        "--check", type=Path, nargs="+", metavar="FILE", help="measured steps to compare with, or folders of runs"
    )
    parser.add_argument("--within", type=float, default=0.15, help="the relative error that is allowed")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, metavar="N", help="1 to 4,096")
    parser.add_argument("--learners", type=int, default=0, metavar="N", help="instead of the best split of --gpus")
    parser.add_argument("--rollouts", type=int, default=0, metavar="M", help="workers; with --learners")
    parser.add_argument("--rollout-gpus", type=int, default=1, metavar="N", help="GPUs per worker")
    parser.add_argument("--lag", type=int, nargs="+", default=[0, 1], metavar="K")
    parser.add_argument(
        "--chunk", type=int, default=0, metavar="N", help="responses; 0: a step's, divided by the workers"
    )
    parser.add_argument(
        "--shards", type=int, default=0, metavar="N", help="ranks per copy of the weights; 0: all learners"
    )
    parser.add_argument("--gather", choices=("update", "layer"), default="update")
    parser.add_argument("--verifiers", type=int, default=0, metavar="V", help="0: the driver judges")
    parser.add_argument(
        "--sync", choices=("together", "each"), default="together", help="each: what if workers took weights one by one"
    )
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="simulated steps")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args(given)
    if min(args.gpus) < 1 or args.steps < 1 or args.rollout_gpus < 1 or args.skip < 0:
        parser.error("--gpus, --steps and --rollout-gpus are 1 or more, --skip 0 or more")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what was asked for; returns what `--json` prints."""
    if not args.calibrate:
        m = measured(args)
        return checks(m, args.check, args.within, args.steps, args.skip) if args.check else tabulate(args, m)
    found = calibrate(args.calibrate, args.skip, args.verdict, not args.no_curve)
    Measured.of(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    for key in ("train", "minibatch", "call", "prefill", "transfer", "driver"):
        print(f"{key:<12}{found[key]:.3g} s")
    print("decode      " + ", ".join(f"{seconds:.3g} s with {live:.0f} live" for live, seconds in found["decode"]))
    print(
        "off by      " + ", ".join(f"{part} {error:.1%}" for part, error in found["fit"].items()) + " (mean over steps)"
    )
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Exit 0: done; 1: a prediction is too far off; 2: the user's mistake."""
    args = arguments(given)
    try:
        found = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    return 0 if found.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
