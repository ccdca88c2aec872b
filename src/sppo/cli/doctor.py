"""`sppo doctor`: what this machine offers, and what a recipe needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from typing import Any

from ..errors import DataError, ModelError, UserError
from ..recipe.config import Config
from ..types import Task
from ._shared import add_recipe_options, emit, overrides

PACKAGES = ("torch", "transformers", "datasets", "reasoning-gym", "gguf")


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("doctor", help="what this machine has and a recipe needs", description=__doc__)
    add_recipe_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Report; with a recipe (or --model), also load its names and plan its memory."""
    machine = _machine()
    lines = [f"{name:<14}{value}" for name, value in machine.items()]
    result: dict[str, Any] = {"machine": machine}
    changes = overrides(args)
    if args.recipe or "policy.model" in changes:
        plan = _plan(Config.load(args.recipe, changes))
        result["recipe"] = plan
        lines += ["", *(f"{name:<14}{value}" for name, value in plan.items() if isinstance(value, str))]
        lines += [f"  {name:<30}{size / 2**30:7.2f} GiB" for name, size in plan["memory_bytes"].items() if size]
        if "capacity_bytes" in plan:
            needed, free = plan["memory_bytes"]["total"] / 2**30, plan["capacity_bytes"] / 2**30
            verdict = "fits" if plan["fits"] else "does NOT fit"
            lines.append(f"  about {needed:.1f} GiB needed at the peak, {free:.1f} GiB can be had: {verdict}")
    emit(result, args.json, "\n".join(lines))
    return 0


def _machine() -> dict[str, str]:
    import psutil

    from ..memory import free_ram
    from ..models.loading import native_bfloat16, pick_device, processor
    from ..threads import cores

    device = pick_device()
    memory = psutil.virtual_memory()
    allowed = cores()
    out = {
        "python": platform.python_version(),
        "device": f"{device}: {processor(device)}; {os.cpu_count()} CPU cores ({allowed} allowed)",
        "bfloat16": native_bfloat16(device) or "not native here: float32 is used",
        "memory": f"{free_ram() / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}",
        "disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here",
        "engines": f"local ({_decoding()})",
        "sandbox": _sandbox(),
    }
    for package in PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            extra = {"reasoning-gym": "gym", "gguf": "gguf"}.get(package)
            out[package] = f"not installed (pip install 'sppo[{extra}]')" if extra else "not installed"
    return out


def _decoding() -> str:
    import torch

    from ..kernels.cpu.build import NoCompiler, library

    try:
        for dtype in (torch.float32, torch.bfloat16):
            library("decode", dtype)
        return "on a CPU decoding is compiled for this processor"
    except NoCompiler as error:
        return f"decoding not compiled, about half as fast on a CPU: {error}"


def _sandbox() -> str:
    from ..errors import SandboxUnavailable
    from ..sandbox import Sandbox

    try:
        with Sandbox(slots=1):
            return "bwrap runs programs and isolates them (reward `code`)"
    except SandboxUnavailable as error:
        return f"not available for the reward `code`: {error}"


def _plan(config: Config) -> dict[str, Any]:
    """Resolve the recipe's names and plan memory as `train` does (run/plan.py).

    Missing data or network is reported, not raised.
    """
    from ..models.loading import choose_dtype, outline, pick_device
    from ..run.plan import Model, plan

    name, device = config.policy.model, pick_device()
    tasks, problems = _problems(config)
    said = {
        "problems": problems,
        "reward": config.reward.use,
        "engine": config.rollout.engine,
        "algorithm": f"{config.objective.algorithm}, {config.settled()[1]}",
    }
    if config.rollout.engine == "control":  # networks of a few thousand weights
        from ..models.mlp import SPEC, Shape, Taught

        for key, text, shape in (("policy.model", name, Taught), ("critic.model", config.critic.model, Shape)):
            if text.startswith(SPEC):
                shape.parse(key, text)
        return {"policy": name, "critic": config.critic.model, **said, "memory_bytes": {"total": 0}, "fits": True}

    def planned(name: str, dtype: str, head: bool) -> tuple[Model, str]:
        model = outline(name, role="policy.model" if head else "critic.model", head=head)
        count = Model(model, torch.float32).parameters
        chosen, why = choose_dtype(dtype, count, device)
        text = f"{name}: {count / 1e6:.3g}M parameters in {str(chosen).removeprefix('torch.')} ({why})"
        return Model(model, chosen), text

    import torch

    policy, said_policy = planned(name, config.policy.dtype, True)
    critic, said_critic = None, "none: the algorithm has no critic"
    if config.critic_reads is not None:
        critic, said_critic = planned(config.critic.model, config.critic.dtype, False)
    found = plan(config, policy, critic, device, _prompt_tokens(config, tasks))
    return {
        "critic": said_critic,
        "policy": said_policy,
        **said,
        "micro-batches": f"{found.micro_tokens:,} tokens"
        + ("" if config.training.micro_tokens else ", by the memory that is free here"),
        "memory_bytes": found.parts(),
        "phases": {phase: sum(found.stays.values()) + sum(parts.values()) for phase, parts in found.phases.items()},
        "largest phase": found.largest,
        "micro_tokens": found.micro_tokens,
        "capacity_bytes": found.capacity,
        "fits": found.fits,
    }


def _problems(config: Config) -> tuple[Any, str]:
    """The training problems, and what is said of them. Raises UserError where the reward cannot grade the first one."""
    from ..rewards.loading import load_reward
    from ..tasks.loading import load_tasks

    source = config.task.train
    try:
        tasks = load_tasks(
            source, instruction=config.task.instruction, default_split="train", columns=config.task.columns
        )
        first = tasks[0]
    except DataError as error:
        return None, f"{source}: not to be had here ({error}); prompts are counted at task.max_prompt_tokens"
    reward = load_reward(config.reward.use)
    unfit = reward.check(first)
    reward.close()
    if unfit:
        raise UserError(f"reward.use = {config.reward.use!r} cannot grade {source} ({first.id}): {unfit}")
    return tasks, f"{source}: {len(tasks):,}, e.g. {first.text[:60]!r}"


def _prompt_tokens(config: Config, tasks: Any) -> int:
    """A typical prompt's length by the model's tokenizer; without one, three characters count as one token."""
    from ..models.loading import load, load_tokenizer
    from ..run.plan import typical_prompt

    limit, name = config.task.max_prompt_tokens, config.policy.model
    if tasks is None:
        return limit
    try:
        small = name.partition(":")[0] == "tiny"
        tokenizer = load(name, role="policy.model", head=True)[1] if small else load_tokenizer(name, "policy.model")
    except ModelError:
        return typical_prompt(tasks, lambda task: -(-len(task.text) // 3), limit)

    def length(task: Task) -> int:
        chat = config.policy.chat_template == "auto" and getattr(tokenizer, "chat_template", None)
        text = render_chat(tokenizer, task) if chat and not isinstance(task.prompt, str) else task.text
        return len(tokenizer(text)["input_ids"])

    from ..models.loading import render_chat

    return typical_prompt(tasks, length, limit)
