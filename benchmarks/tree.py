"""What a token costs in a tree of responses, against plain rollouts: wall time of sampling a distinct token, in turns.

`python benchmarks/tree.py MODEL [--rounds 7]`; MODEL is a policy's folder, e.g. of a run of recipes/quickstart.toml. Branches share what lies
before them, so a token that several leaves hold is sampled, and counted, once. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from sppo.evaluation.compare import mean_interval
from sppo.memory import keep_memory
from sppo.models.loading import pick_device
from sppo.models.policy import Policy
from sppo.rollout.engine import Branching, Sampling
from sppo.rollout.local import LocalEngine
from sppo.tasks.loading import load_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", default="chain:steps=4-6")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--segments", default="tokens")
    parser.add_argument("--entropy", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keep_memory()
    policy, stated = Policy.load(args.model, dtype="auto", device=pick_device(), seed=0)
    print(stated)
    engine, source = LocalEngine(policy), load_tasks(args.tasks)
    sampling = Sampling(args.max_tokens, batch=256)
    branching = Branching(2, args.entropy, 8 * args.max_tokens, args.segments)
    ratios, leaves, shared = [], 0.0, 0.0
    for number in range(args.rounds + 1):
        prompts = [policy.prompt_ids(source[number * args.prompts + i]) for i in range(args.prompts)]
        seeds = [number * args.prompts + i for i in range(args.prompts)]
        began = time.perf_counter()
        trees = engine.generate_trees(prompts, seeds, sampling, branching)
        tree_seconds = time.perf_counter() - began
        distinct = sum(_distinct([s.forks for s in t], [len(s.ids) for s in t]) for t in trees)
        leaves = sum(map(len, trees))
        # as many sequences, so that both fill the batch alike
        more = [(p, s) for p, s, t in zip(prompts, seeds, trees, strict=True) for _ in t]
        began = time.perf_counter()
        plain = engine.generate([p for p, _ in more], [s * 1000 + i for i, (_, s) in enumerate(more)], sampling)
        plain_seconds = time.perf_counter() - began
        tokens = sum(len(s.ids) for s in plain)
        shared = 1 - distinct / sum(len(s.ids) for t in trees for s in t)
        if number:  # the first round warms up
            ratios.append((tree_seconds / distinct) / (plain_seconds / tokens))
            print(f"round {number}: {leaves} leaves, {shared:.0%} shared, {ratios[-1]:.2f}")
    interval = mean_interval(ratios)
    found = {
        "seconds_per_distinct_token_ratio": statistics.median(ratios),
        "low": interval["low"],
        "high": interval["high"],
    }
    print(json.dumps(found | {"leaves_a_prompt": leaves / args.prompts, "shared": shared}))


def _distinct(forks: list[tuple[tuple[int, int, int], ...]], lengths: list[int]) -> int:
    """Tokens of a tree, each counted once: a leaf's own begin at the last fork at which it took another turn than the leaf before it."""
    total = 0
    for n, (mine, length) in enumerate(zip(forks, lengths, strict=True)):
        first = next((m[0] for m, t in zip(mine, forks[n - 1], strict=False) if m != t), 0) if n else 0
        total += length - first
    return total


if __name__ == "__main__":
    main()
