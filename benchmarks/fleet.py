"""What a cluster costs: a SmolLM2-135M step by one learner rank and one rollout worker against the same step in one process. `make bench-cluster`

Both sides are processes of their own that make one step when told to, in turns, after one step to warm up: 32 prompts, responses of up to 32 tokens,
a critic of 1M parameters, one update, the weights given to the engine and verified. Then the learner's rank is killed, and the seconds until a fresh
one has the newest checkpoint and the worker its weights are counted. Last line: one JSON object (`overhead` as a share of a step, `sync_s`, `recovery_s`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import workload

RESPONSES, TOKENS = 32, 32


def serve(cluster: bool) -> None:
    """One side: a run whose loop waits for a word before each step."""
    import psutil

    from sppo.errors import WorkerLost
    from sppo.learning.batch import pack
    from sppo.recipe.config import Config
    from sppo.run.run import Run
    from sppo.run.sample import sample

    with tempfile.TemporaryDirectory() as folder:
        config = Config.load(None, {
            "policy.model": workload.model_folder(), "critic.model": "tiny:hidden=128,layers=3,heads=4",
            "task.train": "gym:chain_sum", "reward.use": "gym", "rollout.prompts": RESPONSES, "rollout.batch": RESPONSES, "rollout.max_tokens": TOKENS,
            "training.lr": 1e-6, "training.minibatches": 1, "training.micro_tokens": 2048, "training.steps": 100,
            "monitors.action": "off", "evaluation.n": 1, "run.out": f"{folder}/run",
        } | ({"cluster.learners": 1, "cluster.rollouts": 1, "cluster.backoff": 0.0} if cluster else {}))  # fmt: skip
        run = Run.new(config)
        c = run.components
        run.begin()
        print("{}", flush=True)
        batch = pack(sample(c, 0).rollouts, c.policy.pad_id)
        for step, word in enumerate(sys.stdin):
            began = time.perf_counter()
            if word.startswith("kill"):
                rank = next(
                    p for p in psutil.Process().children(recursive=True) if "LearnerRank" in " ".join(p.cmdline())
                )
                rank.send_signal(signal.SIGKILL)
                try:
                    run.learner.advantage(batch)
                except WorkerLost as lost:
                    run.recover(lost)
                    run.begin()
                print(json.dumps({"recovery_s": time.perf_counter() - began}), flush=True)
                continue
            sampled = sample(c, step)
            batch = pack(sampled.rollouts, c.policy.pad_id)
            sampling = time.perf_counter() - began
            advantage_B = run.learner.advantage(batch)[0]
            run.learner.update(batch, advantage_B, step)
            learning = time.perf_counter() - began - sampling
            run.sync(step + 1)
            whole = time.perf_counter() - began
            print(
                json.dumps(
                    {"seconds": whole, "sampling": sampling, "learning": learning, "sync": whole - sampling - learning}
                ),
                flush=True,
            )
        run.close()


def side(cluster: bool) -> subprocess.Popen[str]:
    """Start one side, and wait until it is ready."""
    made = subprocess.Popen(
        [sys.executable, __file__, "--serve", "cluster" if cluster else "inline"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    answered(made)
    return made


def answered(made: subprocess.Popen[str]) -> dict[str, Any]:
    """The next JSON object that a side prints."""
    assert made.stdout is not None
    for line in made.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise SystemExit("a side ended early")


def told(made: subprocess.Popen[str], word: str) -> dict[str, Any]:
    """What a side answers to a word."""
    assert made.stdin is not None
    made.stdin.write(f"{word}\n")
    made.stdin.flush()
    return answered(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=["inline", "cluster"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve == "cluster")
        return
    sides = {name: side(name == "cluster") for name in ("inline", "cluster")}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            found = told(sides[name], "step")
            if number:  # the first warms up
                rows[name].append(found)
        if number:
            print(
                f"round {number}: "
                + ", ".join(f"{n} {r[-1]['seconds']:.1f} s (sync {r[-1]['sync']:.1f})" for n, r in rows.items()),
                flush=True,
            )
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(rows["inline"], rows["cluster"], strict=True)]
    recovery = told(sides["cluster"], "kill")["recovery_s"]
    for made in sides.values():
        assert made.stdin is not None
        made.stdin.close()
        made.wait(60)
    middle = {
        f"{n}_{key}": statistics.median(r[key] for r in found)
        for n, found in rows.items()
        for key in ("seconds", "sampling", "learning", "sync")
    }
    print(json.dumps({
        "overhead": round(statistics.median(ratios) - 1, 4), "sync_s": round(middle["cluster_sync"], 3), "recovery_s": round(recovery, 1),
        "ratios": [round(r, 4) for r in ratios], "rounds": args.rounds, **{key: round(value, 2) for key, value in middle.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
