"""What becomes of ratios, advantages and gradients as responses get longer: `python benchmarks/stability.py`

One small model, taught chains of 1 to 24 operations until it solves some, and nothing but `sppo train` from there, each on problems of a
single length:

    ratios       each importance ratio, the first steps of a run, four updates a step: effective sample size of the importance weights, share of
                 clipped elements, largest |log ratio|
    credit       each algorithm with the policy held still (a rate of 1e-12) while its critic, which begins with the policy's weights,
                 learns: variance of the advantage, and the noise of a half-batch's gradient in units of its signal (‖E g‖², from two
                 independent halves; None where the signal is lost in the noise)
    tail effect  a token critic's error by position in the response: what it knows at the first token, where credit is decided, and at the last

Last line: one JSON object; with --figure, a picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from sppo.cli._comparison import START
from sppo.learning.batch import pack
from sppo.recipe.config import Config
from sppo.rollout.collect import collect
from sppo.run.loop import train
from sppo.run.run import Run

LENGTHS = (2, 8, 24)
RATIOS = ("sequence", "family", "geometric", "token")
ALGORITHMS = ("sppo", "reinforce", "rloo", "grpo", "ppo")
DECILES = 10


def recipe(**changes: Any) -> Config:
    """The quickstart's models and rates, without its bootstrap."""
    fixed = {
        "rollout.prompts": 128, "rollout.max_tokens": 176, "evaluation.n": 8, "evaluation.every": 0, "training.schedule": "constant", "training.warmup": 0,
        "training.measure_noise": True, "run.checkpoint_every": 100_000,
    }  # fmt: skip
    config = Config.load("recipes/quickstart.toml", fixed | changes)
    return config if "bootstrap.task" in changes else config.model_copy(update={"bootstrap": None})


def steps(config: Config) -> list[dict[str, Any]]:
    """The metrics of a run, which is made if it is not there yet."""
    folder = Path(config.run.out)
    if not (folder / "summary.json").exists():
        print(folder.name, flush=True)
        job = Run.new(config)
        train(job)
        job.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def mean(values: list[float | None]) -> float | None:
    """Of those that could be measured."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def ratios(out: Path, model: str, seeds: int) -> dict[str, Any]:
    """Each ratio at each length, the mean over seeds and four steps."""
    found: dict[str, Any] = {}
    for ratio in RATIOS:
        for length in LENGTHS:
            rows = [
                m
                for seed in range(1, seeds + 1)
                for m in steps(
                    recipe(**{
                        "seed": seed, "policy.model": model, "task.train": f"chain:steps={length}-{length}", "training.steps": 4, "training.minibatches": 4,
                        "objective.ratio": ratio, "run.out": str(out / f"ratio-{ratio}-{length}-{seed}"),
                    })
                )
            ]  # fmt: skip
            found.setdefault(ratio, {})[str(length)] = {
                "tokens": mean([m["rollout/mean_tokens"] for m in rows]),
                "ess": mean([m["ratio/ess"] for m in rows]),
                "clipped": mean([m["ratio/clip_fraction"] for m in rows]),
                "largest_log_ratio": max(m["ratio/max_log"] for m in rows),
            }
    return found


def credit(out: Path, model: str, warm: int, looked_at: int) -> dict[str, Any]:
    """Each algorithm at each length, the policy held still; the mean over the last steps."""
    found: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        for length in LENGTHS:
            config = recipe(**{
                "policy.model": model, "critic.model": model, "training.critic_lr": 3e-4, "training.lr": 1e-12,
                "task.train": f"chain:steps={length}-{length}", "training.steps": warm + looked_at,
                "run.out": str(out / f"credit-{algorithm}-{length}"),
            }).as_algorithm(algorithm, {})  # fmt: skip
            rows = steps(config)[warm:]
            signal, noise = (mean([m[f"update/grad_{name}"] for m in rows]) for name in ("signal", "variance"))
            found.setdefault(algorithm, {})[str(length)] = {
                "tokens": mean([m["rollout/mean_tokens"] for m in rows]),
                "solved": mean([m["reward/correct"] for m in rows]),
                "advantage_variance": mean([m["advantage/variance"] for m in rows]),
                "gradient_noise_to_signal": noise / signal if noise and signal and signal > 0 else None,
                "explained_variance": mean([m.get("critic/explained_variance") for m in rows]),
            }
    return found


@torch.no_grad()
def tail(out: Path) -> dict[str, Any]:
    """The token critic of each length's held-still PPO run: mean squared error of its values against the outcome, by tenth of the response,
    over the variance of the outcome (1: it knows nothing); and the prompt critic's, for which there is one number."""
    found: dict[str, Any] = {}
    for length in LENGTHS:
        errors: dict[str, list[float]] = {}
        for algorithm in ("ppo", "sppo"):
            run = Run.resume(out / f"credit-{algorithm}-{length}")
            c = run.components
            rollouts = collect(
                c.engine, c.policy, c.reward, c.curriculum.sample(512), c.sampling, seed=(0, "tail", length)
            )
            batch = pack(rollouts, c.policy.pad_id)
            reward_B = batch.correct_B
            assert c.critic is not None
            if algorithm == "sppo":
                squares = [(c.critic.logits([r.task for r in rollouts]).sigmoid() - reward_B).square().mean()]
            else:
                value_BT = c.critic(batch.ids_BL, batch.action_BL).sigmoid()
                width = value_BT.size(1)
                tenth_BT = (torch.arange(width) * DECILES // batch.response_len_B[:, None]).clamp(max=DECILES - 1)
                square_BT = (value_BT - reward_B[:, None]).square()
                squares = [square_BT[batch.mask_BT & (tenth_BT == d)].mean() for d in range(DECILES)]
            errors[algorithm] = [round(float(s / reward_B.var(correction=0)), 3) for s in squares]
            run.close()
        found[str(length)] = {"token_critic_by_tenth": errors["ppo"], "prompt_critic": errors["sppo"][0]}
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Effective sample size by length, gradient noise by length, and the token critic's error by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
    shown, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    for axis, part, key, label in (
        (axes[0], "ratios", "ess", "effective sample size"), (axes[1], "credit", "gradient_noise_to_signal", "gradient noise over signal"),
    ):  # fmt: skip
        for colour, (name, by_length) in zip(colours, result[part].items(), strict=False):
            points = [(v["tokens"], v[key]) for v in by_length.values() if v[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        axis.set_xlabel("response tokens")
        axis.set_ylabel(label)
    axes[0].set_ylim(0, 1.02)
    axes[1].set_yscale("log")
    for colour, (length, errors) in zip(colours, result["tail"].items(), strict=False):
        axes[2].plot(
            [5 + 10 * d for d in range(DECILES)],
            errors["token_critic_by_tenth"],
            "o-",
            color=colour,
            label=f"{length} operations",
        )
        axes[2].plot([0], [errors["prompt_critic"]], "x", color=colour, markersize=9)
    axes[2].set_xlabel("position in the response, %  (×: the prompt critic)")
    axes[2].set_ylabel("critic's squared error / variance of the outcome")
    axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    shown.savefig(path)
    plt.close(shown)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=4, help="of the ratios' runs")
    parser.add_argument("--warm", type=int, default=16, help="steps in which a critic learns before it is looked at")
    parser.add_argument("--looked-at", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    start = args.out / "start"
    if not (start / START).exists():
        job = Run.new(
            recipe(**{"bootstrap.task": "chain:steps=1-24", "task.train": "chain:steps=1-24", "run.out": str(start)})
        )
        job.begin()
        job.close()
    model = str(start / START)
    result = {
        "ratios": ratios(args.out, model, args.seeds), "credit": credit(args.out, model, args.warm, args.looked_at), "tail": tail(args.out),
    }  # fmt: skip
    if args.figure:
        draw(result, args.figure)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
