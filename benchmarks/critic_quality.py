"""How well a trained run's critic knows what its policy can solve: `python benchmarks/critic_quality.py RUN`

Every held-out problem is sampled many times with the run's last policy, which gives the true success rate p(x) within a little noise;
V(x) was never trained on these problems. Reported, with 95% intervals from resampling the problems:

    explained variance    of single rewards, its ceiling (that of a critic who knows p(x)), and its share of the ceiling
    Brier score           and the part of it that no critic could avoid: the mean of p(1 − p)
    ECE                   |mean V − mean reward| in ten bins of V, weighted
    AUC                   of a solved and an unsolved response
    Pearson's r           between V(x) and the measured p(x), and as it would be without the noise of measuring p(x)

With --figure, a picture of both. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sppo.objective.diagnostics import (
    auc,
    brier,
    expected_calibration_error,
    explained_variance,
    explained_variance_ceiling,
)
from sppo.rollout.collect import collect
from sppo.run.run import Run
from sppo.types import Task

PART = 32
"""Problems sampled in one call."""
RESAMPLES = 1000


def measured(run: Run, samples: int) -> tuple[Tensor, Tensor, list[Task]]:
    """Correctness of each sample, [problems, samples], V(x), [problems], and the problems; those with a sample that cannot be graded are left out."""
    c = run.components
    assert c.critic is not None
    rows, kept = [], []
    for start in range(0, len(c.held_out), PART):
        tasks = c.held_out[start : start + PART]
        found = collect(
            c.engine, c.policy, c.reward, tasks, c.sampling,
            samples=samples, seed=(c.config.seed, "critic quality", start), truncated=c.config.rollout.truncated,
        )  # fmt: skip
        for i, task in enumerate(tasks):
            verdicts = [r.verdict for r in found[i * samples : (i + 1) * samples] if r.verdict]
            if not any(v.masked for v in verdicts):
                rows.append([v.correct for v in verdicts])
                kept.append(task)
        print(f"{min(start + PART, len(c.held_out))} of {len(c.held_out)} problems", flush=True)
    return torch.tensor(rows), c.critic.logits(kept).sigmoid(), kept


def pearson(a: Tensor, b: Tensor) -> float:
    """The correlation of two vectors."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def figures(reward_BN: Tensor, value_B: Tensor) -> dict[str, float | None]:
    """All of them for some problems."""
    samples = reward_BN.size(1)
    single, repeated = reward_BN.flatten(), value_B.repeat_interleave(samples)
    rate_B = reward_BN.mean(1)
    ceiling, ev = explained_variance_ceiling(reward_BN), explained_variance(single, repeated)
    within = reward_BN.var(1).mean() / samples  # of the measured rate: what noise adds to its spread
    share_of_rate = float(((rate_B.var() - within) / rate_B.var()).clamp(min=0)) if float(rate_B.var()) > 0 else 0.0
    r = pearson(value_B, rate_B) if float(value_B.std()) > 0 and float(rate_B.std()) > 0 else None
    return {
        "explained_variance": ev,
        "ceiling": ceiling,
        "share_of_ceiling": ev / ceiling if ev is not None and ceiling else None,
        "brier": brier(single, repeated),
        "brier_unavoidable": float(reward_BN.var(1).mean()),
        "ece": expected_calibration_error(single, repeated),
        "auc": auc(single, repeated),
        "auc_ceiling": auc(
            single, (rate_B * samples - reward_BN.T).T.flatten() / (samples - 1)
        ),  # the rate without the sample itself
        "pearson": r,
        "pearson_without_noise": r / math.sqrt(share_of_rate) if r is not None and share_of_rate > 0 else None,
        "mean_value": float(value_B.mean()),
        "mean_reward": float(single.mean()),
    }


def intervals(
    reward_BN: Tensor, value_B: Tensor, of: Callable[[Tensor, Tensor], dict[str, float | None]]
) -> dict[str, dict[str, float | None]]:
    """Each figure with its 95% percentile interval over resampled problems."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        pick = torch.randint(len(value_B), (len(value_B),), generator=generator)
        for name, value in of(reward_BN[pick], value_B[pick]).items():
            if value is not None:
                drawn.setdefault(name, []).append(value)
    out: dict[str, dict[str, float | None]] = {}
    for name, value in of(reward_BN, value_B).items():
        ordered = sorted(drawn.get(name, [float("nan")]))
        low, high = ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered)) - 1]
        out[name] = {k: None if x is None else round(x, 4) for k, x in (("value", value), ("low", low), ("high", high))}
    return out


def draw(reward_BN: Tensor, value_B: Tensor, path: Path) -> None:
    """The measured rate against the predicted one, problem by problem and in ten bins of equal size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rate_B = reward_BN.mean(1)
    shown, axis = plt.subplots(figsize=(5, 4.6), layout="constrained")
    axis.plot([0, 1], [0, 1], ":", color="#888888", linewidth=0.8)
    axis.plot(value_B, rate_B, ".", color="#56b4e9", markersize=4, alpha=0.6, label="a problem")
    order = value_B.argsort()
    bins = [(float(value_B[part].mean()), float(rate_B[part].mean())) for part in order.tensor_split(10)]
    axis.plot(*zip(*bins, strict=True), "o-", color="#0072b2", label="a tenth of the problems")
    axis.set_xlabel("predicted from the prompt, V(x)")
    axis.set_ylabel(f"solved, of {reward_BN.size(1)} samples")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    shown.savefig(path)
    plt.close(shown)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    run = Run.resume(args.run)
    reward_BN, value_B, _ = measured(run, args.samples)
    run.close()
    if args.figure:
        draw(reward_BN, value_B, args.figure)
    result = {"problems": len(value_B), "samples": args.samples, **intervals(reward_BN, value_B, figures)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
