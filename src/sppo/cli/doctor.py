"""`sppo doctor`: what this machine has, and what a recipe would need of it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from typing import Any

from ..errors import UserError
from ._shared import add_recipe_options, emit, overrides

PACKAGES = ("torch", "transformers", "datasets", "math-verify", "reasoning-gym", "gguf")


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
        from ..config import Config

        plan = _plan(Config.load(args.recipe, changes))
        result["recipe"] = plan
        lines += ["", *(f"{name:<14}{value}" for name, value in plan.items() if name != "memory_bytes")]
        lines += [f"  {name:<24}{size / 2**30:7.2f} GiB" for name, size in plan["memory_bytes"].items()]
        needed, free = plan["memory_bytes"]["total"], _free_memory()
        verdict = "fits" if needed < free else "does NOT fit"
        plan["fits"] = needed < free
        lines.append(f"  about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free: {verdict}")
    emit(result, args.json, "\n".join(lines))
    return 0


def _free_memory() -> int:
    """Bytes free where the models will be: on the GPU if there is one."""
    import psutil
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else int(psutil.virtual_memory().available)


def _machine() -> dict[str, str]:
    import psutil
    import torch

    from ..models.pretrained import native_bfloat16, pick_device

    device = pick_device()
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else platform.machine()
    memory = psutil.virtual_memory()
    out = {
        "python": platform.python_version(),
        "device": f"{device} ({name}), {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "bfloat16": native_bfloat16(device) or "not native here: float32 is used",
        "memory": f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}",
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

    from ..models.compiled import NoCompiler, library

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


def _plan(config: Any) -> dict[str, Any]:
    """Names resolved, and memory by arithmetic: weights, optimiser, the cache of keys and values, one micro-batch."""
    from ..models.policy import parameter_count
    from ..models.pretrained import choose_dtype, outline, pick_device
    from ..rewards.base import load_reward
    from ..tasks.base import load_tasks

    tasks = load_tasks(config.task.train, instruction=config.task.instruction, default_split="train")
    reward = load_reward(config.reward.use)
    unfit = reward.check(tasks[0])
    reward.close()
    if unfit:
        raise UserError(f"reward.use = {config.reward.use!r} cannot grade {config.task.train} ({tasks[0].id}): {unfit}")
    name, device = config.policy.model, pick_device()
    said = {
        "problems": f"{config.task.train}: {len(tasks):,}, e.g. {tasks[0].text[:60]!r}",
        "reward": config.reward.use,
        "engine": config.rollout.engine,
        "algorithm": config.objective.algorithm,
    }
    if config.rollout.engine == "control":  # networks of a few thousand weights
        from ..models.control import SPEC, Shape, Taught

        for key, text, shape in (("policy.model", name, Taught), ("critic.model", config.critic.model, Shape)):
            if text.startswith(SPEC):
                shape.parse(key, text)
        return {"policy": name, "critic": config.critic.model, **said, "memory_bytes": {"total": 0}}
    model, critic = (
        outline(name, role="policy.model", head=True),
        outline(config.critic.model, role="critic.model", head=False),
    )
    parameters, critic_size = parameter_count(model), parameter_count(critic)
    dtype, why = choose_dtype(config.policy.dtype, parameters, device)
    c, size = model.config, dtype.itemsize
    width = config.task.max_prompt_tokens + config.rollout.max_tokens
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    sequences = min(config.rollout.batch, config.rollout.prompts * config.rollout.samples)
    memory = {
        "weights": parameters * size,
        "gradients": parameters * (size + (4 if size < 4 else 0)),
        "optimiser": parameters * (8 + (4 if size < 4 else 0)),
        "reference": parameters * size if config.needs_reference else 0,
        "cache, longest prompts": 2 * c.num_hidden_layers * sequences * heads * head_size * width * size,
        "one micro-batch, about": config.training.micro_tokens * c.num_hidden_layers * c.hidden_size * 24 * size,
    }
    critic_bytes = choose_dtype(config.critic.dtype, critic_size, device)[0].itemsize
    memory["critic and its optimiser"] = critic_size * (2 * critic_bytes + 8 + (8 if critic_bytes < 4 else 0))
    memory["total"] = sum(memory.values())
    return {
        "critic": f"{config.critic.model}: {critic_size / 1e6:.3g}M parameters",
        "policy": f"{name}: {parameters / 1e6:.3g}M parameters in {str(dtype).removeprefix('torch.')} ({why})",
        **said,
        "memory_bytes": memory,
    }
