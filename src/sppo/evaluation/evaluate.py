"""Held-out accuracy: sample, judge, count. Samples that cannot be graded leave the denominator, and are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..environments.base import Maker
from ..environments.single_turn import ALONE
from ..models.critic import Critic
from ..models.policy import Policy
from ..rewards.base import Reward
from ..rewards.confidence import stated_confidence
from ..rewards.steps import Checker
from ..rollout.collect import collect, overruled
from ..rollout.engine import Engine, Sampling
from ..tasks.base import TaskSource
from ..types import Rollout, Task, Verdict
from .calibration import calibration
from .intervals import accuracy_interval, pass_at_k
from .step_quality import step_quality


@dataclass(frozen=True)
class Evaluation:
    """The result for one set of problems, with its rollouts. Accuracy is NaN when none could be graded."""

    accuracy: float
    low: float
    high: float
    n: int
    samples: int
    pass_at_k: dict[str, float]
    mean_tokens: float
    entropy: float | None
    """Nats per token: the mean of −log π over sampled tokens; None without any, or for greedy decoding."""
    truncated: float
    overruled: float
    """The share of responses that the reward pays but that count as wrong, because they were cut at the limit."""
    masked: int
    outcomes: dict[str, int]
    measures: dict[str, float]
    calibration: dict[str, dict[str, Any]]
    """Of the `critic` (each problem's predicted chance) and of the `model` (the confidence that responses state), where
    there is one."""
    rollouts: list[Rollout] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; an accuracy that could not be measured is None."""
        out = {k: v for k, v in self.__dict__.items() if k != "rollouts"}
        return out | {"accuracy": self.accuracy if self.n else None}


def held_out_tasks(source: TaskSource, n: int) -> list[Task]:
    """The first n problems of a source (all of them if there are fewer): the same ones every time."""
    return [source[i] for i in range(min(n, len(source)))]


def evaluate(
    engine: Engine,
    policy: Policy,
    reward: Reward,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int = 0,
    checker: Checker | None = None,
    critic: Critic | None = None,
    keep_cut: bool = False,
    environment: Maker = ALONE,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """avg@samples and pass@k with 95% intervals. The same seed draws the same random numbers at every evaluation.

    With a `checker` of steps, `measures` also says how many right answers were reached by wrong ones. A `critic` must
    read the prompt alone. A response cut at the limit is wrong whatever the reward says, unless `keep_cut`
    (`rollout.truncated = "keep"`).
    """
    rollouts = collect(
        engine, policy, reward, tasks, sampling, samples=samples, seed=(seed, "evaluation"),
        truncated="keep" if keep_cut else "penalise", environment=environment, progress=progress,
    )  # fmt: skip
    means: list[float] = []
    passes: dict[int, list[float]] = {k: [] for k in _powers(samples)}
    for start in range(0, len(rollouts), samples):
        graded = [r.verdict.correct for r in rollouts[start : start + samples] if r.verdict and not r.verdict.masked]
        if not graded:
            continue
        means.append(sum(graded) / len(graded))
        solved = sum(c >= 0.5 for c in graded)
        for k in passes:
            if k <= len(graded):
                passes[k].append(pass_at_k(len(graded), solved, k))
    accuracy, low, high = accuracy_interval(means, samples)
    tokens = sum(len(r.logps) for r in rollouts)
    return Evaluation(
        accuracy=accuracy,
        low=low,
        high=high,
        n=len(means),
        samples=samples,
        pass_at_k={f"pass@{k}": sum(v) / len(v) for k, v in passes.items() if v},
        entropy=-sum(map(sum, (r.logps for r in rollouts))) / tokens if tokens and sampling.temperature else None,
        mean_tokens=sum(len(r.response_ids) for r in rollouts) / max(len(rollouts), 1),
        truncated=sum(r.finish == "length" for r in rollouts) / max(len(rollouts), 1),
        overruled=overruled([r.verdict for r in rollouts if r.verdict]),
        masked=sum(r.verdict.masked for r in rollouts if r.verdict),
        outcomes=dict(Counter(r.verdict.outcome for r in rollouts if r.verdict)),
        measures=mean_measures([r.verdict for r in rollouts if r.verdict])
        | (step_quality(rollouts, checker) if checker else {}),
        calibration=calibrations(rollouts, critic),
        rollouts=rollouts,
    )


def calibrations(rollouts: Sequence[Rollout], critic: Critic | None = None) -> dict[str, dict[str, Any]]:
    """Calibration of stated chances over the graded rollouts (evaluation/calibration.py)."""
    graded = [(r, r.verdict.correct) for r in rollouts if r.verdict and not r.verdict.masked]
    out: dict[str, dict[str, Any]] = {}
    if critic is not None and graded:
        tasks = {id(r.task): r.task for r, _ in graded}
        values = dict(zip(tasks, critic.chances(list(tasks.values())).tolist(), strict=True))
        out["critic"] = calibration([c for _, c in graded], [values[id(r.task)] for r, _ in graded])
    stated = [(c, q) for r, c in graded if (q := stated_confidence(r.text)) is not None]
    if stated:
        out["model"] = {**calibration(*map(list, zip(*stated, strict=True))), "stated": len(stated) / len(graded)}
    return out


def mean_measures(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The means of what rewards measured besides the score (`evidence["measures"]`: pass rates, gaps), masked samples
    left out."""
    values: dict[str, list[float]] = {}
    for verdict in verdicts:
        if not verdict.masked:
            for name, value in verdict.evidence.get("measures", {}).items():
                values.setdefault(name, []).append(value)
    return {name: sum(v) / len(v) for name, v in sorted(values.items())}


def _powers(samples: int) -> list[int]:
    """1, 2, 4, … up to the number of samples, and that number itself."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
