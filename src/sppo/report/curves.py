"""A comparison for people: a table in Markdown, and learning curves with bands as a figure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..evaluation.compare import Curve
from ..files import read_bytes, read_json, readable

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's palette, which colour-blind readers can distinguish."""

STEP_MEANS = {
    "advantage/mean": "mean_advantage",
    "advantage/variance": "advantage_variance",
    "update/grad_variance": "gradient_variance",
    "update/grad_signal": "gradient_signal",
    "ratio/ess": "ess",
    "ratio/clip_fraction": "clip_fraction",
    "critic/explained_variance": "explained_variance",
}
ENDS = r"eval/(entropy|pass@(?!1$)\d+)"
"""What is reported of the last evaluation besides accuracy, which is pass@1."""


def read_curve(run: Path) -> Curve:
    """The learning curve of a finished run's directory. Raises UserError when it holds none."""
    tokens, seconds, accuracy = [0.0], [0.0], list[float]()
    spent = used = 0.0
    with readable(f"{run} holds no finished run that can be read", UserError):
        summary = read_json(run / "summary.json")
        steps = [json.loads(line) for line in read_bytes(run / "metrics.jsonl").decode().split("\n") if line]
        accuracy.append(float(summary["accuracy_before"]))
        for m in steps:
            spent += m["rollout/tokens"] + m["rollout/beside_tokens"]
            used += sum(v for k, v in m.items() if k.startswith("seconds/"))
            if m.get("eval/accuracy") is not None:
                tokens.append(spent)
                seconds.append(used)
                accuracy.append(float(m["eval/accuracy"]))
    means = {short: _mean([m.get(long) for m in steps]) for long, short in STEP_MEANS.items()}
    last: dict[str, Any] = next((m for m in reversed(steps) if m.get("eval/accuracy") is not None), {})
    known = {key.removeprefix("eval/"): value for key, value in last.items() if re.fullmatch(ENDS, key)}
    return Curve(tokens, seconds, accuracy, means, known)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def table(result: Mapping[str, Any]) -> str:
    """The comparison as Markdown tables, one row per algorithm: what the target cost, where the runs ended, and
    differences on the same seeds."""
    target, algorithms = result["target"], result["algorithms"]
    unit, letter = (1e6, "M") if result["equal_tokens"] >= 1e5 else (1e3, "k")
    costs = [
        [
            "algorithm",
            f"reached {target:.2f}",
            f"tokens to {target:.2f}",
            f"seconds to {target:.2f}",
            "collapsed",
            "failed",
        ]
    ]
    last = sorted({k for a in algorithms.values() for k in a if k.startswith("pass@")}, key=lambda k: int(k[5:]))[-1:]
    beside = [k for k in ("entropy", *last) if any(k in a for a in algorithms.values())]
    ends = [
        [
            "algorithm",
            f"accuracy at {result['equal_tokens'] / unit:.2f}{letter} tokens",
            "mean on the way",
            "mean Â",
            *beside,
        ]
    ]
    for name, a in algorithms.items():
        tokens, seconds = _cell(a["tokens_to_target"], unit, "{:.2f}" + letter), _cell(a["time_to_target"], 1, "{:.0f}")
        costs.append(
            [
                name,
                f"{a['reached']} of {len(a['seeds']) + a['failed']}",
                tokens,
                seconds,
                str(a["collapses"]),
                str(a["failed"]),
            ]
        )
        mean = a.get("mean_advantage")
        shown = ["–" if k not in a else f"{a[k]['value']:.3f}" for k in beside]
        accuracy, area = (_cell(a[k], 1, "{:.3f}") for k in ("final_accuracy", "area"))
        ends.append([name, accuracy, area, "–" if mean is None else f"{mean:+.3f}", *shown])
    tables = [costs, ends]
    compared = [(name, a["against"]) for name, a in algorithms.items() if "against" in a]
    if compared:
        first = next(iter(compared[0][1]))
        pairs = [[f"against {first}", "tokens, ratio", "seconds, ratio", "seeds", "missed", "accuracy, difference"]]
        for name, against in compared:
            pair = against[first]
            ratios = ["–" if pair[k] is None else _cell(pair[k], 1, "{:.2f}") for k in ("tokens_ratio", "time_ratio")]
            seeds, missed = (
                f"{pair['tokens_ratio_pairs']} of {pair['seeds']}",
                "–".join(map(str, pair["tokens_ratio_missed"])),
            )
            pairs.append([name, *ratios, seeds, missed, _cell(pair["accuracy_difference"], 1, "{:+.3f}")])
        tables.append(pairs)
    return "\n\n".join(map(_markdown, tables)) + "\n"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows with columns that line up, the first one the heading."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(n) for cell, n in zip(row, wide, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * n for n in wide) + " |", *lines[1:]])


def _cell(interval: Mapping[str, float | None], unit: float, form: str) -> str:
    shown = ["–" if interval[k] is None else form.format(interval[k] / unit) for k in ("value", "low", "high")]  # type: ignore[operator]
    alone = interval["low"] is None and interval["high"] is None
    return shown[0] if alone else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def figure(curves: Mapping[str, Sequence[Curve]], target: float, path: Path) -> None:
    """Mean accuracy against tokens and against seconds, the band from the lowest to the highest seed.

    Raises UserError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install 'sppo[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, cost, label, unit in zip(
        axes, ("tokens", "seconds"), ("generated tokens (millions)", "seconds of training"), (1e6, 1.0), strict=True
    ):
        for i, (name, runs) in enumerate(curves.items()):
            end = min(getattr(c, cost)[-1] for c in runs)
            grid = np.linspace(0, end, 200)
            lines = np.stack([np.interp(grid, getattr(c, cost), c.accuracy) for c in runs])
            colour, style = COLOURS[i % len(COLOURS)], ("-", "--", "-.", ":")[i // len(COLOURS) % 4]
            axis.plot(grid / unit, lines.mean(0), style, color=colour, label=name, linewidth=1.8)
            axis.fill_between(grid / unit, lines.min(0), lines.max(0), color=colour, alpha=0.12, linewidth=0)
        axis.axhline(target, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("held-out accuracy")
    axes[0].legend(frameon=False, fontsize=9)
    seeds = max(len(runs) for runs in curves.values())
    shown.suptitle(f"mean and range over {seeds} seeds; dotted: the target, {target:.2f}", fontsize=10)
    shown.savefig(path)
    plt.close(shown)
