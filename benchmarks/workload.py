"""What the speed benchmarks share: the model, the prompts, and how two sides are timed in turns."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODEL = "models/smollm2-135m"
FAMILIES = (
    "chain_sum", "basic_arithmetic", "word_sorting", "letter_counting", "spell_backward", "leg_counting", "number_sorting", "gcd",
)  # fmt: skip


def model_folder() -> str:
    """SmolLM2-135M, or a sentence that says how to get it."""
    if not Path(MODEL, "config.json").exists():
        sys.exit(f"there is no {MODEL} yet; fetch it with: sppo pull smollm2-135m")
    return MODEL


def prompts(policy: Any, count: int) -> list[list[int]]:
    """Questions of eight kinds in the model's chat template, 40 to 240 tokens: their answers end by themselves, some at once, some never."""
    from sppo.tasks.loading import load_tasks

    sources = [load_tasks(f"gym:{family}") for family in FAMILIES]
    return [policy.prompt_ids(sources[i % len(sources)][i]) for i in range(count)]


def digits(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing: the share of digits."""
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in map(str, completions)]


def interleaved(sides: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Every side's figure in every round, the order turning round by round; prints as it goes."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            figure = sides[name](turn)
            found[name].append(figure)
            print(f"round {turn + 1}  {name:<22} {figure:10.1f}   ({time.perf_counter() - began:.1f} s)", flush=True)
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of ours / theirs."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def since(began: float) -> float:
    """Seconds since `time.perf_counter()` said `began`, when all that was asked of a GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes() -> int:
    """The most memory this process ever held: on the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def finish(result: dict[str, Any]) -> None:
    """The last line of a benchmark."""
    print(json.dumps(result))
