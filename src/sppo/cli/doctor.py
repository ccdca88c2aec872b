"""`sppo doctor`: what this machine offers, and what a recipe needs, here or on a GPU of a given size. It asks no network."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from typing import Any

from ..errors import DataError, ModelError, UserError
from ..recipe.config import Config
from ..types import Task
from ._shared import add_recipe_options, emit, overrides

PACKAGES = ("torch", "transformers", "datasets", "reasoning-gym", "peft", "bitsandbytes", "gguf")
EXTRAS = {"reasoning-gym": "gym", "gguf": "gguf", "peft": "adapters", "bitsandbytes": "adapters"}
USABLE = 0.98
"""Of the memory that a GPU is named after: a card of 24 GB offers 23.5 GiB, one of 80 GB 79."""
GIB = 2**30


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("doctor", help="what this machine has and a recipe needs", description=__doc__)
    add_recipe_options(parser)
    parser.add_argument(
        "--gpu", type=_gpu, metavar="SIZE", help="plan for a GPU of this memory, e.g. 24GB; it need not be here"
    )
    parser.set_defaults(run=run)


def _gpu(text: str) -> int:
    """Usable bytes of a GPU that is said to have `24GB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if found is None or not 0 < float(found[1]) < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a GPU; write it as 24GB")
    return int(float(found[1]) * USABLE * GIB)


def run(args: argparse.Namespace) -> int:
    """Report; with a recipe (or --model), also load its names and plan its memory: 1 if it does not fit."""
    changes = overrides(args)
    if args.recipe is None and "policy.model" not in changes and args.gpu:
        raise UserError("--gpu plans a recipe: give one, or --model")
    machine = _machine()
    lines = [f"{name:<14}{value}" for name, value in machine.items()]
    result: dict[str, Any] = {"machine": machine}
    if args.recipe or "policy.model" in changes:
        with _offline():
            plan = _plan(Config.load(args.recipe, changes), args.gpu)
        result["recipe"] = plan
        if args.gpu:
            lines += ["", f"For a GPU of {args.gpu / USABLE / GIB:.0f} GB, wherever it is:"]
        lines += ["", *(f"{name:<14}{value}" for name, value in plan.items() if isinstance(value, str)), *_table(plan)]
    emit(result, args.json, "\n".join(lines))
    return 0 if result.get("recipe", {}).get("fits", True) else 1


def _table(plan: dict[str, Any]) -> list[str]:
    """The plan for people: parts of the peak, phases, the verdict, and what would help."""
    lines = [f"  {name:<30}{size / GIB:7.2f} GiB" for name, size in plan["memory_bytes"].items() if size]
    if "capacity_bytes" not in plan:
        return lines
    phases = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan["phases"].items())
    lines += [
        f"  by phase: {phases} GiB",
        f"  {_needed(plan.get('planned for', ''), plan['memory_bytes'], plan['capacity_bytes'])}",
    ]
    if "worker_bytes" in plan:
        parts = [
            f"{name} {size / GIB:.1f}"
            for name, size in plan["worker_bytes"].items()
            if size > GIB / 20 and name != "total"
        ]
        lines += [
            f"  {_needed('each rollout worker', plan['worker_bytes'], plan['worker_capacity_bytes'])}",
            f"    {', '.join(parts)} GiB",
        ]
        if not plan["worker_fits"]:
            lines.append("    lower rollout.batch, or choose a smaller model")
    if plan["host_bytes"]:
        lines.append(
            f"  and {sum(plan['host_bytes'].values()) / GIB:.1f} GiB of main memory ({', '.join(plan['host_bytes'])})"
        )
    if changes := plan["changes"]:
        alone = changes[0]["fits"] and len(changes) > 1 and changes[1]["fits"]
        lines.append("  any of these makes it fit, the cheapest first:" if alone else "  what would help most:")
        width = max(len(change["keys"]) for change in changes)
        lines += [
            f"    {change['keys']:<{width}}  saves {change['saved_bytes'] / GIB:.1f} GiB; {change['cost']}"
            for change in changes
        ]
        verdict = "fits" if plan["fits_with_changes"] else "still does NOT fit"
        if not alone:
            lines.append(f"    with this: about {plan['bytes_with_changes'] / GIB:.1f} GiB: {verdict}")
    return lines


def _needed(whose: str, parts: dict[str, int], capacity: int) -> str:
    """Whether one process fits, as people say it."""
    who = f"{whose}: " if whose else ""
    verdict = "fits" if parts["total"] < capacity else "does NOT fit"
    return (
        f"{who}about {parts['total'] / GIB:.1f} GiB needed at the peak, {capacity / GIB:.1f} GiB can be had: {verdict}"
    )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the hub's client read its cache alone: a plan waits for nothing, and says what is not there."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
        "memory": f"{free_ram() / GIB:.1f} GiB free of {memory.total / GIB:.1f}",
        "disk": f"{shutil.disk_usage('.').free / GIB:.0f} GiB free here",
        "engines": f"local ({_decoding()})",
        "sandbox": _sandbox(),
    }
    for package in PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            extra = EXTRAS.get(package)
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


def _plan(config: Config, gpu: int | None) -> dict[str, Any]:
    """Resolve the recipe's names and plan memory as `train` does (run/planning.py).

    Missing data is reported, not raised.
    """
    from ..run.outlines import Outlines
    from ..run.remedies import remedies

    name = config.policy.model
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
    outlines = Outlines(gpu)
    _, said_policy = outlines.policy(config)
    _, said_critic = outlines.critic(config)
    prompt = _prompt_tokens(config, tasks)
    found = outlines.plan(config, prompt)
    changes, after = ([], found) if found.fits else remedies(config, lambda c: outlines.plan(c, prompt))
    worker = None if config.cluster is None else outlines.plan_of_worker(config, prompt)
    beside = (
        {}
        if worker is None
        else {"worker_bytes": worker.parts(), "worker_capacity_bytes": worker.capacity, "worker_fits": worker.fits}
    )
    return {
        "critic": said_critic,
        "policy": said_policy,
        **said,
        **({"planned for": found.whose} if found.whose else {}),
        "micro-batches": f"{found.micro_tokens:,} tokens"
        + ("" if config.training.micro_tokens else ", by the memory that can be had"),
        "memory_bytes": found.parts(),
        "host_bytes": found.host,
        "phases": {phase: sum(found.stays.values()) + sum(parts.values()) for phase, parts in found.phases.items()},
        "largest phase": found.largest,
        "micro_tokens": found.micro_tokens,
        "capacity_bytes": found.capacity,
        "fits": found.fits and (worker is None or worker.fits),
        **beside,
        "changes": [
            {"keys": str(r.change), "saved_bytes": r.saved, "fits": r.fits, "cost": r.change.cost} for r in changes
        ],
        "bytes_with_changes": after.total,
        "fits_with_changes": after.fits,
    }


def _problems(config: Config) -> tuple[Any, str]:
    """The training problems, and what is said of them. Raises UserError where the reward cannot grade the first one."""
    import torch

    from ..rewards.loading import load_reward
    from ..run.footprint import reward_models
    from ..tasks.loading import load_tasks

    source = config.task.train
    try:
        tasks = load_tasks(
            source, instruction=config.task.instruction, default_split="train", columns=config.task.columns
        )
        first = tasks[0]
    except DataError as error:
        return None, f"{source}: not to be had here ({error}); prompts are counted at task.max_prompt_tokens"
    if reward_models(config.reward.use, torch.device("cpu")):  # they are counted, not loaded
        return tasks, f"{source}: {len(tasks):,}, e.g. {first.text[:60]!r}"
    reward = load_reward(config.reward.use)
    unfit = reward.check(first)
    reward.close()
    if unfit:
        raise UserError(f"reward.use = {config.reward.use!r} cannot grade {source} ({first.id}): {unfit}")
    return tasks, f"{source}: {len(tasks):,}, e.g. {first.text[:60]!r}"


def _prompt_tokens(config: Config, tasks: Any) -> int:
    """A typical prompt's length by the model's tokenizer; without one, three characters count as one token."""
    from ..models.loading import load, load_tokenizer
    from ..run.prompts import typical_prompt

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
