"""Does a reward for true confidences make them true, and at what price? recipes/calibration.toml with and without it, from the same starts.

python benchmarks/calibration.py --seeds 5 --jobs 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sppo.evaluation.compare import mean_interval

RECIPE = Path(__file__).parent.parent / "recipes" / "calibration.toml"
ARMS = {"rlcr": "answer:extract=marked + confidence", "accuracy": "answer:extract=marked + 0 * confidence"}
KEYS = ("accuracy", "model_ece", "model_brier", "model_auc", "critic_ece", "critic_auc")


def train(out: Path, seed: int, reward: str, steps: int) -> None:
    """One run; a finished one is kept."""
    if (out / "summary.json").exists():
        return
    command = [
        sys.executable,
        "-m",
        "sppo.cli.main",
        "train",
        str(RECIPE),
        "--quiet",
        "--seed",
        str(seed),
        "--out",
        str(out),
    ]
    command += [
        "--run.threads",
        "1",
        "--training.steps",
        str(steps),
        "--reward.use",
        reward,
        "--run.checkpoint_every",
        str(steps),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def last(out: Path) -> dict[str, float]:
    """The last evaluation's numbers."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    m = next(m for m in reversed(lines) if m.get("eval/accuracy") is not None)
    return {key: m[f"eval/{key}"] for key in KEYS}


def main() -> None:
    """Run what is missing, read everything, print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/calibration-study"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    orders = [
        (args.out / f"{arm}-{seed}", seed, use, args.steps)
        for seed in range(1, args.seeds + 1)
        for arm, use in ARMS.items()
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda order: train(*order), orders))
    found: dict[str, list[dict[str, float]]] = {
        arm: [last(args.out / f"{arm}-{s}") for s in range(1, args.seeds + 1)] for arm in ARMS
    }
    result: dict[str, Any] = {
        arm: {key: mean_interval([f[key] for f in runs]) for key in KEYS} for arm, runs in found.items()
    }
    pairs = list(zip(found["rlcr"], found["accuracy"], strict=True))
    result["difference"] = {key: mean_interval([a[key] - b[key] for a, b in pairs]) for key in KEYS}
    result["ece_ratio"] = mean_interval([a["model_ece"] / b["model_ece"] for a, b in pairs])
    result["per_seed"] = found
    for arm in (*ARMS, "difference"):
        print(arm, {key: round(v["value"], 3) for key, v in result[arm].items()})
    print(json.dumps({"seeds": args.seeds, **result}))


if __name__ == "__main__":
    main()
