"""What a step leaves behind: metrics, warnings and alerts, the rollouts file, the audit chain's line, the trackers; and the run's summary."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..evaluation.evaluate import Evaluation, mean_measures
from ..learning.batch import Batch
from ..learning.update_stats import Trace
from ..memory import peak_memory
from ..objective.diagnostics import explained_variance_ceiling
from ..recipe.config import flattened
from ..rollout.collect import overruled
from ..trackers.base import TrackedRun, Trackers
from ..types import Rollout, Verdict
from .accuracy import accuracy
from .build import Components
from .checkpoint import State
from .rollouts import rollout_table
from .sample import Sampled


class Clock:
    """The seconds of each phase of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what is inside; a phase that comes twice adds up."""
        began = time.monotonic()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - began

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap, by phase."""
        seconds, self._seconds = self._seconds, {}
        return seconds


@dataclass(frozen=True)
class Step:
    """A step as it is written down: one row per rollout that may train the policy; groups that were thrown away are only counted."""

    number: int
    sampled: Sampled
    batch: Batch
    advantage: Tensor
    """[B], or [B, T] where each token has its own."""
    value_B: Tensor | None
    trace: Trace

    @classmethod
    def of(
        cls, number: int, sampled: Sampled, batch: Batch, advantage: Tensor, value_B: Tensor | None, trace: Trace
    ) -> Step:
        """From the whole batch, whose last rows may be of groups that were thrown away."""
        n = len(sampled.rollouts)
        trace = Trace(trace.log_ratio_BT[:n], trace.clipped_B[:n])
        return cls(number, sampled, batch.first(n), advantage[:n], None if value_B is None else value_B[:n], trace)

    @property
    def verdicts(self) -> list[Verdict]:
        """Of the rows."""
        return [r.verdict for r in self.batch.rollouts if r.verdict]

    @property
    def discarded(self) -> list[Verdict]:
        """Of the groups that were thrown away."""
        return [r.verdict for r in self.sampled.beside if r.verdict]

    @property
    def advantage_B(self) -> Tensor:
        """One number per response: the mean over its tokens where each has its own."""
        if self.advantage.dim() == 1:
            return self.advantage
        own_BT = self.batch.mask_BT
        return torch.where(own_BT, self.advantage, 0.0).sum(1) / own_BT.sum(1)


def verdict_metrics(step: Step) -> dict[str, Any]:
    """Rewards, lengths and outcomes. Masked rollouts are counted, and in no mean of rewards."""
    batch, verdicts, discarded = step.batch, step.verdicts, step.discarded
    kept = [v for v in verdicts if not v.masked]
    scores = [v.score for v in kept]
    return {
        "reward/mean": sum(scores) / len(kept) if kept else None,
        "reward/spread": max(scores) - min(scores) if kept else None,
        "reward/correct": sum(v.correct for v in kept) / len(kept) if kept else None,
        "rollout/masked": len(batch) - int(batch.keep_B.sum()),
        "rollout/beside_tokens": step.sampled.beside_tokens,
        "rollout/thrown_away": len(step.sampled.thrown_away),
        "rollout/thrown_away_masked": sum(v.masked for v in discarded),
        "rollout/tokens": batch.tokens,
        "rollout/mean_tokens": float(batch.response_len_B.float().mean()),
        "rollout/truncated": sum(r.finish == "length" for r in batch.rollouts) / len(batch),
        "rollout/overruled": overruled(verdicts),
        **{f"outcome/{name}": count for name, count in sorted(Counter(v.outcome for v in verdicts).items())},
        **{f"reward/{name}": value for name, value in mean_measures(verdicts).items()},
        **turn_metrics(batch.rollouts),
    }


def turn_metrics(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Of trajectories with an environment: turns, calls of tools and how many of them failed, per trajectory."""
    several = [r for r in rollouts if r.messages]
    if not several:
        return {}
    calls = [int(r.evidence.get("calls", 0)) for r in several]
    failed = sum(int(r.evidence.get("failed_calls", 0)) for r in several)
    return {
        "turns/mean": sum(len(r.turns) for r in several) / len(several),
        "turns/out_of_turns": sum("out_of_turns" in r.evidence for r in several) / len(several),
        "turns/told_tokens": sum(len(r.ids) - len(r.prompt_ids) - len(r.response_ids) for r in several) / len(several),
        "tools/calls": sum(calls) / len(several),
        "tools/most_calls": max(calls),
        "tools/failed": failed / max(sum(calls), 1),
    }


def advantage_metrics(step: Step) -> dict[str, Any]:
    """Of what may train the policy: `mean` and `std` per response, `size` and `variance` per number that a token is trained on."""
    keep_B, credit = step.batch.keep_B, step.advantage
    kept_b = step.advantage_B[keep_B]
    credit = credit[keep_B] if credit.dim() == 1 else credit[step.batch.mask_BT & keep_B[:, None]]
    return {
        "advantage/mean": float(kept_b.mean()) if len(kept_b) else None,
        "advantage/std": float(kept_b.std()) if len(kept_b) > 1 else None,
        "advantage/size": float(credit.abs().mean()) if len(credit) else None,
        "advantage/variance": float(credit.var()) if len(credit) > 1 else None,
    }


def evaluation_metrics(result: Evaluation) -> dict[str, Any]:
    """An evaluation as metrics of the step before it; an accuracy that could not be measured is None."""
    return {
        "eval/accuracy": result.accuracy if result.n else None, "eval/low": result.low, "eval/high": result.high,
        **{f"eval/{name}": value for name, value in result.measures.items()},
        **{f"eval/{who}_{key}": found[key] for who, found in result.calibration.items() for key in ("ece", "brier", "auc", "aurc")},
        "eval/mean_tokens": result.mean_tokens, "eval/entropy": result.entropy,
        **{f"eval/{name}": value for name, value in result.pass_at_k.items()}, "critic/ev_ceiling": _ceiling(result),
    }  # fmt: skip


def _ceiling(result: Evaluation) -> float | None:
    """The explained variance that a perfect critic would reach on the held-out problems; needs two samples of each."""
    k = result.samples
    scores = [r.verdict.correct if r.verdict and not r.verdict.masked else None for r in result.rollouts]
    rows = [scores[i : i + k] for i in range(0, len(scores), k)]
    whole = [row for row in rows if None not in row]
    return explained_variance_ceiling(torch.tensor(whole)) if whole and k > 1 else None


class Recorder:
    """Writes a run down as it goes: to its folder, its observer and its trackers."""

    def __init__(self, components: Components, saved: Path | None) -> None:
        """Starts the trackers. Raises RecipeError naming the one that does not start."""
        self.components = c = components
        recipe = flattened(c.config.model_dump(mode="json", exclude_none=True))
        step = int(saved.name.removeprefix("step-")) if saved else 0
        run = TrackedRun(c.directory.path.resolve().name, c.directory.path, recipe, step)
        self.trackers = Trackers(c.config.run.trackers, run, c.observer.note)

    def measure(
        self, step: Step, learnt: dict[str, Any], seconds: dict[str, float], gap: float, state: State
    ) -> dict[str, Any]:
        """The step's metrics, and the run's counters brought up to date; warnings are said.

        Args:
            learnt: what the update reported.
            seconds: of each phase of the step.
            gap: the canary's, after the update.
            state: the counters.
        """
        c, tokens = self.components, step.batch.tokens
        metrics = {
            **verdict_metrics(step),
            "engine/canary_gap": gap,
            "data/position": c.curriculum.position,
            "data/passed_over": c.curriculum.passed_over,
            **c.curriculum.metrics(),
            **c.models.metrics(),
            **_behind(c, step),
            **step.sampled.metrics,
            **advantage_metrics(step),
        }
        _count(state, step, metrics, sum(seconds.values()))
        metrics |= learnt
        metrics |= {f"seconds/{name}": spent for name, spent in seconds.items()}
        metrics["tokens_per_second"] = tokens / max(sum(seconds.values()), 1e-9)
        metrics["memory/rss_bytes"] = psutil.Process().memory_info().rss
        c.warnings.look(metrics, step.verdicts + step.discarded)
        return metrics | c.monitors.look(step.number, step.batch.rollouts, metrics)

    def evaluate(self, state: State) -> dict[str, Any]:
        """Held-out accuracy as metrics; the curriculum may decide by it."""
        c = self.components
        result = accuracy(c, state)
        state.last = {"step": state.step, **result.as_dict()}
        c.observer.evaluation(state.step, result)
        if (decided := c.curriculum.evaluated(result.rollouts, result.samples)) is not None:
            c.observer.note(decided)
        return evaluation_metrics(result)

    def alerts(self, step: int) -> str:
        """Write and say what the monitors raised; returns why the run must stop, or an empty string."""
        c, stop = self.components, ""
        alerts, notes = c.monitors.fetch()
        for note in notes:
            c.observer.note(note)
        for alert in alerts:
            c.directory.alert(alert.as_dict())
            c.observer.note(f"warning: alert at step {step}: {alert.what} ({alert.why}); {alert.advice}")
            if alert.action == "stop":
                stop = f"alert: {alert.what}"
        return stop

    def write(self, step: Step, metrics: dict[str, Any], fingerprint: str) -> None:
        """The step's rollouts, its line of metrics and its line of the audit chain; `fingerprint` is of the weights after it."""
        c = self.components
        table = rollout_table(
            step.number, step.batch.rollouts, None if step.value_B is None else step.value_B.tolist(), step.advantage_B.tolist(),
            step.trace.log_ratio_BT.tolist(), step.trace.clipped_B.tolist(),
        )  # fmt: skip
        c.directory.rollouts(step.number, table)
        c.directory.metrics(step.number, metrics)
        vouched = {
            "recipe_sha256": c.config.sha256, "seed": c.config.seed, "data_position": c.curriculum.position,
            "policy_fingerprint": fingerprint, "verifier_sha256": c.verifier,
        }  # fmt: skip
        c.directory.seal(step.number, vouched)
        self.trackers.log(step.number, metrics)
        c.observer.step(step.number + 1, metrics)

    def finish(self, state: State, stopped: str) -> dict[str, Any]:
        """Write and return the summary; `stopped` says why the run ends before its last step, where it does."""
        c, after = self.components, state.last  # of the last evaluation; empty when a run was interrupted before one
        checkpoints = c.directory.checkpoints()
        evaluated = {"before": state.before, "after": after}
        summary = {
            **{f"accuracy_{when}{end}": found.get(key) for when, found in evaluated.items()
               for end, key in (("", "accuracy"), ("_low", "low"), ("_high", "high"))},
            "evaluated_after_step": after.get("step"),
            **{f"entropy_{when}": found.get("entropy") for when, found in evaluated.items()},
            **{f"pass_at_k_{when}": found.get("pass_at_k") for when, found in evaluated.items()},
            "mean_advantage": state.advantage / state.advantage_steps if state.advantage_steps else None,
            "steps": state.step,
            "seconds": state.seconds,
            "seconds_bootstrap": state.seconds_bootstrap,
            "seconds_evaluating": state.seconds_evaluating,
            "generated_tokens": state.generated_tokens,
            "masked": state.masked,
            "truncated": state.truncated / max(state.responses, 1),
            "overruled": state.overruled / max(state.responses, 1),
            "alerts": sorted(c.monitors.raised, key=c.monitors.raised.__getitem__),
            "passed_over": c.curriculum.passed_over,
            "peak_rss_bytes": peak_memory(torch.device("cpu")),
            "memory": _memory(c),
            "seed": c.config.seed,
            "recipe_sha256": c.config.sha256,
            "policy_sha256": c.policy.sha256(),
            "stopped": stopped or "interrupted" if state.step < c.config.training.steps else "finished",
            "policy": str(checkpoints[-1] / "policy") if checkpoints else None,
        }  # fmt: skip
        c.directory.summary(summary)
        self.trackers.close(summary)
        return summary


def _behind(c: Components, step: Step) -> dict[str, Any]:
    """On a cluster: how many updates ago the weights were taken that sampled a step, at most."""
    return (
        {} if c.config.cluster is None else {"rollout/lag": step.number - min(r.version for r in step.batch.rollouts)}
    )


def _memory(c: Components) -> dict[str, Any]:
    """The peak that was planned, and the one that was measured since the run began: of a GPU, the tensors alone."""
    device = c.policy.device
    planned = None if c.plan is None else c.plan.parts()
    if planned is not None and device.type == "cuda":
        planned["total"] -= planned.pop("the process")
    return {
        "device": device.type,
        "planned_bytes": planned and planned["total"],
        "peak_bytes": peak_memory(device),
        "planned": planned,
        "phase": c.plan and c.plan.largest,
    }


def _count(state: State, step: Step, metrics: dict[str, Any], seconds: float) -> None:
    """Add a step to the run's counters."""
    batch, verdicts = step.batch, step.verdicts
    state.step = step.number + 1
    state.seconds += seconds
    state.generated_tokens += batch.tokens + step.sampled.beside_tokens
    state.responses += len(batch)
    state.truncated += sum(r.finish == "length" for r in batch.rollouts)
    state.overruled += sum("paid_before_cut" in v.evidence for v in verdicts)
    state.masked += metrics["rollout/masked"] + metrics["rollout/thrown_away_masked"]
    mean = metrics["advantage/mean"]
    if mean is not None and math.isfinite(mean):
        state.advantage += mean
        state.advantage_steps += 1
