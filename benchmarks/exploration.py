"""What exploration and credit give: each study is a few runs that differ in a switch, on paired seeds, from one start a seed.

    staged     chains of eight operations: sampled as they are, or reached from short ones stage by stage (curriculum.kind = "staged")
    search     chains of ten operations that sampling does not solve: SPPO (optimal baseline), GRPO, and SPPO with search and its buffer
    mixed      one problem in four trivial, one open, two hopeless, 64 a step: drawn as they come, or by the critic (curriculum.kind = "predicted")
    steps      right answers by wrong steps: the answer alone, or with the checker's step scores (added, and added and fading)
    sloppy     the same after demonstrations that write one step in eight wrongly, and go on from the right value
    gamed      a step scorer that can be pleased (it likes steps that end in 0): not read, added to the reward, or as the hybrid's Φ; and the
               hybrid with a scorer that says nothing
    variance   the gradient's variance on long responses at a policy that stands still: SPPO, sppo, sppo-optimal, and the hybrid by steps and by segments

`python benchmarks/exploration.py STUDY [--seeds 5] [--jobs 2]`; `--seeds 6,8,9` names them. What was run is kept and not run again. Last line: one JSON object.
Tree rollouts, search and prediction-driven sampling differ in keys that `sppo compare` takes: docs/exploration.md has the commands.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sppo.cli._comparison import START
from sppo.evaluation.compare import cost_to, mean_interval, median_interval, ratio_interval, value_at
from sppo.recipe.config import Config
from sppo.tasks.loading import load_tasks
from sppo.types import Task

Changes = Mapping[str, Any]
Rows = Callable[[], Iterator[dict[str, Any]]]
PLAIN = {"objective.algorithm": "sppo"}  # V(x) as it is, where an arm names no other
QUICK = {**PLAIN, "training.lr": 4e-4, "training.schedule": "constant", "training.steps": 32, "evaluation.every": 8}
HYBRID = {"objective.algorithm": "sppo-hybrid", "objective.phi": "steps"}
CHECKED = "answer + 0 * steps:check=chain,split=semicolons"
RIGHT = "answer:extract=marked and steps:check=chain,split=semicolons,score=min"
GAMED = "steps:check=benchmarks.exploration:likes_zeros,split=semicolons"
MUTE = "steps:check=benchmarks.exploration:likes_all,split=semicolons"
BY_STEPS = {
    "answer": {"reward.use": CHECKED},
    "added": {"reward.use": "answer + 0.5 * steps:check=chain,split=semicolons"},
    "fading": {"reward.use": "answer + 0.5 * steps:check=chain,split=semicolons", "reward.anneal": 24},
}
FROZEN = {
    **PLAIN, "training.lr": 1e-12, "training.steps": 40, "training.measure_noise": True, "evaluation.every": 0, "rollout.max_tokens": 128,
    "task.train": "chain:steps=10-12", "bootstrap.task": "chain:steps=1-12", "bootstrap.until": 0.3,
}  # fmt: skip


def mixed(split: str) -> Iterator[dict[str, Any]]:
    """Chains of one operation, of four to six, and twice of twelve to sixteen, which nobody was taught to write."""
    sets = [load_tasks(f"chain:steps={steps},split={split}") for steps in ("1", "4-6", "12-16", "12-16")]
    for i in range(50_000 if split == "train" else 2_000):
        task = sets[i % 4][i]
        yield {"question": task.text, **task.columns}


def sloppy() -> Iterator[dict[str, Any]]:
    """Worked chains of one to six operations in which one step in eight states a wrong result, and the next goes on from the right one: to the
    checker, which follows what is written, two wrong steps, or a wrong step and a wrong answer's line."""
    tasks, rng = load_tasks("chain:steps=1-6"), np.random.default_rng(0)
    for task in itertools.islice(tasks, 50_000):
        *steps, answer = str(task.solution).split(";")
        wrong = rng.random(len(steps)) < 1 / 8
        written = [
            f"{s[:-1]}{(int(s[-1]) + rng.integers(1, 10)) % 10}" if w else s for s, w in zip(steps, wrong, strict=True)
        ]
        yield {"question": task.text, **task.columns, "solution": ";".join([*written, answer])}


@dataclass(frozen=True)
class Study:
    """Arms by name, each with what it changes of the recipe; `probe` are the problems that are measured, if not the recipe's own."""

    recipe: str
    arms: Mapping[str, Changes]
    shared: Changes
    probe: str = ""
    start: Changes = field(default_factory=dict)
    """What the start's recipe has beside that."""
    files: Mapping[str, Rows] = field(default_factory=dict)
    """Problems that are written to these files first; keys of recipes name them as `{out}/NAME`."""
    target: float | None = None
    """The accuracy whose tokens are compared."""


STUDIES = {
    "staged": Study(
        "recipes/staged.toml",
        {
            "uniform": {"task.train": "chain:steps=8", "curriculum.kind": "uniform", "curriculum.stages": []},
            "staged": {},
        },
        {},
        "chain:steps=8,split=held-out",
    ),
    "search": Study(
        "recipes/search.toml",
        {
            "sppo": {"search": None, "rollout.prompts": 256, "training.steps": 68},
            "grpo": {
                "search": None,
                "objective.algorithm": "grpo",
                "rollout.prompts": 32,
                "training.steps": 68,
                "training.lr": 2e-4,
            },
            "search": {"training.steps": 60},  # about as many tokens as the others
        },
        {"training.steps": 40, "evaluation.every": 4},
        start={"search": None, "task.train": "chain:steps=1-10", "bootstrap.steps": 1000, "bootstrap.until": 0.17},
    ),
    "mixed": Study(
        "recipes/quickstart.toml",
        {"uniform": {}, "predicted": {"curriculum.kind": "predicted", "curriculum.floor": 0.02}},
        {
            **QUICK,
            "objective.algorithm": "sppo-optimal",
            "rollout.prompts": 64,
            "training.steps": 256,
            "evaluation.every": 32,
            "evaluation.n": 2000,
            "rollout.max_tokens": 112,
            "reward.use": RIGHT,
            "task.train": "{out}/mixed.jsonl",
            "task.eval": "{out}/mixed-held-out.jsonl",
        },
        start={"task.train": "chain:steps=4-6", "task.eval": None},
        files={"mixed.jsonl": lambda: mixed("train"), "mixed-held-out.jsonl": lambda: mixed("held-out")},
        target=0.4,
    ),
    "steps": Study("recipes/quickstart.toml", BY_STEPS, QUICK),
    "sloppy": Study(
        "recipes/quickstart.toml",
        BY_STEPS,
        QUICK,
        start={"bootstrap.task": "{out}/sloppy.jsonl"},
        files={"sloppy.jsonl": sloppy},
    ),
    "gamed": Study(
        "recipes/quickstart.toml",
        {
            "not read": {"reward.use": f"answer + 0 * {GAMED}", "objective.ratio": "token"},
            "added": {"reward.use": f"answer + 1 * {GAMED}", "objective.ratio": "token"},
            "not read, one ratio": {"reward.use": f"answer + 0 * {GAMED}"},
            "hybrid": {"reward.use": f"answer + 0 * {GAMED}", **HYBRID},
            "hybrid, told nothing": {"reward.use": f"answer + 0 * {MUTE}", **HYBRID},
        },
        QUICK,
    ),
    "variance": Study(
        "recipes/quickstart.toml",
        {
            "sppo": {"reward.use": CHECKED, "objective.ratio": "token"},
            "sppo-optimal": {"reward.use": CHECKED, "objective.ratio": "token", "objective.optimal_baseline": True},
            "hybrid, steps": {"reward.use": CHECKED, **HYBRID},
            "hybrid, segments": {
                "objective.algorithm": "sppo-hybrid",
                "reward.use": CHECKED,
                "rollout.segments": "semicolons",
            },
        },
        FROZEN,
    ),
}


def likes_zeros(task: Task, steps: Sequence[str]) -> list[float | None]:
    """A step scorer that is easily pleased."""
    return [float(step.endswith("=0")) for step in steps]


def likes_all(task: Task, steps: Sequence[str]) -> list[float | None]:
    """A step scorer that says nothing."""
    return [1.0 for _ in steps]


def recipe(args: argparse.Namespace, arm: str) -> Config:
    """The recipe of one run; what it begins with has a recipe of its own."""
    study, start = STUDIES[args.study], args.out / f"start-{args.seed}"
    fixed: dict[str, Any] = {"seed": args.seed, "run.threads": 1, "run.checkpoint_every": 10**6}
    if arm == "start":
        changes = {**study.shared, **study.start, **fixed, "run.out": str(start)}
    else:
        own = {"run.out": str(args.out / f"{arm}-{args.seed}"), "policy.model": str(start / START)}
        changes = {**study.shared, **study.arms[arm], **fixed, **own}
    here = {k: v.replace("{out}", str(args.out)) if isinstance(v, str) else v for k, v in changes.items()}
    return Config.load(study.recipe, here)


def serve(args: argparse.Namespace) -> None:
    """One run, in this process; its curve goes to a file."""
    from sppo.evaluation.evaluate import Evaluation, held_out_tasks
    from sppo.run.accuracy import accuracy
    from sppo.run.loop import train
    from sppo.run.observer import Silent
    from sppo.run.run import Run

    study, folder = STUDIES[args.study], args.out / f"{args.serve}-{args.seed}"
    curve: dict[str, list[Any]] = {"tokens": [], "accuracy": [], "measures": []}

    class Watch(Silent):
        def evaluation(self, step: int, result: Evaluation) -> None:
            c = job.components
            if study.probe:
                result = accuracy(c, job.state, held_out_tasks(load_tasks(study.probe), c.config.evaluation.n))
            curve["tokens"].append(job.state.generated_tokens if step else 0)
            curve["accuracy"].append(result.accuracy)
            curve["measures"].append(result.measures)

    shutil.rmtree(folder, ignore_errors=True)
    config = recipe(args, args.serve).model_copy(update={"bootstrap": None})
    job = Run.new(config, Watch())
    train(job)
    job.close()
    noise = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        m = json.loads(line)
        noise.append([m.get("update/grad_variance"), m.get("update/grad_signal")])
    folder.with_name(folder.name + ".json").write_text(
        json.dumps(curve | {"noise": noise, "recipe": told(args, args.serve)})
    )


def told(args: argparse.Namespace, arm: str) -> str:
    """What a kept run must have been: its recipe, and the problems of the files."""
    rows = [(args.out / name).read_bytes() for name in STUDIES[args.study].files]
    return hashlib.sha256(b"".join([recipe(args, arm).sha256.encode(), *rows])).hexdigest()


def make_start(args: argparse.Namespace) -> None:
    """The checkpoint that all arms of a seed share."""
    from sppo.run.run import Run

    folder = args.out / f"start-{args.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    config = recipe(args, "start")
    job = Run.new(config)
    job.begin()
    job.close()
    folder.with_name(folder.name + ".json").write_text(json.dumps({"recipe": told(args, "start")}))


def run_all(args: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """Every arm on every seed, so many side by side."""

    def one(order: tuple[int, str]) -> None:
        seed, arm = order
        kept, now = args.out / f"{arm}-{seed}.json", argparse.Namespace(**vars(args) | {"seed": seed})
        if kept.exists() and json.loads(kept.read_text())["recipe"] == told(now, arm):
            return
        command = [sys.executable, __file__, args.study, "--out", str(args.out), "--seed", str(seed), "--serve", arm]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f".:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{arm}, seed {seed}:\n{done.stderr[-3000:]}")
        print(f"{arm}, seed {seed}: done", flush=True)

    arms, seeds = list(STUDIES[args.study].arms), args.seeds
    for name, rows in STUDIES[args.study].files.items():
        (args.out / name).write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for part in (
        [(seed, "start") for seed in seeds],
        [(seed, arm) for seed in seeds for arm in arms],
    ):
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, part))
    return {arm: {seed: json.loads((args.out / f"{arm}-{seed}.json").read_text()) for seed in seeds} for arm in arms}


def summary(found: Mapping[str, Mapping[int, Mapping[str, Any]]], target: float | None) -> dict[str, Any]:
    """Accuracy at equal tokens, tokens to the target where it was reached, the last right_by_wrong_steps, the gradient's noise; and each
    against the first arm, in pairs."""
    ends = [c["tokens"][-1] for runs in found.values() for c in runs.values() if c["tokens"]]
    budget, out, first = min(ends), {}, next(iter(found))
    values: dict[str, dict[str, dict[int, float]]] = {}
    for arm, runs in found.items():
        v: dict[str, dict[int, float]] = {
            "accuracy_before": {},
            "accuracy": {},
            "right_by_wrong_steps": {},
            "variance": {},
            "signal": {},
            "tokens_to_target": {},
        }
        for seed, c in runs.items():
            v["accuracy_before"][seed] = c["accuracy"][0]
            v["accuracy"][seed] = value_at(c["tokens"], c["accuracy"], budget)
            if "right_by_wrong_steps" in c["measures"][-1]:
                v["right_by_wrong_steps"][seed] = c["measures"][-1]["right_by_wrong_steps"]
            if target is not None:
                v["tokens_to_target"][seed] = cost_to(c["tokens"], c["accuracy"], target)
            known = [n for n in c["noise"][len(c["noise"]) // 2 :] if n[0] is not None]
            if known:
                v["variance"][seed], v["signal"][seed] = (sum(n[k] for n in known) / len(known) for k in (0, 1))
        values[arm] = v
        out[arm] = {name: mean_interval(list(of.values())) for name, of in v.items() if of}
        if target is not None:
            costs = list(v["tokens_to_target"].values())
            out[arm]["tokens_to_target"] = median_interval(costs)
            out[arm]["reached"] = sum(map(math.isfinite, costs))
    for arm, v in values.items():
        if arm == first:
            continue
        base = values[first]
        out[arm]["accuracy_difference"] = mean_interval([v["accuracy"][s] - base["accuracy"][s] for s in v["accuracy"]])
        both = [s for s in v["right_by_wrong_steps"] if s in base["right_by_wrong_steps"]]
        if both:
            wrong, theirs = v["right_by_wrong_steps"], base["right_by_wrong_steps"]
            out[arm]["right_by_wrong_steps_difference"] = mean_interval([wrong[s] - theirs[s] for s in both])
        for name in ("variance", "tokens_to_target", "right_by_wrong_steps"):
            both = [(v[name][s], base[name][s]) for s in v[name] if s in base[name]]
            pairs = [a / b for a, b in both if 0 < a < math.inf and 0 < b < math.inf]
            if pairs:
                out[arm][f"{name}_ratio"] = ratio_interval(pairs)
                out[arm][f"{name}_left_out"] = len(both) - len(pairs)  # at 0, or never there
    return {"equal_tokens": budget, "seeds": len(found[first]), "arms": out}


def seeds_of(text: str) -> list[int]:
    """`5` is 1 to 5, `6,8` is 6 and 8, and so is `6,8,`."""
    numbers = [int(part) for part in text.split(",") if part]
    return numbers if "," in text else list(range(1, numbers[0] + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=seeds_of, default="5", help="how many, from 1 on, or which: 6,8,9")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out or Path("runs") / f"exploration-{args.study}"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.serve == "start":
        make_start(args)
    elif args.serve:
        serve(args)
    else:
        found = summary(run_all(args), STUDIES[args.study].target)
        for arm, numbers in found["arms"].items():
            print(arm)
            for name, x in numbers.items():
                if isinstance(x, int):
                    print(f"    {name:32s} {x}")
                    continue
                value, low, high = ("–" if x[key] is None else f"{x[key]:.3g}" for key in ("value", "low", "high"))
                print(f"    {name:32s} {value} [{low}, {high}]")
        print(json.dumps(found))


if __name__ == "__main__":
    main()
