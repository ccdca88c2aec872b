"""Wall time to the same held-out accuracy: TRL's own GRPOTrainer against sppo. `make bench-trl`

Both sides start from the same checkpoint (the recipe's bootstrap, one a seed), see the same training problems (TRL shuffles them its own
way), are judged by the same verifier, and are evaluated by the same code on the same held-out problems with the same random numbers,
outside the clock. Both sample as many responses a step, in as many optimiser updates, with the recipe's betas, warm-up and
gradient norm and a constant rate; all else is TRL's default (its loss, its scaling, its generation). Both run at
the rate that needed the fewest tokens on the tuning seeds, which are not among the seeds compared; the parts between at their neighbours'.

    sppo        the recipe as it is
    TRL         GRPOTrainer, 8 generations a prompt
    grpo        with --parts: TRL's algorithm in our loop: what is left between it and TRL is throughput
    reinforce   with --parts: N = 1 and no critic in our loop: what is left between it and sppo is the baseline

The parts multiply: TRL/sppo = (TRL/grpo: throughput) × (grpo/reinforce: one sample a prompt) × (reinforce/sppo: the critic). A run stops once it
reached the target, or at the cap (then its cost is unknown, and at least the cap). What was run is kept and not run again.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sppo.cli._comparison import START
from sppo.evaluation.compare import cost_to, ratio_interval
from sppo.recipe.config import Config

RATE_OF = {"grpo": "TRL", "reinforce": "sppo"}
"""The parts between run at their neighbours' rates."""
GENERATIONS = 8


def recipe(path: str, seed: int, every: int, **changes: Any) -> Config:
    """The recipe of one seed; the rate is constant, so that it does not depend on how many steps are planned."""
    fixed = {
        "seed": seed, "evaluation.every": every, "training.schedule": "constant", "training.steps": 100_000, "run.checkpoint_every": 100_000,
    }  # fmt: skip
    return Config.load(path, fixed | changes)


class Clock:
    """A learning curve as it grows: seconds without evaluations, generated tokens, accuracy. Tells when to stop."""

    def __init__(self, target: float, cap: float) -> None:
        self.target, self.cap = target, cap
        self.curve: dict[str, list[float]] = {"seconds": [], "tokens": [], "accuracy": []}

    def add(self, seconds: float, tokens: float, accuracy: float) -> bool:
        """Note an evaluation; whether the run is over."""
        for name, value in (("seconds", seconds), ("tokens", tokens), ("accuracy", accuracy)):
            self.curve[name].append(value)
        print(f"    {seconds:7.0f} s {tokens / 1e6:6.2f}M tokens  {accuracy:.3f}", flush=True)
        return accuracy >= self.target or seconds >= self.cap


def serve_ours(config: Config, algorithm: str, lr: float, clock: Clock) -> None:
    """One run in our loop."""
    from sppo.evaluation.evaluate import Evaluation
    from sppo.run.loop import train
    from sppo.run.observer import Silent
    from sppo.run.run import Run

    class Watch(Silent):
        def evaluation(self, step: int, result: Evaluation) -> None:
            if clock.add(
                job.state.seconds if step else 0.0, job.state.generated_tokens if step else 0.0, result.accuracy
            ):
                job.interrupt()

    job = Run.new(config.as_algorithm(algorithm, {"training.lr": lr}), Watch())
    train(job)
    job.close()


def serve_trl(config: Config, lr: float, clock: Clock) -> None:
    """One run of TRL's trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from sppo.evaluation.evaluate import evaluate, held_out_tasks
    from sppo.memory import keep_memory
    from sppo.models.loading import pick_device
    from sppo.models.policy import Policy
    from sppo.rewards.loading import load_reward
    from sppo.rollout.engine import Sampling
    from sppo.rollout.local import LocalEngine
    from sppo.tasks.loading import load_pair
    from sppo.types import Rollout

    keep_memory()
    train_tasks, eval_tasks = load_pair(config.task.train, config.task.eval, config.task.instruction)
    judge = load_reward(config.reward.use, config.reward.limit)
    mirror, _ = Policy.load(
        config.policy.model,
        dtype=config.policy.dtype,
        device=pick_device(),
        seed=config.seed,
        chat_template=config.policy.chat_template,
    )  # for the evaluations
    tasks = [train_tasks[i] for i in range(20_000)]
    held_out = held_out_tasks(eval_tasks, config.evaluation.n)
    sampling = Sampling.of(config.rollout, config.evaluation.temperature)
    tokens = 0

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], row: list[int], **_: Any
    ) -> list[float]:
        nonlocal tokens
        tokens += sum(map(len, completion_ids))
        rollouts = [
            Rollout.answer(tasks[i], [], ids, [], "stop" if ids[-1] in mirror.eos_ids else "length", mirror.text(ids))
            for i, ids in zip(row, completion_ids, strict=True)
        ]
        return [v.score if r.finish == "stop" else 0.0 for r, v in zip(rollouts, judge.judge(rollouts), strict=True)]

    class Watch(TrainerCallback):
        began = 0.0

        def look(self, model: Any, seconds: float) -> bool:
            mirror.model.load_state_dict(model.state_dict())
            found = evaluate(
                LocalEngine(mirror),
                mirror,
                judge,
                held_out,
                sampling,
                samples=config.evaluation.samples,
                seed=config.seed,
            )
            return clock.add(seconds, tokens, found.accuracy)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.look(model, 0.0)
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            now = time.perf_counter()
            if state.global_step % (config.training.minibatches * config.evaluation.every) == 0:
                control.should_training_stop = self.look(model, now - self.began)
                self.began += time.perf_counter() - now

    responses = config.rollout.prompts * config.rollout.samples
    update = responses // config.training.minibatches
    small = sum(p.numel() for p in mirror.model.parameters()) < 10_000_000
    device_batch = update if small else 8
    options = GRPOConfig(
        str(Path(config.run.out) / "trl"), per_device_train_batch_size=device_batch, gradient_accumulation_steps=update // device_batch,
        steps_per_generation=responses // device_batch, num_generations=GENERATIONS, max_completion_length=config.rollout.max_tokens,
        temperature=config.rollout.temperature, learning_rate=lr, lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.training.warmup * config.training.minibatches, adam_beta1=config.training.betas[0],
        adam_beta2=config.training.betas[1], weight_decay=config.training.weight_decay, max_grad_norm=config.training.max_grad_norm,
        max_steps=100_000, seed=config.seed, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), bf16=mirror.dtype == torch.bfloat16, gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(config.policy.model, padding_side="left")
    if not isinstance(tasks[0].prompt, str) and not mirror.chat:
        tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(config.policy.model, dtype=torch.float32)
    rows = Dataset.from_dict({"prompt": [t.text for t in tasks], "row": list(range(len(tasks)))})
    GRPOTrainer(model, reward, options, rows, processing_class=tokenizer, callbacks=[Watch()]).train()
    judge.close()


def start(args: argparse.Namespace, seed: int) -> Path:
    """The checkpoint that all sides of a seed share, made once."""
    from sppo.run.run import Run

    folder = args.out / f"start-{seed}"
    if not (folder / START).exists():
        job = Run.new(recipe(args.recipe, seed, args.every, **{"run.out": str(folder)}))
        job.begin()
        job.close()
    return folder / START


def measure(args: argparse.Namespace, side: str, seed: int, lr: float) -> dict[str, list[float]]:
    """The learning curve of one run, from the folder or from a process of its own."""
    kept = args.out / f"{side}-{seed}-{lr:g}.json"
    if not kept.exists():
        print(f"{side}, seed {seed}, lr {lr:g}", flush=True)
        folder = args.out / f"{side}-{seed}-{lr:g}"
        shutil.rmtree(folder, ignore_errors=True)
        order = [
            sys.executable, __file__, args.recipe, "--serve", side, "--seed", str(seed), "--lr", str(lr), "--out", str(args.out), "--target",
            str(args.target), "--cap", str(args.cap if side == "TRL" else args.cap / 2), "--every", str(args.every),
        ]  # fmt: skip
        if subprocess.run(order, check=False).returncode:
            sys.exit(f"{side} failed: {' '.join(order)}")
    return json.loads(kept.read_text())


def serve(args: argparse.Namespace) -> None:
    """One run, in this process."""
    folder = args.out / f"{args.serve}-{args.seed}-{args.lr:g}"
    changes = {"policy.model": str(args.out / f"start-{args.seed}" / START), "run.out": str(folder)}
    config = recipe(args.recipe, args.seed, args.every, **changes).model_copy(update={"bootstrap": None})
    clock = Clock(args.target, args.cap)
    if args.serve == "TRL":
        serve_trl(config, args.lr, clock)
    else:
        serve_ours(config, args.serve, args.lr, clock)
    folder.with_name(folder.name + ".json").write_text(json.dumps(clock.curve))


def to_target(curve: dict[str, list[float]], cost: str, target: float) -> float:
    """Seconds or tokens; ∞ where the target was not reached."""
    return cost_to(curve[cost], curve["accuracy"], target)


def pace(curve: dict[str, list[float]]) -> float:
    """Seconds a token, the median over the stretches between evaluations: a machine that others use stalls now and then."""
    points = list(zip(curve["seconds"], curve["tokens"], strict=True))
    return statistics.median((s1 - s0) / (t1 - t0) for (s0, t0), (s1, t1) in itertools.pairwise(points))


def tuned(args: argparse.Namespace, side: str) -> tuple[float, dict[str, list[tuple[float | None, float]]]]:
    """The rate that needs the fewest tokens to the target on the tuning seeds; where none gets there, that with the best accuracy at the end.
    Also what was found: tokens to the target, or None, and the last accuracy."""
    found: dict[str, list[tuple[float | None, float]]] = {}
    score: dict[str, tuple[float, float]] = {}
    for lr in args.rates:
        curves = [measure(args, side, seed, lr) for seed in args.tuning]
        tokens = [to_target(c, "tokens", args.target) for c in curves]
        last = [c["accuracy"][-1] for c in curves]
        found[f"{lr:g}"] = [(t if math.isfinite(t) else None, a) for t, a in zip(tokens, last, strict=True)]
        score[f"{lr:g}"] = sum(tokens), -sum(last)
    return float(min(score, key=lambda lr: score[lr])), found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.toml")
    parser.add_argument("--seeds", type=int, default=5, help="1, 2, …")
    parser.add_argument("--tuning", type=int, nargs="*", default=[101], help="seeds for the rates")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 4e-4, 8e-4])
    parser.add_argument("--fixed", nargs="*", default=[], metavar="SIDE=LR", help="sides that are not tuned")
    parser.add_argument("--parts", action="store_true", help="also run grpo and reinforce in our loop")
    parser.add_argument("--target", type=float, default=0.75)
    parser.add_argument("--cap", type=float, default=300.0, help="seconds of training for TRL, half of them for us")
    parser.add_argument("--every", type=int, default=4, help="steps between evaluations")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-trl"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    seeds, sides = range(1, args.seeds + 1), ["sppo", "TRL", *(RATE_OF if args.parts else ())]
    for seed in [*args.tuning, *seeds]:
        start(args, seed)
    rate, grid = {}, {}
    fixed = {side: float(lr) for side, _, lr in (text.partition("=") for text in args.fixed)}
    for side in ("sppo", "TRL"):
        rate[side], grid[side] = (fixed[side], {}) if side in fixed else tuned(args, side)
    rate |= {side: rate[of] for side, of in RATE_OF.items()}
    curves: dict[str, list[dict[str, list[float]]]] = {side: [] for side in sides}
    for i, seed in enumerate(seeds):  # in turns
        order = sides[i % len(sides) :] + sides[: i % len(sides)]
        for side in order:
            curves[side].append(measure(args, side, seed, rate[side]))
    seconds = {side: [to_target(c, "seconds", args.target) for c in runs] for side, runs in curves.items()}
    tokens = {side: [to_target(c, "tokens", args.target) for c in runs] for side, runs in curves.items()}
    paced = {side: [t * pace(c) for t, c in zip(tokens[side], runs, strict=True)] for side, runs in curves.items()}

    def ratio(costs: dict[str, list[float]], a: str, b: str) -> dict[str, Any]:
        pairs = [(x, y) for x, y in zip(costs[a], costs[b], strict=True) if math.isfinite(x) and math.isfinite(y)]
        return {k: v and round(v, 2) for k, v in ratio_interval([x / y for x, y in pairs]).items()} | {
            "pairs": len(pairs)
        }

    parts = [("throughput", "TRL", "grpo"), ("one_sample", "grpo", "reinforce"), ("critic", "reinforce", "sppo")]
    whole = ratio(seconds, "TRL", "sppo")
    speed = {side: [1 / pace(c) for c in runs] for side, runs in curves.items()}
    result = {
        "time_to_target_ratio": whole["value"], "low": whole["low"], "high": whole["high"], "pairs": whole["pairs"],
        "ratio_at_median_pace": ratio(paced, "TRL", "sppo"), "tokens_to_target_ratio": ratio(tokens, "TRL", "sppo"),
        "parts": {name: ratio(paced, a, b) for name, a, b in parts if a in curves and b in curves},
        "seconds_to_target": {side: [round(x, 1) if math.isfinite(x) else None for x in v] for side, v in seconds.items()},
        "tokens_per_second": {side: [round(x) for x in v] for side, v in speed.items()},
        "rates": rate, "grid_tokens_to_target_and_last_accuracy": grid, "target": args.target, "cap": args.cap, "recipe": args.recipe,
    }  # fmt: skip
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
