"""Learning curves of several algorithms on paired seeds, and what can be said of them: costs to a target, accuracy at equal cost.

Pure numbers: a curve is read from a run's metrics by whoever owns run directories. Intervals are percentile bootstraps over
seeds (10,000 resamples with a fixed generator), so they speak of seeds, not of the held-out problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 10_000
COLLAPSE, BELOW = 0.5, 0.05
"""A run collapsed when it ends below half of the best that it reached, or by so much below its start."""


@dataclass(frozen=True)
class Curve:
    """One run: held-out accuracy after so many generated tokens and seconds of training (evaluation outside the clock)."""

    tokens: Sequence[float]
    seconds: Sequence[float]
    accuracy: Sequence[float]
    means: Mapping[str, float | None] = field(default_factory=dict)
    """Means over steps of metrics that are reported beside."""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.seconds) == len(self.accuracy) > 0:
            raise ValueError("a curve needs as many costs as accuracies, and at least one")


def cost_to(cost: Sequence[float], accuracy: Sequence[float], target: float) -> float:
    """The cost at which a curve first reaches the target, between two evaluations by a straight line; ∞ when it never does."""
    for i, a in enumerate(accuracy):
        if a >= target:
            if i == 0:
                return float(cost[0])
            before = accuracy[i - 1]
            return float(cost[i - 1] + (cost[i] - cost[i - 1]) * (target - before) / (a - before))
    return math.inf


def value_at(cost: Sequence[float], accuracy: Sequence[float], budget: float) -> float:
    """The accuracy when so much was spent, by straight lines between evaluations."""
    return float(np.interp(budget, cost, accuracy))


def area_under(cost: Sequence[float], accuracy: Sequence[float], budget: float) -> float:
    """The mean accuracy over everything spent up to the budget."""
    inside = [(c, a) for c, a in zip(cost, accuracy, strict=True) if c < budget]
    inside.append((budget, value_at(cost, accuracy, budget)))
    if len(inside) == 1:
        return inside[0][1]
    x, y = zip(*inside, strict=True)
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def collapsed(accuracy: Sequence[float]) -> bool:
    """Whether a run lost what it had."""
    return len(accuracy) > 1 and (accuracy[-1] < accuracy[0] - BELOW or accuracy[-1] < COLLAPSE * max(accuracy))


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float, float]:
    """(statistic, low, high): 95% percentile interval over resamples of the values; `statistic` reduces the last axis. ∞ is a value."""
    x = np.asarray(values, dtype=float)
    rng = np.random.Generator(np.random.Philox(key=20260423))
    drawn = statistic(x[rng.integers(0, len(x), (RESAMPLES, len(x)))])
    ordered = np.sort(drawn)  # ∞ sorts last; a quantile between two numbers would be NaN there
    low, high = ordered[int(0.025 * RESAMPLES)], ordered[int(0.975 * RESAMPLES) - 1]
    return float(statistic(x)), float(low), float(high)


def middle(x: np.ndarray) -> np.ndarray:
    """The median over the last axis; the upper of the two middle values when there are two, so that ∞ stays one."""
    return np.sort(x, axis=-1)[..., x.shape[-1] // 2]


def geometric_mean(x: np.ndarray) -> np.ndarray:
    """Of ratios."""
    return np.exp(np.log(x).mean(-1))


def mean(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return x.mean(-1)


def _interval(values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, float | None]:
    numbers = zip(("value", "low", "high"), bootstrap(values, statistic), strict=True)
    return {name: x if math.isfinite(x) else None for name, x in numbers}


def compare(curves: Mapping[str, Mapping[int, Curve]], target: float) -> dict[str, Any]:
    """What the runs show, as plain numbers; `curves[algorithm][seed]`.

    For each algorithm: `tokens_to_target`, `time_to_target` (medians; null where not reached, `reached` says in how many runs),
    `final_accuracy`, `area` (means, both at the largest number of tokens that every run generated), `collapses`. `against` compares with
    the first algorithm on the seeds that both have: ratios of costs where both reached the target, differences of accuracy.
    """
    budget = min(c.tokens[-1] for runs in curves.values() for c in runs.values())
    out: dict[str, Any] = {"target": target, "equal_tokens": budget, "algorithms": {}}
    finals: dict[str, dict[int, float]] = {}
    first = next(iter(curves))
    for name, runs in curves.items():
        finals[name] = {seed: value_at(c.tokens, c.accuracy, budget) for seed, c in runs.items()}
        tokens = [cost_to(c.tokens, c.accuracy, target) for c in runs.values()]
        seconds = [cost_to(c.seconds, c.accuracy, target) for c in runs.values()]
        metrics = sorted({key for c in runs.values() for key in c.means})
        out["algorithms"][name] = {
            "seeds": sorted(runs),
            "reached": sum(map(math.isfinite, tokens)),
            "tokens_to_target": _interval(tokens, middle),
            "time_to_target": _interval(seconds, middle),
            "final_accuracy": _interval(list(finals[name].values()), mean),
            "area": _interval([area_under(c.tokens, c.accuracy, budget) for c in runs.values()], mean),
            "seconds": _interval([c.seconds[-1] for c in runs.values()], mean),
            "tokens": _interval([c.tokens[-1] for c in runs.values()], mean),
            "collapses": sum(collapsed(c.accuracy) for c in runs.values()),
            **{key: _mean_of([c.means.get(key) for c in runs.values()]) for key in metrics},
            "per_seed": {
                str(seed): {
                    "final_accuracy": finals[name][seed],
                    "tokens_to_target": _finite(cost_to(c.tokens, c.accuracy, target)),
                    "time_to_target": _finite(cost_to(c.seconds, c.accuracy, target)),
                }
                for seed, c in sorted(runs.items())
            },
        }
    for name, runs in curves.items():
        shared = sorted(set(runs) & set(curves[first]))
        if name == first or not shared:
            continue
        against: dict[str, Any] = {"seeds": len(shared)}
        for key, cost in (("tokens_ratio", "tokens"), ("time_ratio", "seconds")):
            pairs = [
                (cost_to(getattr(run, cost), run.accuracy, target) for run in (runs[s], curves[first][s]))
                for s in shared
            ]
            both = [a / b for a, b in map(tuple, pairs) if math.isfinite(a) and math.isfinite(b) and b > 0]
            against[key] = _interval(both, geometric_mean) if both else None
            against[f"{key}_pairs"] = len(both)
        against["accuracy_difference"] = _interval([finals[name][s] - finals[first][s] for s in shared], mean)
        out["algorithms"][name]["against"] = {first: against}
    return out


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
