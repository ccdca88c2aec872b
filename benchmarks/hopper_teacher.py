"""Where the Hopper's teacher (environments.py) comes from: augmented random search on the environment's shaped reward.

`python benchmarks/hopper_teacher.py [--seed 1] [--jobs 2]` prints the twelve numbers of each of the three torques: eleven weights of what is observed
and a constant. The paper too trains its teachers on shaped rewards (arXiv 2604.08865 §5.3); the search is like V2-t of Mania et al. 2018 (arXiv
1803.07055), with a constant beside the weights, and without the bonus for being alive, which teaches to stand. The torques are disturbed while
it learns, since a policy that is cloned from it will not hit them exactly. What is printed is the best of all looks at the same 64 starts, disturbed
as well: a little too good. Some eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from multiprocessing import Pool

import numpy as np

from sppo.environments.base import Reply
from sppo.environments.control import Array, ControlTask
from sppo.environments.control import episode as begun

DIRECTIONS, BEST, DEVIATION, RATE, NOISE = 8, 4, 0.025, 0.01, 0.2
HELD_OUT = 5_000_000


@cache
def _environment() -> ControlTask:
    return ControlTask("hopper")


def episode(job: tuple[Array, int]) -> tuple[float, bool, int, Array]:
    """One episode of a linear policy, [3, 12]: the environment's return without the bonus for being alive (but for where it began, 0.6 at
    most), success, steps, and the observations summed and squared."""
    weights, seed = job
    env, rng = _environment(), np.random.default_rng(seed)
    env.reset(begun("hopper", seed))
    seen, gained = [], 0.0
    for _ in range(env.kind.horizon):
        seen.append(env.last)
        torque = np.clip(weights[:, :11] @ env.last + weights[:, 11] + NOISE * rng.standard_normal(3), -1, 1)
        ended = env.step(Reply(action=torque)).done
        gained -= 1e-3 * float(torque @ torque)
        if ended:
            break
    x = np.stack(seen)
    gained += float(env.env.data.qpos[0]) / 0.008  # a step lasts 8 ms, and is paid its metres a second
    return gained, env.success(), len(seen), np.stack([x.sum(0), (x * x).sum(0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--updates", type=int, default=400)
    args = parser.parse_args()
    rng, weights, best = np.random.default_rng(args.seed), np.zeros((3, 12)), (0.0, np.zeros((3, 12)))
    count, sums, mean, deviation = 0, np.zeros((2, 11)), np.zeros(11), np.ones(11)
    with Pool(args.jobs) as pool:
        for update in range(1, args.updates + 1):
            way = rng.standard_normal((DIRECTIONS, 3, 12))
            seeds = rng.integers(10**6, size=2 * DIRECTIONS)
            tries = [plain(weights + sign * DEVIATION * w, mean, deviation) for w in way for sign in (1, -1)]
            found = pool.map(episode, list(zip(tries, seeds.tolist(), strict=True)), chunksize=1)
            gain = np.array([f[0] for f in found]).reshape(DIRECTIONS, 2)
            top = np.argsort(-gain.max(1))[:BEST]
            weights += (
                RATE / (BEST * gain[top].std() + 1e-8) * np.einsum("n,nij->ij", gain[top, 0] - gain[top, 1], way[top])
            )
            count, sums = count + sum(f[2] for f in found), sums + sum(f[3] for f in found)
            mean = sums[0] / count
            deviation = np.sqrt(np.maximum(sums[1] / count - mean**2, 1e-8))
            if update % 20 == 0:
                held = pool.map(episode, [(plain(weights, mean, deviation), HELD_OUT + i) for i in range(64)])
                solved = sum(h[1] for h in held) / len(held)
                print(f"{update} updates, {count:,} steps: {solved:.0%} succeed", flush=True)
                if solved > best[0]:
                    best = solved, plain(weights, mean, deviation)
    print(json.dumps({"succeed": best[0], "weights": np.round(best[1], 3).tolist()}))


def plain(weights: Array, mean: Array, deviation: Array) -> Array:
    """The same policy of what is observed as it is, not whitened."""
    w = weights[:, :11] / deviation
    return np.concatenate([w, (weights[:, 11] - w @ mean)[:, None]], 1)


if __name__ == "__main__":
    main()
