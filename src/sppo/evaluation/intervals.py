"""Intervals and estimators that hold for few problems and few samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927); stays in [0, 1], also for shares of 0 and 1. n = 0: (0, 1)."""
    if n <= 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_interval(task_means: Sequence[float], samples: int) -> tuple[float, float, float]:
    """(accuracy, low, high) over problems with `samples` responses each.

    One response per problem: Wilson's interval. Several: responses to one problem are not independent, so Wilson's
    interval with the effective number of responses p(1−p)/Var(mean), estimated from the spread between problems.
    """
    n = len(task_means)
    if n == 0:
        return float("nan"), 0.0, 1.0
    p = sum(task_means) / n
    effective = float(n)
    if samples > 1 and n > 1 and 0 < p < 1:
        variance = sum((m - p) ** 2 for m in task_means) / (n - 1) / n
        effective = min(max(p * (1 - p) / variance, n), n * samples) if variance > 0 else n * samples
    low, high = wilson(p * effective, effective)
    return p, low, high


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased chance that one of k of n samples is correct: 1 − C(n−c, k)/C(n, k) (arXiv 2107.03374)."""
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod((n - correct - i) / (n - i) for i in range(k))
