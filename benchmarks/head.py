"""The output projection with its log-softmax on a GPU, forward and backward, against other ways to have it. `make bench-head`

sppo            chunks of float32 logits, each weighed by one kernel (kernels/cuda/head.py); also gives the entropy
full logits     bfloat16 logits of all tokens, widened: the ordinary way
Liger, cut-cross-entropy    where they are installed; a loss a target, as ours

Milliseconds, the memory that a pass takes above its inputs and gradients, and the largest error of a log-probability against
float64. The sizes are SmolLM2-135M's and Llama-3-8B's. Last line: one JSON object.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import workload

SIZES = {"SmolLM2-135M, 6,144 tokens": (6144, 576, 49152), "Llama-3-8B, 4,096 tokens": (4096, 4096, 128256)}


def ways(hidden: Any, weight: Any, target: Any) -> dict[str, Callable[[], Any]]:
    """What gives the log-probabilities of targets, [N]."""
    from sppo.kernels.logprobs import token_logps

    found: dict[str, Callable[[], Any]] = {
        "sppo": lambda: token_logps(hidden, weight, None, target, 1.0)[0],
        "full logits": lambda: (hidden @ weight.t()).float().log_softmax(-1).gather(-1, target[:, None])[:, 0],
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger() -> Any:
            given = liger_fused_linear_cross_entropy(hidden, weight, target, reduction="none")
            return -(given[0] if isinstance(given, tuple) else getattr(given, "loss", given))

        found["Liger"] = liger
    except ImportError:
        print("without Liger: pip install liger-kernel")
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda: -linear_cross_entropy(hidden, weight, target, reduction="none")
    except ImportError:
        print("without cut-cross-entropy: pip install cut-cross-entropy")
    return found


def measure(tokens: int, size: int, vocabulary: int, rounds: int) -> dict[str, dict[str, float]]:
    """Every way in turns."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size, device="cuda").bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, size, device="cuda")).bfloat16().requires_grad_()
    target, grad = torch.randint(vocabulary, (tokens,), device="cuda"), torch.randn(tokens, device="cuda")
    few = slice(0, 256)
    true = (hidden[few].double() @ weight.double().t()).log_softmax(-1).gather(-1, target[few, None])[:, 0].detach()
    sides, out, seconds = ways(hidden, weight, target), {}, {}
    for name, way in sides.items():
        try:
            for _ in range(2):  # what is compiled or tuned the first time; gradients are there from now on
                (way() * grad).sum().backward()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            (way() * grad).sum().backward()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            with torch.no_grad():
                error = float((way()[few].double() - true).abs().max())
        except Exception as problem:  # a peer that does not run here is no reason to say nothing of the others
            print(f"{name}: {problem!r}"[:200])
            continue
        out[name], seconds[name] = {"mib": round(peak), "largest_error": error}, []
    for _ in range(rounds):
        for name in out:
            torch.cuda.synchronize()
            began = time.perf_counter()
            (sides[name]() * grad).sum().backward()
            seconds[name].append(workload.since(began))
    return {name: {"ms": round(1000 * statistics.median(seconds[name]), 2), **rest} for name, rest in out.items()}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU; on a CPU, make bench-update compares the head with full logits")
    result = {}
    for name, sizes in SIZES.items():
        result[name] = measure(*sizes, rounds=7)
        for side, figures in result[name].items():
            print(
                f"{name}   {side:<18} {figures['ms']:8.2f} ms {figures['mib']:8.0f} MiB   {figures['largest_error']:.1e}"
            )
    workload.finish({"head": result, "device": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main()
