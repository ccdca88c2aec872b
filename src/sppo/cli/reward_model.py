"""`sppo reward-model train`: a reward model from preference pairs (`chosen`, `rejected`) or labels (`response`,
`label`)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._shared import emit


def add(subparsers: Any) -> None:
    """Register the command."""
    group = subparsers.add_parser("reward-model", help="train a reward model", description="Learned rewards.")
    commands = group.add_subparsers(metavar="COMMAND", required=True)
    parser = commands.add_parser("train", help="from preferences or labels", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="a .jsonl/.json/.parquet file of pairs or labels")
    parser.add_argument("--model", required=True, help="the start: a model folder, a hub name, a run, or 'tiny:…'")
    parser.add_argument("--out", default="models/reward-model", metavar="DIR", help="[models/reward-model]")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the data [1]")
    parser.add_argument("--batch", type=int, default=32, help="rows per update [32]")
    parser.add_argument(
        "--lr", type=float, help="peak learning rate; default by size: 1e-3, 5e-5 above 10M parameters, 1e-5 above 1B"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="longer rows are left out and counted [2048]")
    parser.add_argument(
        "--micro-tokens", type=int, default=8192, help="tokens per micro-batch; affects memory only [8192]"
    )
    parser.add_argument("--seed", type=int, default=1, help="order of the rows, start of the head [1]")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, measure on the held-out tenth, write a model folder."""
    from ..evaluation.intervals import accuracy_interval
    from ..learning.reward_model import encode, judge, train_reward_model, updates
    from ..models.loading import pick_device
    from ..models.reward_model import RewardModel
    from ..models.weights import parameter_count
    from ..report.progress import ProgressDisplay
    from ..run.directory import newest_policy, no_space
    from ..tasks.preferences import Pair, read_preferences

    if min(args.epochs, args.batch, args.max_tokens, args.micro_tokens) < 1 or (args.lr is not None and args.lr <= 0):
        raise UserError("--epochs, --batch, --lr, --max-tokens and --micro-tokens must be above 0")
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is not empty; choose another folder for the reward model")
    rows = read_preferences(Path(args.data))
    display = ProgressDisplay(quiet=args.quiet)
    path = Path(args.model).expanduser()
    name = str((newest_policy(path) if path.is_dir() else None) or args.model)
    model, stated = RewardModel.load(name, device=pick_device(), seed=args.seed, fresh=True)
    display.note(stated)
    train, held_out, too_long = encode(model, rows, args.max_tokens)
    if too_long:
        display.note(f"warning: {too_long} of {len(rows)} rows are over the limit of tokens and left out")
    size = parameter_count(model)
    lr = args.lr or (1e-3 if size < 10_000_000 else 5e-5 if size < 1_000_000_000 else 1e-5)
    display.stage("reward model", updates(len(train), args.epochs, args.batch))

    def on_step(done: int, metrics: dict[str, float]) -> bool:
        display.step(done, dict(metrics))
        return True

    try:
        metrics = train_reward_model(
            model, train, epochs=args.epochs, batch=args.batch, lr=lr, micro_tokens=args.micro_tokens, seed=args.seed,
            on_step=on_step,
        )  # fmt: skip
    finally:
        display.stop()
    loss, right = judge(model, held_out, args.micro_tokens) if held_out else (None, [])
    accuracy, low, high = accuracy_interval(right, 1)
    with no_space(out):
        model.save(out)
    kind = "pairs" if isinstance(rows[0], Pair) else "labels"
    result = {
        "out": str(out), "kind": kind, "n": len(rows), "held_out": len(held_out), "left_out": too_long,
        "train_loss": metrics["loss"], "loss": loss, "accuracy": accuracy if right else None,
        "accuracy_low": low if right else None, "accuracy_high": high if right else None, "lr": lr, "seed": args.seed,
    }  # fmt: skip
    said = (
        f"{accuracy:.3f} of {len(held_out)} held-out {kind} judged rightly (95% interval {low:.3f} to {high:.3f})"
        if right
        else "warning: too few rows to hold any out, so nothing was measured"
    )
    emit(result, args.json, f"{said}\nuse it: --reward.use model:{out}")
    return 0
