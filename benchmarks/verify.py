"""Math verdicts a second, in worker processes, against judging in this process; and a batch with one value that is beyond computing.

Interleaved, so that both see the same machine. Last line: one JSON object. `make bench-verify`
"""

from __future__ import annotations

import json
import random
import statistics
import time

from sppo.rewards.math import build, judge_one
from sppo.types import Rollout, Task

HANGS = "$9^{9^{9^{9}}}$"


def problems(n: int, seed: int) -> list[Rollout]:
    """Answers of the kinds that occur: integers, fractions, roots, polynomials; half of them right."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        gold = [f"{a}", f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{b}}}", f"{a}x^2+{b}x"][i % 4]
        said = gold if rng.random() < 0.5 else gold.replace(str(a), str(a + 1), 1)
        task = Task(str(i), "", {"answer": gold})
        out.append(Rollout.answer(task, [], [], [], "stop", f"So the answer is $\\boxed{{{said}}}$."))
    return out


def main() -> None:
    n, rounds = 400, 5
    reward = build(limit=5.0, workers=2)
    warm = problems(40, 0)
    reward.judge(warm)
    for r in warm:
        judge_one({"gold": r.task.columns["answer"], "response": r.text})
    ours, theirs, agree = [], [], True
    for seed in range(1, rounds + 1):
        rollouts = problems(n, seed)
        began = time.perf_counter()
        verdicts = reward.judge(rollouts)
        ours.append(n / (time.perf_counter() - began))
        began = time.perf_counter()
        plain = [judge_one({"gold": r.task.columns["answer"], "response": r.text})["outcome"] for r in rollouts]
        theirs.append(n / (time.perf_counter() - began))
        agree &= plain == [v.outcome for v in verdicts]
    limited = build(limit=2.0, workers=2)
    limited.judge(warm)
    began = time.perf_counter()
    task = Task("hang", "", {"answer": "1"})
    mixed = limited.judge([*problems(40, 99), Rollout.answer(task, [], [], [], "stop", f"\\boxed{{{HANGS[1:-1]}}}")])
    hanging = time.perf_counter() - began
    reward.close()
    limited.close()
    result = {
        "verdicts_per_s": round(statistics.median(ours), 1),
        "in_process_per_s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(o / t for o, t in zip(ours, theirs, strict=True)), 3),
        "same_verdicts": agree,
        "hanging_batch_s": round(hanging, 2),
        "hanging_outcome": mixed[-1].outcome,
        "limit_s": 2.0,
    }
    print(
        f"isolated {result['verdicts_per_s']}/s, in-process {result['in_process_per_s']}/s: {result['ratio']} of its speed"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
