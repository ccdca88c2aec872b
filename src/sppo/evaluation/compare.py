"""Compares learning curves of several algorithms on paired seeds: cost to a target, accuracy at equal cost.

Pure numbers: report/curves.py reads curves from run directories. Intervals are over seeds, not over the held-out
problems: Student's, because a percentile bootstrap of five seeds that claims 95% holds the truth in 83% of cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""Student's t, 97.5%, for 1 to 20 degrees of freedom."""
COLLAPSE, BELOW = 0.5, 0.05
"""A run collapsed when it ends below COLLAPSE of its best accuracy, or more than BELOW under its start."""


@dataclass(frozen=True)
class Curve:
    """One run: held-out accuracy against generated tokens and seconds of training (evaluations excluded)."""

    tokens: Sequence[float]
    seconds: Sequence[float]
    accuracy: Sequence[float]
    means: Mapping[str, float | None] = field(default_factory=dict)
    """Means over steps of further metrics."""
    ends: Mapping[str, float | None] = field(default_factory=dict)
    """Entropy and pass@k of the last evaluation."""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.seconds) == len(self.accuracy) > 0:
            raise ValueError("a curve needs as many costs as accuracies, and at least one")


def cost_to(cost: Sequence[float], accuracy: Sequence[float], target: float) -> float:
    """The cost at which a curve first reaches the target, interpolated linearly between evaluations; ∞ when it never
    does."""
    for i, a in enumerate(accuracy):
        if a >= target:
            if i == 0:
                return float(cost[0])
            before = accuracy[i - 1]
            return float(cost[i - 1] + (cost[i] - cost[i - 1]) * (target - before) / (a - before))
    return math.inf


def value_at(cost: Sequence[float], accuracy: Sequence[float], budget: float) -> float:
    """The accuracy at a cost of `budget`, interpolated linearly between evaluations."""
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
    """Whether a run lost its accuracy."""
    return len(accuracy) > 1 and (accuracy[-1] < accuracy[0] - BELOW or accuracy[-1] < COLLAPSE * max(accuracy))


def mean_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean with Student's 95% interval; no interval for a single value."""
    x = np.asarray(values, dtype=float)
    if len(x) == 0:
        return {"value": None, "low": None, "high": None}
    value = float(x.mean())
    if len(x) == 1:
        return {"value": value, "low": None, "high": None}
    wide = students_t(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return {"value": value, "low": value - wide, "high": value + wide}


def ratio_interval(ratios: Sequence[float]) -> dict[str, float | None]:
    """The geometric mean with Student's 95% interval of the logarithms."""
    found = mean_interval([math.log(x) for x in ratios])
    return {key: None if x is None else math.exp(x) for key, x in found.items()}


def median_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The median (the upper of the middle two) and order statistics that hold it with 95% confidence: of five values or
    fewer the lowest and the highest, which hold it with 94% and less; no interval for a single value. Values may be ∞,
    given as null."""
    x = sorted(values)
    if len(x) == 1:
        return {"value": _finite(x[0]), "low": None, "high": None}
    k, below = 0, 0.5 ** len(x)  # the chance that at most k values lie below the median
    while 2 * (more := below + math.comb(len(x), k + 1) * 0.5 ** len(x)) <= 0.05:
        k, below = k + 1, more
    return {key: _finite(x[i]) for key, i in (("value", len(x) // 2), ("low", k), ("high", len(x) - 1 - k))}


def students_t(degrees: int) -> float:
    """The 97.5% quantile of Student's t."""
    return T_975[degrees - 1] if degrees <= len(T_975) else 1.96 + 2.4 / degrees


def compare(runs_of: Mapping[str, Mapping[int, Curve | None]], target: float) -> dict[str, Any]:
    """The comparison as plain numbers. `runs_of[algorithm][seed]`, None for a run that failed: it never reached the
    target.

    For each algorithm: `tokens_to_target`, `time_to_target` (medians; null where not reached, `reached` says in how
    many runs), `final_accuracy`, `area` (means, both at the largest number of tokens that every run generated),
    `collapses`, `failed`, the curves' `means` (means over seeds), and of their `ends` those that any run has (means
    with intervals). `against` compares with the first algorithm on the seeds that both have: ratios of costs where both
    reached the target (`…_missed`: in how many of the other seeds this one did not, and the first one did not),
    differences of accuracy.
    """
    curves = {name: {seed: c for seed, c in runs.items() if c is not None} for name, runs in runs_of.items()}
    budget = min(c.tokens[-1] for runs in curves.values() for c in runs.values())
    first = next(iter(curves))
    algorithms = {}
    for name, runs in curves.items():
        algorithms[name] = _alone(runs, len(runs_of[name]) - len(runs), target, budget)
        if name != first and set(runs) & set(curves[first]):
            algorithms[name]["against"] = {first: _against(runs, curves[first], target, budget)}
    return {"target": target, "equal_tokens": budget, "algorithms": algorithms}


def _alone(runs: Mapping[int, Curve], failed: int, target: float, budget: float) -> dict[str, Any]:
    """The figures of one algorithm; `failed` further runs count as never reaching the target."""
    curves = [runs[seed] for seed in sorted(runs)]
    never = [math.inf] * failed
    finals = [value_at(c.tokens, c.accuracy, budget) for c in curves]
    tokens = [cost_to(c.tokens, c.accuracy, target) for c in curves]
    seconds = [cost_to(c.seconds, c.accuracy, target) for c in curves]
    metrics = sorted({key for c in curves for key in c.means})
    ends = sorted({key for c in curves for key in c.ends})
    return {
        "seeds": sorted(runs),
        "failed": failed,
        "reached": sum(map(math.isfinite, tokens)),
        "tokens_to_target": median_interval(tokens + never),
        "time_to_target": median_interval(seconds + never),
        "final_accuracy": _share(mean_interval(finals)),
        "area": _share(mean_interval([area_under(c.tokens, c.accuracy, budget) for c in curves])),
        "seconds": mean_interval([c.seconds[-1] for c in curves]),
        "tokens": mean_interval([c.tokens[-1] for c in curves]),
        "collapses": sum(collapsed(c.accuracy) for c in curves),
        **{key: _mean_of([c.means.get(key) for c in curves]) for key in metrics},
        **{key: mean_interval(known) for key in ends if (known := _known([c.ends.get(key) for c in curves]))},
        "per_seed": {
            str(seed): {"final_accuracy": final, "tokens_to_target": _finite(t), "time_to_target": _finite(s)}
            for seed, final, t, s in zip(sorted(runs), finals, tokens, seconds, strict=True)
        },
    }


def _against(runs: Mapping[int, Curve], first: Mapping[int, Curve], target: float, budget: float) -> dict[str, Any]:
    """An algorithm's runs against the first algorithm's, on the seeds that both have."""
    pairs = [(runs[seed], first[seed]) for seed in sorted(set(runs) & set(first))]
    out: dict[str, Any] = {"seeds": len(pairs)}
    for key, cost in (("tokens_ratio", "tokens"), ("time_ratio", "seconds")):
        costs = [[cost_to(getattr(run, cost), run.accuracy, target) for run in pair] for pair in pairs]
        both = [a / b for a, b in costs if math.isfinite(a) and math.isfinite(b) and a > 0 and b > 0]
        out[key] = ratio_interval(both) if both else None
        out[f"{key}_pairs"] = len(both)
        missed = [(math.isinf(a) and math.isfinite(b), math.isinf(b) and math.isfinite(a)) for a, b in costs]
        out[f"{key}_missed"] = [sum(column) for column in zip(*missed, strict=True)]
    finals = [[value_at(run.tokens, run.accuracy, budget) for run in pair] for pair in pairs]
    out["accuracy_difference"] = mean_interval([a - b for a, b in finals])
    return out


def _share(interval: dict[str, float | None]) -> dict[str, float | None]:
    """Accuracies lie in [0, 1]; Student's interval does not know."""
    return {key: None if x is None else min(max(x, 0.0), 1.0) for key, x in interval.items()}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]
