"""Hopper's teacher: a linear controller found by augmented random search (arXiv 1803.07055, V2-t) on gymnasium's own, shaped reward.

    python benchmarks/hopper_teacher.py --minutes 15

Prints the controller (an action is `W·o + c`, o as gymnasium gives it) and how often an episode of it succeeds as environments.py counts success.
`TEACHER` there is what this printed with the default seed.
"""

from __future__ import annotations

import argparse
import json
import time
from multiprocessing import Pool
from typing import Any

import numpy as np

STEP, NOISE, DIRECTIONS, BEST = 0.02, 0.025, 8, 4
"""The paper's for Hopper-v1 are (0.02, 0.025, 8, 4)."""
_ENV: Any = None


def episode(job: tuple[np.ndarray, np.ndarray, np.ndarray, int, bool]) -> tuple[float, bool, np.ndarray]:
    """Its return, whether it succeeds, and what was seen (count, sum, sum of squares). Training returns are less the bonus for being alive."""
    global _ENV
    if _ENV is None:
        import gymnasium

        _ENV = gymnasium.make("Hopper-v5").unwrapped
    weight, mean, scale, seed, training = job
    o = np.asarray(_ENV.reset(seed=seed)[0])
    total, seen, ended = 0.0, np.zeros((3, len(o))), False
    for _ in range(1000):
        seen += np.stack([np.ones_like(o), o, o * o])
        o, reward, ended, _, _ = _ENV.step(np.clip(weight @ ((o - mean) / scale), -1, 1))
        total += float(reward) - (1.0 if training else 0.0)
        if ended:
            break
    return total, not ended and float(_ENV.data.qpos[0]) > 1.0, seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    weight, seen = np.zeros((3, 11)), np.zeros((3, 11))
    seen[0] = 1e-8
    best: tuple[float, np.ndarray, np.ndarray, np.ndarray] = (-1.0, weight, np.zeros(11), np.ones(11))
    began, iteration = time.monotonic(), 0
    with Pool(args.processes) as pool:
        while time.monotonic() - began < 60 * args.minutes and best[0] < 1.0:
            mean = seen[1] / seen[0]
            scale = np.sqrt(np.maximum(seen[2] / seen[0] - mean**2, 1e-4))
            directions = rng.normal(size=(DIRECTIONS, 3, 11))
            seeds = rng.integers(2**31, size=DIRECTIONS).tolist()
            jobs = [
                (weight + sign * NOISE * d, mean, scale, s, True)
                for d, s in zip(directions, seeds, strict=True)
                for sign in (1, -1)
            ]
            found = pool.map(episode, jobs, chunksize=1)
            returns = np.array([f[0] for f in found]).reshape(DIRECTIONS, 2)
            seen = seen + sum(f[2] for f in found)
            order = np.argsort(-returns.max(1))[:BEST]
            spread = returns[order].std() + 1e-8
            weight = weight + STEP / (BEST * spread) * np.tensordot(
                returns[order, 0] - returns[order, 1], directions[order], 1
            )
            iteration += 1
            if iteration % 25 == 0:
                tried = pool.map(episode, [(weight, mean, scale, 10_000 + i, False) for i in range(20)])
                share = float(np.mean([t[1] for t in tried]))
                print(
                    f"{time.monotonic() - began:5.0f} s  {iteration:5d}  return {np.mean([t[0] for t in tried]):7.1f}  success {share:.2f}",
                    flush=True,
                )
                if share > best[0]:
                    best = share, weight.copy(), mean, scale
        share, weight, mean, scale = best
        tried = pool.map(episode, [(weight, mean, scale, 50_000 + i, False) for i in range(200)])
    gain = weight / scale
    print(
        json.dumps(
            {
                "success": float(np.mean([t[1] for t in tried])), "episodes": 200, "iterations": iteration, "seed": args.seed,
                "W": np.round(gain, 4).tolist(), "c": np.round(-gain @ mean, 4).tolist(),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
