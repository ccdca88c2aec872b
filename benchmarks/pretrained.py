"""Which baseline and which ratio suit a pretrained model: SmolLM2-135M on sums of 8 to 10 terms, about 77 tokens a response. `make bench-pretrained`

Every arm of a seed starts from the same weights (supervised until 30% of training problems are solved), sees the same problems, and samples as many
responses a step. An arm's rate is the one with the highest mean accuracy on the way on the tuning seed, which is not used again.

    tune        sppo, sppo-optimal, sppo with half of V(x) as its baseline, grpo (8 samples): each at every rate, ratio = token
    baselines   the same at their own rates on the other seeds, grpo on the first of them
    ratios      sppo with ratio = sequence, family (κ = ½), geometric, and geometric with GSPO's clip on the first two of them, at sppo's rate

With `--fixed RATE` nothing is tuned. What was run is kept and not run again. On one GPU `--jobs 8` shares it (some 6.5 GB a run). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import workload

RECIPE = "recipes/smollm2-arithmetic.toml"
SUMS = "gym:chain_sum,min_terms=8,max_terms=10,min_digits=1,max_digits=1"
COMMON = (
    "--rollout.max_tokens", "112", "--rollout.batch", "256", "--training.micro_tokens", "8192", "--training.measure_noise", "false",
    "--bootstrap.steps", "160", "--bootstrap.until", "0.3", "--evaluation.every", "10", "--evaluation.n", "128", "--evaluation.samples", "4",
    "--target", "0.6", "--quiet",
)  # fmt: skip
ARMS = {"sppo": "sppo:", "optimal": "sppo-optimal:", "half": "sppo:objective.baseline_weight=0.5,", "grpo": "grpo:"}
RATIOS = (
    "objective.ratio=sequence", "objective.ratio=family", "objective.ratio=geometric", "objective.ratio=geometric,objective.clip=[0.0003,0.0004]",
)  # fmt: skip


class Study:
    """Comparisons that share their starts, several at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.running: list[tuple[subprocess.Popen[bytes], str]] = []

    def compare(self, name: str, arms: Sequence[str], seed: int, jobs: int, *more: str) -> None:
        """Begin `sppo compare` on one seed, from the start that all comparisons of that seed share."""
        folder, starts = self.out / f"{name}-{seed}", self.out / "starts"
        if (starts / f"seed-{seed}").exists():
            shutil.copytree(starts, folder / "starts", dirs_exist_ok=True)
        command = [
            sys.executable, "-m", "sppo", "compare", RECIPE, "--algorithms", ",".join(arms), "--seeds", "1", "--seed", str(seed), "--jobs", str(jobs),
            "--steps", str(self.args.steps), "--out", str(folder), "--task.train", self.args.train, "--reward.use", self.args.reward, *COMMON, *more,
        ]  # fmt: skip
        with (self.out / f"{name}-{seed}.log").open("wb") as log:
            self.running.append((subprocess.Popen(command, stdout=log, stderr=log), f"{name}-{seed}"))

    def wait(self) -> None:
        """Until all are done; says which failed."""
        for process, name in self.running:
            if process.wait():
                print(f"{name} failed: see {self.out / name}.log", flush=True)
            else:
                print(f"{name} is done", flush=True)
        self.running = []

    def starts(self, seeds: Sequence[int]) -> None:
        """The supervised starts."""
        from sppo.cli.compare import Start, _bootstrap
        from sppo.recipe.config import Config, parse_value

        flags = dict(zip(COMMON[::2], COMMON[1::2], strict=False))
        keys = {k[2:]: parse_value(v) for k, v in flags.items() if "." in k and "noise" not in k}
        for seed in seeds:
            folder = self.out / "starts" / f"seed-{seed}"
            own = {"seed": seed, "run.out": str(folder), "task.train": self.args.train, "reward.use": self.args.reward}
            _bootstrap(Start(folder, Config.load(RECIPE, keys | own)), True)
            print(f"start of seed {seed}", flush=True)

    def found(self, name: str, seed: int) -> dict[str, Any]:
        """Of each arm of a comparison: accuracy, pass@4 and entropy at each evaluation, mean advantage, clipped share and ESS of the first three steps."""
        out: dict[str, Any] = {}
        for path in sorted((self.out / f"{name}-{seed}").glob(f"*/seed-{seed}/metrics.jsonl")):
            if path.parts[-3] == "starts":
                continue
            steps = [json.loads(line) for line in path.read_text().splitlines()]
            seen = [m for m in steps if m.get("eval/accuracy") is not None]
            out[path.parts[-3]] = {
                "accuracy": [m["eval/accuracy"] for m in seen],
                "pass@4": [m["eval/pass@4"] for m in seen],
                "entropy": [m["eval/entropy"] for m in seen],
                "advantage": sum(m["advantage/mean"] for m in steps) / len(steps),
                "clipped": [m.get("ratio/clip_fraction") for m in steps[:3]],
                "ess": [m.get("ratio/ess") for m in steps[:3]],
            }
        return out


def arm(name: str, rate: str) -> str:
    """As `sppo compare --algorithms` takes it."""
    return f"{ARMS[name]}training.lr={rate}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/pretrained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--tuning", type=int, default=10, help="the tuning seed")
    parser.add_argument("--rates", nargs="+", default=["1e-5", "3e-5"])
    parser.add_argument("--fixed", metavar="RATE", help="every arm's rate, instead of tuning")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--train", default=SUMS, help="problems (a file of rows too)")
    parser.add_argument("--reward", default="gym")
    args = parser.parse_args()
    workload.model_folder()
    study = Study(args)
    study.out.mkdir(parents=True, exist_ok=True)
    study.starts([*args.seeds, *([] if args.fixed else [args.tuning])])
    token, best = ("--objective.ratio", "token"), dict.fromkeys(ARMS, args.fixed)
    if not args.fixed:
        study.compare("tune", [arm(a, r) for a in ARMS for r in args.rates], args.tuning, args.jobs, *token)
        study.wait()
        found = study.found("tune", args.tuning)
        for name in ARMS:
            mean = {
                r: sum(x) / len(x)
                for r in args.rates
                if (x := found.get(arm(name, r).replace(":", "-").replace(",", "-"), {}).get("accuracy"))
            }
            best[name] = max(mean, key=mean.__getitem__)
            print(f"{name}: {best[name]} of {mean}", flush=True)
    each = max(1, args.jobs // len(args.seeds))
    for i, seed in enumerate(args.seeds):
        arms = [a for a in ARMS if a != "grpo" or i == 0]
        study.compare("baselines", [arm(a, best[a]) for a in arms], seed, each, *token)
        if args.jobs < len(args.seeds):
            study.wait()
    study.wait()
    for seed in args.seeds[:2]:
        study.compare("ratios", [f"sppo:{r},training.lr={best['sppo']}" for r in RATIOS], seed, each)
        if args.jobs < len(args.seeds):
            study.wait()
    study.wait()
    result: dict[str, Any] = {"rates": best}
    for name in ("tune", "baselines", "ratios"):
        for seed in (args.tuning, *args.seeds):
            if found := study.found(name, seed):
                result[f"{name}-{seed}"] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
