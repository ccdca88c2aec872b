"""What a run says in its first ten seconds: a sentence that claims no more than the intervals do, tiles, alerts,
doubts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .progress import clock
from .reader import RunReader

RECENT = 20
"""Steps that count as now."""
Metrics = list[dict[str, Any]]


def summarise(run: RunReader) -> dict[str, Any]:
    """One run as a sentence, a row of tiles and its alerts."""
    metrics, start, alerts, going = run.metrics(), run.start(), run.alerts(), run.running()
    total, done = run.config.training.steps, len(metrics)
    now = _last_evaluation(metrics)
    spent = [_seconds(m) for m in metrics]
    left = float(np.mean(spent[-RECENT:])) * max(total - done, 0) if spent else None
    doubt = _doubt(run, alerts, done)
    count, seen = ("0", "none raised") if watched(run) else ("–", "not watched in this run")
    if alerts:
        count, seen = str(len(alerts)), str(alerts[-1].get("what"))
    near = "0 where the baseline is the mean reward"
    tiles = [
        _tile("held-out accuracy", _percent(now.get("accuracy")), _interval(now), "accuracy" + (" bad" if doubt else "")),
        *_beside(now),
        _tile("training reward", _number(recent_mean(metrics, "reward/mean")), f"mean of the last {min(RECENT, done)} steps" if done else "", "reward"),
        _tile("mean advantage", _number(recent_mean(metrics, "advantage/mean"), "{:+.3f}"), near, "advantage"),
        _tile("response length", _number(recent_mean(metrics, "rollout/mean_tokens"), "{:.0f}"), "tokens each", "length"),
        _tile("speed", _number(recent_mean(metrics, "tokens_per_second"), "{:,.0f}"), "tokens per second of sampling and update", "speed"),
        _tile("step", f"{done:,}", f"of {total:,}" + (f", about {clock(left)} left" if going and left is not None else ""), "step"),
        _tile("alerts", count, seen, "alerts" + (" bad" if alerts else "")),
    ]  # fmt: skip
    return {
        "sentence": _sentence(run, metrics, start, now, going),
        "doubt": doubt,
        "tiles": tiles,
        "alerts": [_up_to_date(a, metrics) for a in reversed(alerts)],
        "running": going,
        "name": run.name,
    }


OF_THE_VERIFIER = ("reference", "hidden", "second")
"""Monitors whose alerts put the measured accuracy in doubt."""


def watched(run: RunReader) -> bool:
    """Whether monitors looked at the run: they may be off, or younger than it."""
    on = run.config.monitors.action != "off"
    return on and any(k.startswith(("monitor/", "text/")) for m in run.metrics()[-RECENT:] for k in m)


def _doubt(run: RunReader, alerts: list[dict[str, Any]], done: int) -> str:
    if not run.path.is_dir():
        return "Its directory is gone; this is what was read before."
    if any(a.get("monitor") in OF_THE_VERIFIER for a in alerts):
        return "Do not believe this accuracy before you have read the alert: the verifier may be fooled, in the evaluation too."
    if run.until is None and (there := len(run.rollouts.steps())) > done + 1:
        return f"metrics.jsonl has {done} steps, and there are rollouts of {there}: sppo audit verify says what is damaged."
    return ""


def _up_to_date(alert: dict[str, Any], metrics: Metrics) -> dict[str, Any]:
    """An alert with every field that a page shows, and what its monitor sees by now."""
    now = next((m[k] for m in reversed(metrics) if m.get(k := f"monitor/{alert.get('monitor')}") is not None), None)
    known = {"what": "?", "why": "", "advice": "", "action": "warn", "since": "?", "monitor": "?"} | {
        k: v for k, v in alert.items() if v is not None
    }
    evidence = (
        [e for e in alert.get("evidence") or [] if isinstance(e, str)]
        if isinstance(alert.get("evidence"), list)
        else []
    )
    return known | {"evidence": evidence, "now": f"now: {now:.0%} of those looked at" if now is not None else ""}


def _sentence(run: RunReader, metrics: Metrics, start: dict[str, Any], now: dict[str, Any], going: bool) -> str:
    if not metrics:
        if run.until is not None:
            return "These are the weights before its first step."
        return "It has not finished its first step yet." if going else "It ended before its first step."
    stopped = run.summary().get("stopped", "interrupted")
    ended = "it finished" if stopped == "finished" else f"it stopped ({stopped})"
    state = (
        "These are the weights"
        if run.until is not None
        else "It is training"
        if going
        else ended[0].upper() + ended[1:]
    )
    took = f"{state} after {len(metrics):,} step{'s' * (len(metrics) != 1)} and {clock(sum(map(_seconds, metrics)))} of sampling and updates."
    a, b = start.get("accuracy"), now.get("accuracy")
    if a is None or b is None or now.get("step") is None:
        return took
    sure = None not in (start.get("low"), start.get("high"), now.get("low"), now.get("high"))
    if sure and start["high"] < now["low"]:
        verb = "rose"
    elif sure and start["low"] > now["high"]:
        verb = "fell"
    else:
        return f"Held-out accuracy went from {a:.1%} to {b:.1%}, which is within the intervals: no change beyond chance. {took}"
    return (
        f"Held-out accuracy {verb} from {a:.1%} to {b:.1%} (95% interval {now['low']:.1%} to {now['high']:.1%}). {took}"
    )


def _last_evaluation(metrics: Metrics) -> dict[str, Any]:
    m = next((m for m in reversed(metrics) if m.get("eval/accuracy") is not None), None)
    if m is None:
        return {}
    k = largest_k(m)
    return {
        "step": m["step"] + 1, "accuracy": m["eval/accuracy"], "low": m.get("eval/low"), "high": m.get("eval/high"),
        "entropy": m.get("eval/entropy"), "k": k, "pass": m[f"eval/pass@{k}"] if k else None,
    }  # fmt: skip


def largest_k(m: dict[str, Any]) -> int | None:
    """The largest k above 1 of which an evaluation has pass@k."""
    found = [int(key.removeprefix("eval/pass@")) for key in m if re.fullmatch(r"eval/pass@\d{1,6}", key)]
    return max((k for k in found if k > 1), default=None)


def _beside(now: dict[str, Any]) -> list[dict[str, str]]:
    """Tiles of what the last evaluation measured beside accuracy."""
    tiles = []
    if now.get("k"):
        tiles.append(
            _tile(
                f"held-out pass@{now['k']}",
                _percent(now["pass"]),
                f"solved by one of {now['k']} responses at least",
                "pass",
            )
        )
    if now.get("entropy") is not None:
        tiles.append(_tile("held-out entropy", _number(now["entropy"]), "nats per sampled token", "entropy"))
    return tiles


def _tile(name: str, value: str, note: str, kind: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "kind": kind}


def recent_mean(metrics: Metrics, key: str) -> float | None:
    """The mean of a metric over the last steps, None where none measured it."""
    known = [m[key] for m in metrics[-RECENT:] if m.get(key) is not None]
    return float(np.mean(known)) if known else None


def _seconds(m: dict[str, Any]) -> float:
    return sum(v for k, v in m.items() if k.startswith("seconds/"))


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "–" if value is None else form.format(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _interval(now: dict[str, Any]) -> str:
    if now.get("low") is None:
        return "not measured yet" if not now else f"after step {now['step']}"
    return f"{now['low']:.1%} to {now['high']:.1%}, after step {now['step']:,}"
