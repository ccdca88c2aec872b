"""RMS norms, gated units and rotations on a GPU: ours (models/kernels.py), Liger's, PyTorch's. `make bench-elementwise`

8,192 tokens in bfloat16 at the sizes of SmolLM2-135M and Qwen2.5-1.5B. Each side passes over several sets of inputs, more
than the GPU's cache holds, in turns with the others. Liger overwrites inputs and gradients, so they are restored between
passes, outside the clock.

    µs          one pass as the GPU runs it: a captured graph, so without launches
    launched    forward and backward as Python launches it
    MiB         what forward and backward take above inputs and gradients
    error       ‖x − x₆₄‖ / ‖x₆₄‖ against float64: of the output, and the largest of a gradient
    same        whether two passes give the same bits, weights' gradient included

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

import workload

TOKENS, EPSILON = 8192, 1e-5
SETS = 4
"""Sets of inputs that a timed pass goes through."""
SIZES = {
    "SmolLM2-135M": {"width": 576, "inner": 1536, "heads": (9, 3), "head": 64},
    "Qwen2.5-1.5B": {"width": 1536, "inner": 8960, "heads": (12, 2), "head": 128},
}
Way = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Operation:
    """One operation: every side's way from inputs to outputs, and the inputs' shapes. The first two have gradients."""

    ways: dict[str, Way]
    shapes: Sequence[tuple[int, ...]]


def plain_norm(x: Any, weight: Any) -> tuple[Any, ...]:
    """In float32 at least, rounded before the weights as transformers does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype),)


def plain_unit(gate: Any, up: Any) -> tuple[Any, ...]:
    """silu(gate) · up."""
    return (functional.silu(gate) * up,)


def plain_turned(query: Any, key: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
    """Queries and keys, [1, N, heads, D], by angles [1, N, D], as transformers turns them."""

    def turn(x: Any) -> Any:
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)

    return turn(query), turn(key)


def operations(size: dict[str, Any]) -> dict[str, Operation]:
    """What is compared, at one model's sizes."""
    from sppo.kernels.elementwise import gated_unit, rms_norm, turned

    norm: dict[str, Way] = {"PyTorch": plain_norm, "sppo": lambda x, w: (rms_norm(x, w, EPSILON),)}
    unit: dict[str, Way] = {"PyTorch": plain_unit, "sppo": lambda gate, up: (gated_unit(gate, up),)}
    turn: dict[str, Way] = {
        "PyTorch": plain_turned,
        "sppo": lambda query, key, cos, sin: (turned(query, cos, sin), turned(key, cos, sin)),
    }
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def liger_turned(query: Any, key: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
            both = LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
            return tuple(x.transpose(1, 2) for x in both)

        norm["Liger"] = lambda x, w: (LigerRMSNormFunction.apply(x, w, EPSILON),)
        unit["Liger"] = lambda gate, up: (LigerSiLUMulFunction.apply(gate, up),)
        turn["Liger"] = liger_turned
    except ImportError:
        print("without Liger: pip install liger-kernel")
    angle = (1, TOKENS, size["head"])
    rotated = [(1, TOKENS, heads, size["head"]) for heads in size["heads"]]
    return {
        "norm": Operation(norm, [(1, TOKENS, size["width"]), (size["width"],)]),
        "gated unit": Operation(unit, [(1, TOKENS, size["inner"])] * 2),
        "rotation": Operation(turn, [*rotated, angle, angle]),
    }


@dataclass
class Inputs:
    """One set of inputs and of the outputs' gradients, with what they are restored from."""

    given: list[Any]
    grads: list[Any]
    kept: list[Any]

    @classmethod
    def drawn(cls, operation: Operation, seed: int, device: str) -> Inputs:
        """Fresh random numbers."""
        made = torch.Generator(device).manual_seed(seed)
        given = [torch.randn(shape, generator=made, device=device) for shape in operation.shapes]
        if angles := given[2:]:  # one for each pair of a head's numbers
            half = 3 * angles[0][..., : angles[0].size(-1) // 2]
            given[2:] = [f(torch.cat((half, half), -1)) for f in (torch.cos, torch.sin)]
        given = [x.bfloat16() for x in given]
        outputs = operation.ways["PyTorch"](*given)
        grads = [torch.randn(y.shape, generator=made, device=device).bfloat16() for y in outputs]
        kept = [x.clone() for x in (*given, *grads)]
        return cls([x.requires_grad_(i < 2) for i, x in enumerate(given)], grads, kept)

    def wide(self) -> Inputs:
        """The same in float64."""
        given, grads = self.kept[: len(self.given)], self.kept[len(self.given) :]
        return Inputs([x.double().requires_grad_(i < 2) for i, x in enumerate(given)], [g.double() for g in grads], [])

    def restore(self) -> None:
        """As they were drawn."""
        with torch.no_grad():
            for x, kept in zip((*self.given, *self.grads), self.kept, strict=True):
                x.detach().copy_(kept)

    def forward(self, way: Way) -> tuple[Any, ...]:
        """The outputs."""
        return way(*self.given)

    def both(self, way: Way) -> list[Any]:
        """The outputs and the gradients."""
        out = way(*self.given)
        return [*out, *torch.autograd.grad(out, self.given[:2], self.grads)]


def accuracy(operation: Operation, way: Way, inputs: Inputs) -> dict[str, Any]:
    """Errors against float64, and whether two passes agree to the bit."""
    true = [x.detach() for x in inputs.wide().both(operation.ways["PyTorch"])]
    passes = []
    for _ in range(2):
        inputs.restore()
        passes.append([x.detach().clone() for x in inputs.both(way)])
    outputs = len(inputs.grads)
    error = [float((x.double() - y).norm() / y.norm()) for x, y in zip(passes[0], true, strict=True)]
    return {
        "error": max(error[:outputs]),
        "grad_error": max(error[outputs:]),
        "same": all(torch.equal(x, y) for x, y in zip(*passes, strict=True)),
    }


def captured(run: Callable[[], Any]) -> Any:
    """A CUDA graph of what a function does; it has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def clocked(run: Callable[[], Any], by_gpu: bool) -> float:
    """Microseconds per set of inputs."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    begin.record()
    run()
    end.record()
    seconds = workload.since(began)
    return (1000 * begin.elapsed_time(end) if by_gpu else 1e6 * seconds) / SETS


def prepared(
    operation: Operation, way: Way, sets: Sequence[Inputs]
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """One side's figures that need no clock, and what is to be timed."""
    found = accuracy(operation, way, sets[0])
    if not sets[0].given[0].is_cuda:
        return found, {}

    def forward() -> None:
        for inputs in sets:
            inputs.forward(way)

    def both() -> None:
        for inputs in sets:
            inputs.both(way)

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # a capture wants everything compiled, and run beside the main stream
        forward()
        both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sets[0].both(way)
    found["mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    return found, {
        "forward_us": captured(forward).replay, "both_us": captured(both).replay, "launched_us": both
    }  # fmt: skip


def measure(operation: Operation, rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Every side in turns."""
    sets = [Inputs.drawn(operation, seed, device) for seed in range(SETS)]
    found: dict[str, dict[str, Any]] = {}
    timed: list[tuple[str, str, Callable[[], Any]]] = []
    for side, way in operation.ways.items():
        try:
            found[side], runs = prepared(operation, way, sets)
        except Exception as problem:  # a peer that does not run here is no reason to say nothing of the others
            print(f"{side}: {problem!r}"[:200])
            continue
        timed += [(side, kind, run) for kind, run in runs.items()]
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for side, kind, run in timed:
            for inputs in sets:
                inputs.restore()
            taken.setdefault((side, kind), []).append(clocked(run, kind != "launched_us"))
    for (side, kind), values in taken.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[side] |= {kind: round(middle, 1), f"{kind}_quartiles": [round(low, 1), round(high, 1)]}
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", default="cuda", help="cpu: errors alone, where there is a compiler for ours")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    result: dict[str, Any] = {}
    for model, size in SIZES.items():
        for name, operation in operations(size).items():
            result[f"{model}, {name}"] = measured = measure(operation, args.rounds, args.device)
            for side, f in measured.items():
                times = "   ".join(f"{f.get(k, 0):8.1f}" for k in ("forward_us", "both_us", "launched_us"))
                print(
                    f"{model}   {name:<10}   {side:<8} µs {times}   {f.get('mib', 0):5} MiB   "
                    f"error {f['error']:.2e} {f['grad_error']:.2e}   same {f['same']}", flush=True,
                )  # fmt: skip
    workload.finish({"elementwise": result, "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"})


if __name__ == "__main__":
    main()
