"""Layouts for models of 1.5B to 70B on GPUs of 80 GB: memory per learner rank and per rollout worker, and the expected use of the GPUs.

Memory is the plan's (run/planning.py, run/shares.py), for a GPU that need not be here. vLLM takes nine tenths of a worker's GPU, and what weights
leave of it is for keys and values.

Times are by arithmetic from the assumptions of `ASSUMED`; nothing of it was measured on GPUs. cluster_sim.py simulates with them (`--assume 8B`).
Last line: one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from cluster.events import simulate
from cluster.model import Layout, Measured
from sppo.errors import UserError
from sppo.models.shapes import SHAPES as KNOWN
from sppo.recipe.config import Config
from sppo.run.footprint import Model, Sizes
from sppo.run.plan import GIB
from sppo.run.planning import plan, plan_of_worker

GPU = int(80 * 0.98 * GIB)
"""Usable bytes of a card of 80 GB, as `sppo doctor` counts them."""
_LARGE_QWEN = {
    "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
_LARGE_LLAMA = KNOWN["meta-llama/Llama-3.1-8B-Instruct"] | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": KNOWN["Qwen/Qwen2.5-1.5B-Instruct"],
    "8B": KNOWN["meta-llama/Llama-3.1-8B-Instruct"],
    "32B": _LARGE_QWEN,
    "70B": _LARGE_LLAMA,
}
"""Qwen 2.5 1.5B, Llama 3.1 8B, Qwen 2.5 32B, Llama 3.1 70B, from their published config.json."""
CRITIC = KNOWN["Qwen/Qwen2.5-0.5B"]
PROMPT, RESPONSE, RESPONSES = 512, 4096, 1024
"""Tokens of a prompt and of a response at their limits; responses per step."""


@dataclass(frozen=True)
class Planned:
    """A layout of the table: GPUs by what they do, and what a recipe needs for it."""

    model: str
    learners: int
    rollouts: int
    shards: int
    gather: str
    micro_tokens: int
    engine: str
    rollout_gpus: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.learners + self.rollouts * self.rollout_gpus


TABLE = (
    Planned("1.5B", 2, 6, 1, "update", 8192, "local"),
    Planned("8B", 4, 12, 4, "layer", 8192, "local"),
    Planned("32B", 16, 48, 16, "layer", 8192, "vllm"),
    Planned("70B", 32, 8, 32, "layer", 4096, "vllm", 4),
)
CUDA = torch.device("cuda")
SHARE = 0.9
"""Of a GPU that vLLM takes where it is alone there (`vllm:memory=0.9`)."""

ASSUMED = {
    "peak_flops": 989e12,  # dense bfloat16 of an H100 SXM
    "mfu": 0.35,  # of updates, 6 operations per parameter and token; others report 32% to 36% for 4B to 8B
    "memory_bytes_per_second": 0.6 * 3.35e12,  # of decoding: weights, keys and values are read once per pass
    "decode_flops_share": 0.5,  # of the peak, where products bind a pass
    "pass_overhead": 0.003,  # seconds of a decoding pass besides
    "node_bytes_per_second": 300e9,  # NVLink, by which a rank gets or gives
    "between_bytes_per_second": 40e9,  # 400 Gbit/s per GPU
    "overlap": 0.8,  # of passes behind which FSDP's exchanges hide
    "transfer_bytes_per_second": 1e9,  # through the host, by gloo
    "transfer_fixed": 2.0,  # seconds: fingerprints, canary
    "verdict": 0.005,  # seconds, of mathematics
    "driver": 1.0,  # seconds per step: monitors, recording
    "sigma": 0.7,  # of the logarithm of lengths
    "mean": 1200.0,  # tokens of a response, before the limit
    "prompt": 200.0,  # tokens, mean
}
"""What the expected use rests on."""
PROMPT_MEAN = int(ASSUMED["prompt"])


def recipe(batch: int, micro_tokens: int, more: dict[str, Any]) -> Config:
    """All weights trained, activations recomputed, a small critic that reads the prompt."""
    keys = {
        "rollout.prompts": RESPONSES, "rollout.max_tokens": RESPONSE, "rollout.batch": batch, "task.max_prompt_tokens": PROMPT,
        "training.checkpoint_activations": True, "training.micro_tokens": micro_tokens, "training.minibatches": 2, "evaluation.n": 256,
    }  # fmt: skip
    return Config.load(None, keys | more)


@cache
def outline(name: str, head: bool = True) -> Model:
    """A shape without weights, in bfloat16. Raises UserError for a name that is none."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if name not in SHAPES and head:
        raise UserError(f"no shape {name}: there are {', '.join(SHAPES)}")
    with torch.device("meta"):
        config = AutoConfig.for_model(**(SHAPES[name] if head else CRITIC))
        return Model((AutoModelForCausalLM if head else AutoModel).from_config(config), torch.bfloat16)


def learner_bytes(name: str, shards: int, gather: str, micro_tokens: int = 8192) -> dict[str, int]:
    """The peak of one learner rank of `shards`, by purpose: the critic reads the prompt, and is divided as well."""
    cluster = {"cluster.learners": shards, "cluster.shards": shards, "cluster.gather": gather}
    found = plan(recipe(1, micro_tokens, cluster), outline(name), outline("critic", head=False), CUDA, PROMPT_MEAN, GPU)
    return {part: size for part, size in found.parts().items() if size and part != "total"}


def rollout_batch(name: str, engine: str, gpus: int) -> int:
    """Sequences that a worker's memory has room for: at their longest (`local`, a power of two), or at their mean (`vllm`)."""
    model = outline(name)
    z = Sizes.of(model.outline)
    token = 2 * z.layers * z.keys * model.size
    if engine == "vllm":
        room = SHARE * gpus * GPU - model.base - gpus * 2 * GIB  # activations, graphs
        return int(room / token / (ASSUMED["prompt"] + ASSUMED["mean"]))
    fits = (1 << k for k in range(9, -1, -1))
    return next(n for n in fits if sum(rollout_bytes(name, n, engine, gpus).values()) < GPU)


def rollout_bytes(name: str, batch: int, engine: str, gpus: int) -> dict[str, int]:
    """The peak of one GPU of a rollout worker."""
    if engine == "vllm":
        weights = outline(name).base // gpus
        return {"weights": weights, "vLLM beside them": int(SHARE * GPU) - weights}
    found = plan_of_worker(recipe(batch, 8192, {"cluster.rollouts": 1}), outline(name), CUDA, PROMPT_MEAN, GPU)
    return {part: size for part, size in found.parts().items() if size and part != "total"}


def assumed(name: str) -> Measured:
    """What a step's parts take on H100s, by arithmetic, with the engine and the workers of `TABLE`. Raises UserError for a name that is none."""
    a, model = ASSUMED, outline(name)
    p = next(p for p in TABLE if p.model == name)
    rollout_gpus = p.rollout_gpus
    sizes, parameters = Sizes.of(model.outline), model.parameters
    context = a["prompt"] + a["mean"]
    kept = 2 * sizes.layers * sizes.keys * model.size * context  # keys and values of one sequence, half way on average

    def seconds(live: int) -> float:
        read = (parameters * model.size + live * kept) / a["memory_bytes_per_second"]
        multiplied = 2 * parameters * live / (a["decode_flops_share"] * a["peak_flops"])
        return max(read, multiplied) / rollout_gpus + a["pass_overhead"]

    transfer = parameters * model.size / a["transfer_bytes_per_second"] + a["transfer_fixed"]
    return Measured(
        responses=RESPONSES, lengths={"lognormal": a["sigma"], "mean": a["mean"], "limit": float(RESPONSE)},
        decode=[[float(live), seconds(live)] for live in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)],
        train=6 * parameters / (a["mfu"] * a["peak_flops"]), prompt=a["prompt"], slots=rollout_batch(name, p.engine, rollout_gpus),
        prefill=2 * parameters / (a["decode_flops_share"] * a["peak_flops"]) / rollout_gpus, call=0.1,
        verdicts=[[a["verdict"], 1.0]], minibatches=2, optimiser=32 * parameters / a["memory_bytes_per_second"], micro_tokens=float(p.micro_tokens),
        gathered=float(2 * parameters), reduced=float(4 * parameters), bandwidth=a["node_bytes_per_second"],
        bandwidth_between=a["between_bytes_per_second"], overlap=a["overlap"], transfer=transfer, driver=a["driver"],
        evaluate_every=20, evaluated=256,
    )  # fmt: skip


def row(p: Planned) -> dict[str, Any]:
    """A line of the table."""
    m = assumed(p.model)
    learner = learner_bytes(p.model, p.shards, p.gather, p.micro_tokens)
    worker = rollout_bytes(p.model, m.slots, p.engine, p.rollout_gpus)
    peaks = {"learner_gib": sum(learner.values()) / GIB, "rollout_gib": sum(worker.values()) / GIB}
    found = [simulate(m, Layout(p.learners, p.rollouts, lag, 0, p.shards, p.gather)) for lag in (0, 1)]
    return {
        **asdict(p), "gpus": p.gpus, "parameters": outline(p.model).parameters, "batch": m.slots, **peaks, "capacity_gib": GPU / GIB,
        "fits": max(peaks.values()) * GIB < GPU, "learner_bytes": learner, "rollout_bytes": worker,
        "simulated": [{"lag": lag, **asdict(f), "binds": f.binds} for lag, f in enumerate(found)],
    }  # fmt: skip


def said(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        f"{'model':<6}{'GPUs':>5}{'learners':>10}{'shards':>8}{'gather':>8}{'rollouts':>10}{'batch':>7}{'rank':>10}{'worker':>10}"
        f"{'lag':>5}{'step':>8}{'ranks':>7}{'workers':>9}  binds"
    ]
    for r in rows:
        rollouts = f"{r['rollouts']} x {r['rollout_gpus']}"
        for x in r["simulated"]:
            lines.append(
                f"{r['model']:<6}{r['gpus']:>5}{r['learners']:>10}{r['shards']:>8}{r['gather']:>8}{rollouts:>10}{r['batch']:>7}"
                f"{r['learner_gib']:>6.1f} GiB{r['rollout_gib']:>6.1f} GiB{x['lag']:>5}{x['step_seconds']:>6.0f} s{x['used']['learners']:>7.0%}"
                f"{x['used']['rollouts']:>9.0%}  {x['binds']}{'' if r['fits'] else '  DOES NOT FIT'}"
            )
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    rows = [row(p) for p in TABLE]
    print(said(rows))
    for r in rows:
        for who in ("learner", "rollout"):
            parts = ", ".join(
                f"{part} {size / GIB:.1f}" for part, size in r[f"{who}_bytes"].items() if size >= GIB / 20
            )
            print(f"{r['model']} {who}: {parts} GiB")
    print(json.dumps({"rows": rows, "assumed": ASSUMED}))


if __name__ == "__main__":
    main()
