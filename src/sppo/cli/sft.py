"""`sppo sft`: supervised training on worked solutions (`solution` or `messages` columns, or a task that has them)."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, UserError
from ..recipe.config import Config
from ._shared import add_recipe_options, emit, overrides

if TYPE_CHECKING:
    from ..models.policy import Policy
    from ..report.progress import ProgressDisplay


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("sft", help="supervised start on worked solutions", description=__doc__)
    add_recipe_options(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="short for --bootstrap.steps")
    parser.add_argument("--lr", type=float, help="short for --bootstrap.lr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and write a model folder at --out."""
    from ..models.assembled import can_be_named
    from ..report.progress import ProgressDisplay
    from ..run.directory import no_space

    config = _config(args)
    out = Path(config.run.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is not empty; choose another folder for the model")
    display = ProgressDisplay(quiet=args.quiet)
    try:
        policy, loss, steps = _trained(config, display)
    finally:
        display.stop()
    with no_space(out):
        if policy.adapters is not None and not can_be_named(policy.base["name"]):
            policy.save_base(out / "base")
        policy.save(out)
    result = {"out": str(out), "steps": steps, "loss": loss, "policy_sha256": policy.sha256()}
    emit(result, args.json, f"loss {loss:.4f} after {steps} steps; the model is in {out}")
    return 0


def _config(args: argparse.Namespace) -> Config:
    """The recipe, in which `--steps` and `--lr` are those of the supervised training."""
    changes = {"run.out": "models/sft"} | overrides(args)
    for flag in ("steps", "lr"):
        changes.pop(f"training.{flag}", None)
        if getattr(args, flag) is not None:
            changes[f"bootstrap.{flag}"] = getattr(args, flag)
    if args.recipe is None and not {"policy.model", "task.train"} <= changes.keys():
        raise RecipeError("give a recipe, or --model and --data")
    return Config.load(args.recipe, changes)


def _trained(config: Config, display: ProgressDisplay) -> tuple[Policy, float, int]:
    """The trained policy, its last loss, and the number of steps."""
    from ..environments.loading import load_environment
    from ..learning.sft import Imitation, supervised
    from ..models.loading import pick_device
    from ..models.policy import Policy
    from ..models.weights import parameter_count
    from ..recipe.recipe import OF_ADAPTERS, bootstrap_rate
    from ..recipe.sections import BootstrapSection
    from ..rollout.trajectory import asked
    from ..tasks.loading import load_tasks

    section = config.bootstrap or BootstrapSection()
    source = load_tasks(
        section.task or config.task.train,
        instruction=config.task.instruction,
        default_split="train",
        columns=config.task.columns,
    )
    policy, stated = Policy.load(
        config.policy.model,
        dtype=config.policy.dtype,
        device=pick_device(),
        seed=config.seed,
        chat_template=config.policy.chat_template,
        adapter=config.adapter,
        quantize=config.policy.quantize,
    )
    display.note(stated)
    if section.lr is None:
        times = 1.0 if policy.adapters is None else OF_ADAPTERS
        section = section.model_copy(update={"lr": times * bootstrap_rate(parameter_count(policy.model))})
    display.stage("bootstrap", section.steps)

    def on_step(done: int, metrics: dict[str, float]) -> bool:
        display.step(done, dict(metrics))
        return True

    imitation = Imitation(policy, config.training.micro_budget)
    environment = load_environment(config.environment)
    metrics = supervised(
        policy, imitation, source, section, seed=config.seed, on_step=on_step, asked=partial(asked, environment, policy)
    )
    return policy, metrics["loss"], section.steps
