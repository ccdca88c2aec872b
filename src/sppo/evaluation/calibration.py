"""Calibration of stated chances: reliability, calibration error, Brier score, and accuracy under abstention.

The same numbers for any predictor of success: the critic's V(x), or a confidence that the model itself writes. Sources:
reliability diagrams and ECE, Guo et al. 2017 (arXiv 1706.04599 eq. 3); Brier 1950; risk and coverage, El-Yaniv and
Wiener 2010, Geifman and El-Yaniv 2017 (arXiv 1705.08500).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

COVERAGES = (0.5, 0.8, 0.9)
"""Shares of the problems that a selective predictor still answers."""


@dataclass(frozen=True)
class Bin:
    """Predictions that lie close to each other: their mean, the mean outcome, how many."""

    predicted: float
    observed: float
    count: int


def reliability(correct: ArrayLike, predicted: ArrayLike, bins: int = 10) -> list[Bin]:
    """Equal-width bins of the predicted chance, empty ones left out. [n], [n] → at most `bins`."""
    c, q = _pair(correct, predicted)
    index = np.clip((q * bins).astype(int), 0, bins - 1)
    return [
        Bin(float(q[inside].mean()), float(c[inside].mean()), int(inside.sum()))
        for b in range(bins)
        if (inside := index == b).any()
    ]


def calibration(correct: ArrayLike, predicted: ArrayLike) -> dict[str, Any]:
    """`n`, `ece` (10 equal-width bins), `brier`, `auc`, `mean_predicted`, `accuracy`, and of abstaining where the
    prediction is lowest: `selective_accuracy` at some coverages, `aurc` (the mean risk over all coverages, 0 is
    perfect) and `aurc_oracle`, what a predictor that knew the outcomes would have. None for what cannot be measured.
    [n], [n] of numbers in [0, 1]."""
    c, q = _pair(correct, predicted)
    n = len(c)
    if n == 0:
        return {"n": 0, "ece": None, "brier": None, "auc": None, "mean_predicted": None, "accuracy": None,
                "selective_accuracy": {}, "aurc": None, "aurc_oracle": None}  # fmt: skip
    risk = _risks(c, q)
    return {
        "n": n,
        "ece": float(sum(abs(b.predicted - b.observed) * b.count for b in reliability(c, q)) / n),
        "brier": float(((q - c) ** 2).mean()),
        "auc": _auc(c >= 0.5, q),
        "mean_predicted": float(q.mean()),
        "accuracy": float(c.mean()),
        "selective_accuracy": {f"{share:g}": 1 - float(risk[max(1, round(share * n)) - 1]) for share in COVERAGES},
        "aurc": float(risk.mean()),
        "aurc_oracle": float(_risks(c, c).mean()),
    }


def _risks(c: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean error of the k surest predictions, for every k.

    Equal predictions each count with their mean error, whatever their order.
    """
    order = np.argsort(-q, kind="stable")
    wrong, level = 1 - c[order], q[order]
    starts = np.flatnonzero(np.r_[True, level[1:] != level[:-1]])
    sizes = np.diff(np.r_[starts, len(c)])
    even = np.repeat(np.add.reduceat(wrong, starts) / sizes, sizes)
    return np.asarray(np.cumsum(even) / np.arange(1, len(c) + 1))


def _auc(right: NDArray[np.bool_], q: NDArray[np.float64]) -> float | None:
    """The chance that a solved problem was given a higher prediction than an unsolved one (ties count half)."""
    good, bad = int(right.sum()), int((~right).sum())
    if not good or not bad:
        return None
    _, inverse, counts = np.unique(q, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((rank[right].sum() - good * (good + 1) / 2) / (good * bad))


def _pair(
    correct: ArrayLike, predicted: ArrayLike | Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    c, q = np.asarray(correct, dtype=float), np.asarray(predicted, dtype=float)
    if c.shape != q.shape or c.ndim != 1:
        raise ValueError(f"as many predictions as outcomes are needed, got {q.shape} and {c.shape}")
    return c, q
