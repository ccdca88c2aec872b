"""How much a measured speed-up wobbles: the same program against the same reference, again and again. `make bench-runtime`

Last line: one JSON object with `noise`: the standard deviation of the measured speed-up over its mean, for each program.
"""

from __future__ import annotations

import json
import statistics
import time

from sppo.rewards.loading import load_reward
from sppo.types import Rollout, Task

N = 400_000
REFERENCE = "def f(n):\n    total = 0\n    for i in range(n):\n        total += i % 3\n    return total"
PROGRAMS = {
    "the same": REFERENCE,
    "two sums": "def f(n):\n    return sum(i % 3 for i in range(0, n * 3 // 4)) + sum(i % 3 for i in range(n * 3 // 4, n))",
    "half the loop, twice the work": REFERENCE.replace("range(n)", "range(n // 2)").replace(
        "i % 3", "i % 3 + (i + n // 2) % 3"
    ),
}
REPEATS = 25


def main() -> None:
    value = sum(i % 3 for i in range(N))
    task = Task(
        "t", "?", {"entry_point": "f", "tests": [{"args": [N], "expected": value}], "reference": REFERENCE}
    )  # fmt: skip
    reward = load_reward("runtime:cap=100,slots=1")
    result: dict[str, object] = {}
    noise = {}
    for name, program in PROGRAMS.items():
        rollout = Rollout.answer(task, [], [], [], "stop", program)
        began = time.perf_counter()
        verdicts = [reward.judge([rollout])[0] for _ in range(REPEATS)]
        seconds = (time.perf_counter() - began) / REPEATS
        assert all(v.outcome == "correct" for v in verdicts), verdicts[0]
        speedups = [v.evidence["speedup"] for v in verdicts]
        mean, spread = statistics.mean(speedups), statistics.stdev(speedups)
        noise[name] = round(spread / mean, 4)
        print(
            f"{name:<30} speed-up {mean:.3f} ± {spread:.3f} ({100 * spread / mean:.1f}%)   {1000 * seconds:.0f} ms a verdict"
        )
        result |= {"by": verdicts[0].evidence["by"], "pairs": verdicts[0].evidence["pairs"]}
    reward.close()
    result |= {"noise": noise, "worst": max(noise.values()), "repeats": REPEATS}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
