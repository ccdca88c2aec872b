"""Which baseline and ratio suit a pretrained model: SmolLM2-135M on sums of 8 to 10 terms. `make bench-pretrained`

Every arm of a seed starts from the same weights (supervised until 30% of training problems are solved), sees the same
problems, and samples as many responses per step, of about 77 tokens. An arm's rate is the one with the highest mean
accuracy on the way on the tuning seed, which is not used again.

    tune        sppo, sppo-optimal, sppo with half of V(x) as its baseline, grpo (8 samples): each at every rate
    baselines   the same at their own rates on the other seeds
    ratios      sppo with ratio = sequence, family (κ = ½), geometric, and geometric with GSPO's clip: on the first two
                of them, at sppo's rate; the others take ratio = token

With `--fixed RATE` nothing is tuned. What was run is kept and not run again; what was cut off is read as far as it
came. On one GPU `--jobs 12` shares it (some 6.5 GB per run). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import workload

RECIPE = "recipes/smollm2-arithmetic.toml"
SUMS = "gym:chain_sum,min_terms=8,max_terms=10,min_digits=1,max_digits=1"
COMMON = (
    "--rollout.max_tokens", "112", "--rollout.batch", "256", "--training.micro_tokens", "8192",
    "--training.measure_noise", "false", "--bootstrap.steps", "160", "--bootstrap.until", "0.3",
    "--evaluation.every", "10", "--evaluation.n", "128", "--evaluation.samples", "4", "--target", "0.6",
    "--run.checkpoint_every", "100", "--quiet",
)  # fmt: skip
ARMS = {"sppo": "sppo:", "optimal": "sppo-optimal:", "half": "sppo:objective.baseline_weight=0.5,", "grpo": "grpo:"}
RATIOS = (
    "objective.ratio=sequence", "objective.ratio=family", "objective.ratio=geometric",
    "objective.ratio=geometric,objective.clip=[0.0003,0.0004]",
)  # fmt: skip


class Study:
    """Comparisons that share their starts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)

    def compare(self, name: str, arms: Sequence[str], seeds: Sequence[int], *more: str) -> None:
        """`sppo compare` on consecutive seeds, from the starts that all comparisons share."""
        folder = self.out / name
        shutil.copytree(self.out / "starts", folder / "starts", dirs_exist_ok=True)
        command = [
            sys.executable, "-m", "sppo", "compare", RECIPE, "--algorithms", ",".join(arms), "--seed", str(seeds[0]),
            "--seeds", str(len(seeds)), "--jobs", str(self.args.jobs), "--steps", str(self.args.steps),
            "--out", str(folder), "--task.train", self.args.train, "--reward.use", self.args.reward, *COMMON, *more,
        ]  # fmt: skip
        with (self.out / f"{name}.log").open("wb") as log:
            failed = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        print(f"{name} failed: see {self.out / name}.log" if failed else f"{name} is done", flush=True)

    def starts(self, seeds: Sequence[int]) -> None:
        """The supervised starts, as many at once as there are jobs."""
        make = partial(start, out=self.out, train=self.args.train, reward=self.args.reward)
        with ProcessPoolExecutor(min(self.args.jobs, len(seeds)), get_context("spawn")) as pool:
            for seed in pool.map(make, seeds):
                print(f"start of seed {seed}", flush=True)

    def found(self, name: str) -> dict[str, dict[str, Any]]:
        """Of each arm of a comparison and each seed: what its evaluations saw, and what its updates measured."""
        out: dict[str, dict[str, Any]] = {}
        for path in sorted((self.out / name).glob("*/seed-*/metrics.jsonl")):
            arm, seed = path.parts[-3:-1]
            began = json.loads((path.parent / "start.json").read_text())
            steps = [json.loads(line) for line in path.read_text().splitlines()]
            out.setdefault(arm, {})[seed] = {"start": began["accuracy"], **summary(steps)}
        return out


def start(seed: int, out: Path, train: str, reward: str) -> int:
    """Make one seed's supervised start."""
    from sppo.cli._comparison import Start, bootstrap
    from sppo.recipe.config import Config, parse_value

    flags = dict(zip(COMMON[::2], COMMON[1::2], strict=False))
    keys = {k[2:]: parse_value(v) for k, v in flags.items() if "." in k and "noise" not in k}
    folder = out / "starts" / f"seed-{seed}"
    own = {"seed": seed, "run.out": str(folder), "task.train": train, "reward.use": reward}
    bootstrap(Start(folder, Config.load(RECIPE, keys | own)), True)
    return seed


def summary(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What each evaluation saw, the mean advantage, and what the ratios of the first three steps did."""
    seen = [m for m in steps if m.get("eval/accuracy") is not None]
    return {
        "steps": len(steps),
        "at": [m["step"] + 1 for m in seen],
        "accuracy": [m["eval/accuracy"] for m in seen],
        "pass@4": [m["eval/pass@4"] for m in seen],
        "entropy": [m["eval/entropy"] for m in seen],
        "advantage": sum(m["advantage/mean"] for m in steps) / max(1, len(steps)),
        "clipped": [m.get("ratio/clip_fraction") for m in steps[:3]],
        "ess": [m.get("ratio/ess") for m in steps[:3]],
    }


def arm(name: str, rate: str) -> str:
    """As `sppo compare --algorithms` takes it."""
    return f"{ARMS[name]}training.lr={rate}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/pretrained")
    parser.add_argument("--seed", type=int, default=11, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
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
    seeds = [args.seed + n for n in range(args.seeds)]
    study.starts([*seeds, *([] if args.fixed else [args.tuning])])
    token, best = ("--objective.ratio", "token"), dict.fromkeys(ARMS, args.fixed)
    if not args.fixed:
        study.compare("tune", [arm(a, r) for a in ARMS for r in args.rates], [args.tuning], *token)
        found = study.found("tune")
        for name in ARMS:
            mean = {}
            for rate in args.rates:
                runs = found.get(arm(name, rate).replace(":", "-").replace(",", "-"), {})
                mean[rate] = max(
                    (sum(r["accuracy"]) / len(r["accuracy"]) for r in runs.values() if r["accuracy"]), default=0
                )
            best[name] = max(mean, key=mean.__getitem__)
            print(f"{name}: {best[name]} of {mean}", flush=True)
    study.compare("baselines", [arm(a, best[a]) for a in ARMS], seeds, *token)
    study.compare("ratios", [f"sppo:{r},training.lr={best['sppo']}" for r in RATIOS], seeds[:2])
    found = {name: study.found(name) for name in ("tune", "baselines", "ratios")}
    print(json.dumps({"rates": best, **found}))


if __name__ == "__main__":
    main()
