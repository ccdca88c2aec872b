"""A run's figures as plain data, drawn alike by the live page and by the single file.

A figure is {"id", "title", "read", "traces", "layout"}: traces in Plotly's own form, `read` the sentence that says how
to read it. Colours that depend on the theme are left to the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ..evaluation.calibration import reliability
from ..evaluation.intervals import wilson
from ..types import OUTCOMES
from .reader import RunReader
from .summary import RECENT, Metrics, largest_k

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, without the black that a dark page swallows."""
OUTCOME_COLOURS = dict(
    zip(OUTCOMES, ("#009e73", "#d55e00", "#e69f00", "#cc79a7", "#56b4e9", "#999999", "#666666"), strict=True)
)
POINTS = 1500
"""The most points of a curve; longer ones are thinned."""

CURVES = {
    "reward": ("reward/mean", "Training reward", "reward", "Mean of each step's samples, before the update. Faint: each step; bold: smoothed."),
    "length": ("rollout/mean_tokens", "Response length", "tokens", "Tokens per response. A rise without a rise in accuracy is worth a look."),
    "speed": ("tokens_per_second", "Speed", "tokens/s", "Generated tokens per second of sampling and update together."),
    "ess": ("ratio/ess", "Effective sample size", "share",
            "Of the importance weights: near 1 is on policy; below 0.1 a few samples decide the update."),
    "clip": ("ratio/clip_fraction", "Clipped", "share", "Share of ratios that the clip cut off. The first minibatch of a step has none: its ratio is 1."),
    "kl": ("policy/kl_step", "How far a step moves the policy", "nats per token",
           "KL between the policy that sampled and the policy half-way through the step's updates."),
    "advantage": ("advantage/mean", "Mean advantage", "reward",
                  "Of each step: above 0, most responses are encouraged, right or not. Near 0 where the baseline is the mean reward."),
    "entropy": ("policy/entropy", "Entropy", "nats per token",
                "Of the next token. At 0 while the reward is far from its top, the policy has stopped exploring."),
    "gradient": ("update/grad_norm", "Gradient norm", "norm", "Before it is scaled down to training.max_grad_norm."),
    "gap": ("engine/gap_mean", "Engine and learner apart", "nats per token",
            "Mean difference of their log-probabilities of the same tokens; next to 0 they hold the same weights. With cluster.lag the engine's are older."),
    "memory": ("memory/rss_bytes", "Memory", "GiB", "Of the training process, after each step."),
}  # fmt: skip
"""By name: the metric, the title, its unit, how to read it."""
MONITORED = {
    "read": "Rewarded responses that a monitor objects to, and right answers that need no work or were reached by wrong steps. All should stay low.",
    "monitor/reference": "right whatever the reference",
    "monitor/hidden": "fails hidden tests",
    "monitor/second": "second verifier rejects",
    "monitor/right_with_0pct_of_work": "right without work",
    "eval/right_by_wrong_steps": "right by wrong steps",
}
LENGTHS = {
    "read": "Wrong answers that grow longer than right ones are a known way to be paid for nothing.",
    "text/length_right": "right",
    "text/length_wrong": "wrong",
}
WORKERS = {
    "read": "Processes of a cluster. A rollout worker is stale until it holds the weights of now; lost ones were replaced.",
    "cluster/learners": "learner ranks",
    "cluster/healthy": "rollout workers",
    "cluster/stale": "stale",
    "cluster/starting": "starting",
    "cluster/verifiers": "verifiers",
    "cluster/lost": "lost so far",
}
CALIBRATION = (
    ("critic/ece", "ECE", COLOURS[0]),
    ("critic/brier", "Brier", COLOURS[1]),
    ("eval/critic_ece", "ECE, held-out", COLOURS[2]),
    ("eval/model_ece", "ECE of the confidence that the model states, held-out", COLOURS[3]),
)
SMOOTHED = ("reward", "length", "speed", "advantage")

Figure = dict[str, Any]


# -- figures ---------------------------------------------------------------------------------------------------------


def overview(runs: Sequence[RunReader]) -> list[Figure]:
    """Accuracy with intervals, reward, length and speed, all runs overlaid."""
    accuracy: list[dict[str, Any]] = []
    for run, colour in _coloured(runs):
        x, y, low, high = _accuracy_curve(run)
        if not x:
            continue
        if None not in low and None not in high:
            accuracy.append(_band(x, low, high, colour, run.name))
        accuracy.append({**_line(x, y, run.name, colour), "mode": "lines+markers"})
    read = "On problems that are never trained on; the band is the 95% interval."
    first = _figure("accuracy", "Held-out accuracy", read, accuracy, y="share solved", percent=True)
    return [first, *_diversity(runs), *(_curve(runs, name) for name in ("reward", "length", "speed"))]


def _diversity(runs: Sequence[RunReader]) -> list[Figure]:
    """pass@k (the largest k) and entropy of the evaluations, where there are any."""
    passes: list[dict[str, Any]] = []
    entropies: list[dict[str, Any]] = []
    ks: set[int] = set()
    for run, colour in _coloured(runs):
        x, y = _evaluated(run, "entropy")
        if x:
            entropies.append({**_line(x, y, run.name, colour), "mode": "lines+markers"})
        k = max((k for m in run.metrics() if (k := largest_k(m)) is not None), default=None)
        if k is not None:
            ks.add(k)
            passes.append(
                {**_line(*_evaluated(run, f"pass@{k}"), f"{run.name}, k = {k}", colour), "mode": "lines+markers"}
            )
    out = []
    if passes:
        read = "Problems that one of k responses solves at least. Where it falls while accuracy rises, the policy forgets ways that it knew."
        title = f"Held-out pass@{ks.pop() if len(ks) == 1 else 'k'}"
        out.append(_figure("passes", title, read, passes, y="share solved", percent=True))
    if entropies:
        read = "Of the responses to held-out problems. At 0 the policy always gives the same response."
        out.append(_figure("held-entropy", "Held-out entropy", read, entropies, y="nats per token"))
    return out


def _evaluated(run: RunReader, name: str) -> tuple[list[int], list[float]]:
    """What the evaluations measured, the one before the first step included."""
    points = [(m["step"] + 1, float(m[f"eval/{name}"])) for m in run.metrics() if m.get(f"eval/{name}") is not None]
    if (start := run.start().get(name)) is not None:
        points.insert(0, (0, float(start)))
    return _thin([x for x, _ in points], [y for _, y in points])


def health(runs: Sequence[RunReader]) -> list[Figure]:
    """Figures that show whether updates and verifier are healthy."""
    metrics = runs[0].metrics()
    before, after = ("ess", "clip", "kl", "entropy", "advantage", "gradient", "gap"), ("memory",)
    return [
        _outcomes(metrics),
        _several(metrics, "monitors", "What the monitors see", "share", MONITORED),
        _several(metrics, "workers", "Workers", "processes", WORKERS),
        _several(metrics, "lengths", "Length of right and wrong responses", "tokens", LENGTHS),
        *(_curve(runs, n) for n in before),
        _phases(metrics),
        *(_curve(runs, n) for n in after),
    ]


def critic(run: RunReader) -> list[Figure]:
    """Figures of the critic's calibration."""
    value, correct = _predictions(run)
    traces: list[dict[str, Any]] = [
        {
            "x": [0, 1],
            "y": [0, 1],
            "mode": "lines",
            "name": "perfect",
            "line": {"dash": "dot", "width": 1, "color": "#888888"},
            "hoverinfo": "skip",
        }
    ]
    if len(value):
        bins = reliability(correct, value)
        x, y = [b.predicted for b in bins], [b.observed for b in bins]
        ends = [wilson(b.observed * b.count, b.count) for b in bins]
        traces.append(
            {
                "x": x, "y": y, "mode": "lines+markers", "name": "observed", "line": {"color": COLOURS[0]},
                "marker": {"size": [6 + 14 * math.sqrt(b.count / len(value)) for b in bins]},
                "text": [f"{b.count} problems" for b in bins],
                "hovertemplate": "predicted %{x:.0%}, solved %{y:.0%}<br>%{text}<extra></extra>",
                "error_y": {
                    "type": "data", "symmetric": False, "thickness": 1, "color": COLOURS[0],
                    "array": [h - o for o, (_, h) in zip(y, ends, strict=True)], "arrayminus": [o - low for o, (low, _) in zip(y, ends, strict=True)],
                },
            }
        )  # fmt: skip
    metrics = run.metrics()
    errors = [
        {**_line(*_xy(metrics, key), name, colour), "mode": "lines+markers" if key.startswith("eval") else "lines"}
        for key, name, colour in CALIBRATION
        if _xy(metrics, key)[0]
    ]
    explained = [_line(*_xy(metrics, "critic/explained_variance"), "explained", COLOURS[0])]
    ceiling = _xy(metrics, "critic/ev_ceiling")
    if ceiling[0]:
        explained.append({**_line(*ceiling, "ceiling of a perfect critic", COLOURS[4]), "mode": "lines+markers"})
    counts, edges = np.histogram(value, bins=20, range=(0, 1))
    bars = [{"type": "bar", "x": ((edges[:-1] + edges[1:]) / 2).tolist(), "y": counts.tolist(), "width": 0.048, "marker": {"color": COLOURS[0]},
             "hovertemplate": "%{y} problems near %{x:.0%}<extra></extra>"}]  # fmt: skip
    recent = f"the last {min(RECENT, len(metrics))} steps, predicted before their outcomes were seen"
    return [
        _figure("reliability", "Reliability",
                f"Of problems predicted to be solved with a chance of x, the share that was; on the dotted line predictions are exact. Of {recent}.",
                traces, x="predicted chance", y="share solved", percent=True, square=True),
        _figure("calibration", "Calibration error",
                "Smaller is better. ECE: how far predictions lie from what happens; Brier: mean squared error.", errors, y="error"),
        _figure("explained", "Explained variance",
                "Share of the outcomes' spread that the prompt alone predicted; even a perfect critic stays below its ceiling.", explained, y="share"),
        _figure("solvability", "How solvable are the problems?",
                f"Predicted chances of {recent}. Mass at both ends teaches little; the middle is where learning is.",
                bars, x="predicted chance", y="problems", xpercent=True),
    ]  # fmt: skip


def extremes(run: RunReader, count: int = 8) -> dict[str, list[dict[str, Any]]]:
    """The prompts of the last steps that the critic thinks hardest and easiest."""
    table = run.rollouts.recent(RECENT)
    recent = table.filter(pc.is_valid(table["value"])).sort_by("value")
    chosen = {
        "hardest": recent.slice(0, count).to_pylist(),
        "easiest": recent.slice(max(0, recent.num_rows - count), count).to_pylist()[::-1],
    }
    for rows in chosen.values():
        run.rollouts.with_texts(rows)
    return chosen


# -- pieces ----------------------------------------------------------------------------------------------------------


def _coloured(runs: Sequence[RunReader]) -> list[tuple[RunReader, str]]:
    return [(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)]


def _accuracy_curve(run: RunReader) -> tuple[list[int], list[float], list[Any], list[Any]]:
    start, points = run.start(), [m for m in run.metrics() if m.get("eval/accuracy") is not None]
    x, y = [m["step"] + 1 for m in points], [m["eval/accuracy"] for m in points]
    low, high = [m.get("eval/low") for m in points], [m.get("eval/high") for m in points]
    if start.get("accuracy") is not None:
        x, y, low, high = [0, *x], [start["accuracy"], *y], [start.get("low"), *low], [start.get("high"), *high]
    return x, y, low, high


def _predictions(run: RunReader) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, outcome) of the graded rollouts of the last steps."""
    table = run.rollouts.recent(RECENT)
    table = table.filter(pc.is_valid(table["surprise"]))
    return table["value"].to_numpy(), table["correct"].to_numpy()


def _curve(runs: Sequence[RunReader], name: str) -> Figure:
    """One metric over the steps of every run. Noisy ones are drawn faint, and smoothed on top."""
    key, title, unit, read = CURVES[name]
    traces = []
    for run, colour in _coloured(runs):
        xs, ys = _xy(run.metrics(), key)
        if unit == "GiB":
            ys = [y / 2**30 for y in ys]
        if name in SMOOTHED and len(ys) > RECENT:
            traces.append(
                {**_line(xs, ys, run.name, colour), "opacity": 0.25, "showlegend": False, "hoverinfo": "skip"}
            )
            ys = _smoothed(ys)
        if ys:
            traces.append(_line(xs, ys, run.name, colour))
    return _figure(name, title, read, traces, y=unit)


def _several(metrics: Metrics, name: str, title: str, unit: str, named: dict[str, str]) -> Figure:
    """Several metrics of one run in a figure, those that it has."""
    found = [(_xy(metrics, key), label) for key, label in named.items() if key != "read"]
    traces = [
        {**_line(x, y, label, COLOURS[i % len(COLOURS)]), "mode": "lines" if len(x) > RECENT else "lines+markers"}
        for i, ((x, y), label) in enumerate(found)
        if x
    ]
    figure = _figure(name, title, named["read"], traces, y=unit)
    figure["layout"]["yaxis"] |= {"tickformat": ".0%"} if unit == "share" else {}
    return figure


def _outcomes(metrics: Metrics) -> Figure:
    traces = []
    for outcome in OUTCOMES:
        key = f"outcome/{outcome}"
        if not any(m.get(key) for m in metrics):
            continue
        shares = [m.get(key, 0) / max(sum(v for k, v in m.items() if k.startswith("outcome/")), 1) for m in metrics]
        x, y = _thin([m["step"] for m in metrics], shares)
        traces.append({"x": x, "y": y, "name": outcome, "stackgroup": "one", "mode": "lines", "line": {"width": 0, "color": OUTCOME_COLOURS[outcome]},
                       "hovertemplate": "%{y:.1%}"})  # fmt: skip
    read = "Shares of each step's samples. A jump in timeouts, crashes or ungradable samples is the verifier's, not the policy's."
    return _figure("outcomes", "What the verifier said", read, traces, y="share", percent=True)  # fmt: skip


def _phases(metrics: Metrics) -> Figure:
    names = sorted({k for m in metrics for k in m if k.startswith("seconds/")})
    traces = []
    for i, key in enumerate(names):
        x, y = _thin([m["step"] for m in metrics], [m.get(key, 0.0) for m in metrics])
        traces.append({"x": x, "y": y, "name": key.removeprefix("seconds/"), "stackgroup": "one", "mode": "lines",
                       "line": {"width": 0, "color": COLOURS[i % len(COLOURS)]}, "hovertemplate": "%{y:.2f} s"})  # fmt: skip
    return _figure("phases", "Where the time goes", "Seconds of each step.", traces, y="seconds")


def _xy(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    points = [(m["step"], float(m[key])) for m in metrics if m.get(key) is not None]
    return _thin([x for x, _ in points], [y for _, y in points])


def _thin(x: list[int], y: list[float]) -> tuple[list[int], list[float]]:
    every = max(1, len(x) // POINTS)
    return x[::every], y[::every]


def _smoothed(values: list[float]) -> list[float]:
    """A running mean over a twentieth of the curve, shorter at its ends."""
    width = max(3, len(values) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - width // 2, 0)
    high = np.minimum(np.arange(len(values)) + width // 2 + 1, len(values))
    return [float(v) for v in (total[high] - total[low]) / (high - low)]


def _line(x: list[int], y: list[float], name: str, colour: str) -> dict[str, Any]:
    return {"x": x, "y": y, "name": name, "mode": "lines", "line": {"color": colour, "width": 2}}


def _band(x: list[int], low: list[Any], high: list[Any], colour: str, name: str) -> dict[str, Any]:
    return {"x": [*x, *x[::-1]], "y": [*high, *low[::-1]], "fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0},
            "mode": "lines", "name": name, "showlegend": False, "hoverinfo": "skip"}  # fmt: skip


def _figure(
    name: str,
    title: str,
    read: str,
    traces: list[dict[str, Any]],
    *,
    x: str = "step",
    y: str = "",
    percent: bool = False,
    xpercent: bool = False,
    square: bool = False,
) -> Figure:
    layout: dict[str, Any] = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y, "standoff": 10}}}
    if percent:
        layout["yaxis"] |= {"tickformat": ".0%", "range": [-0.02, 1.04] if square else [0, 1.02]}
    if square or xpercent:
        layout["xaxis"] |= {"tickformat": ".0%", "range": [-0.04, 1.04]}
    shown = [t for t in traces if len(t.get("x", ())) and t.get("hoverinfo") != "skip"]
    layout["showlegend"] = len({t.get("name") for t in shown if t.get("name")}) > 1
    return {"id": name, "title": title, "read": read, "traces": traces if shown else [], "layout": layout}
