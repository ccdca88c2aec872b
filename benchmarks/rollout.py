"""Sampling: the local engine against `transformers.generate` and vLLM's CPU build. `make bench-rollout`

64 prompts of 40 to 240 tokens, sampled at temperature 1 until the model ends them or 256 tokens are reached; tokens a second counts
response tokens. All sides read the same prompts with the same weights and dtype on the same threads, one after the other in
turns. vLLM runs in an environment of its own (`make vllm-env`), compiled, without its prefix cache (which would know the prompts
after the first round). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import workload

VLLM_PYTHON = Path(".venv-vllm/bin/python")
LIMIT = 256


def ours(policy: Any, prompts: list[list[int]], batch: int) -> Any:
    """Tokens a second of the local engine."""
    from sppo.rollout.engine import Sampling
    from sppo.rollout.local import LocalEngine

    engine = LocalEngine(policy)

    def run(turn: int) -> float:
        began = time.perf_counter()
        samples = engine.generate(prompts, [1000 * turn + i for i in range(len(prompts))], Sampling(LIMIT, 1.0, batch))
        return sum(len(s.ids) for s in samples) / (time.perf_counter() - began)

    return run


def generate(policy: Any, prompts: list[list[int]], batch: int) -> Any:
    """Tokens a second of `model.generate` on left-padded batches."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workload.model_folder(), dtype=policy.dtype).eval().to(policy.device)

    def run(turn: int) -> float:
        torch.manual_seed(turn)
        began, tokens = time.perf_counter(), 0
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            width = max(map(len, part))
            ids = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in part], device=policy.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=policy.device)
            out = model.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=LIMIT,
                eos_token_id=policy.eos_ids, pad_token_id=policy.pad_id,
            )[:, width:]  # fmt: skip
            ended = torch.isin(out, torch.tensor(policy.eos_ids, device=out.device)).int()
            lengths = torch.where(ended.any(1), ended.argmax(1) + 1, out.size(1))
            tokens += int(lengths.sum())
        return tokens / (time.perf_counter() - began)

    return run


class VLLM:
    """vLLM in a process and an environment of its own, that generates when told to."""

    def __init__(self, dtype: str, prompts: list[list[int]], eos: list[int], threads: int, batch: int) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [str(VLLM_PYTHON), __file__, "--serve-vllm", dtype, "--batch", str(batch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self._tell({"prompts": prompts, "eos": eos})

    def _tell(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit("vLLM ended; run its command by hand to see why: " + " ".join(map(str, self.process.args)))

    def __call__(self, turn: int) -> float:
        return self._tell({"seed": turn})["tokens_per_second"]


def serve_vllm(dtype: str, batch: int) -> None:
    """The other side of VLLM."""
    from vllm import LLM, SamplingParams

    first = json.loads(sys.stdin.readline())
    llm = LLM(workload.MODEL, dtype=dtype, max_model_len=1024, max_num_seqs=batch, enable_prefix_caching=False)
    asked = [{"prompt_token_ids": p} for p in first["prompts"]]
    print("{}", flush=True)
    for line in sys.stdin:
        json.loads(
            line
        )  # no seed for each request: on a CPU vLLM 0.32 fails with them once a prefill is cut into chunks
        params = SamplingParams(
            temperature=1.0, max_tokens=LIMIT, logprobs=0, stop_token_ids=first["eos"], detokenize=False
        )
        began = time.perf_counter()
        done = llm.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        print(json.dumps({"tokens_per_second": sum(len(o.outputs[0].token_ids) for o in done) / seconds}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="sequences at once, at most, for every side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve-vllm", metavar="DTYPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_vllm:
        serve_vllm(args.serve_vllm, args.batch)
        return
    import torch

    from sppo.memory import keep_memory
    from sppo.models.loading import pick_device
    from sppo.models.policy import Policy

    keep_memory()
    policy, stated = Policy.load(workload.model_folder(), dtype="auto", device=pick_device(), seed=0)
    print(stated)
    prompts = workload.prompts(policy, args.prompts)
    sides = {
        "sppo local": ours(policy, prompts, args.batch),
        "transformers.generate": generate(policy, prompts, args.batch),
    }
    dtype = str(policy.dtype).removeprefix("torch.")
    if VLLM_PYTHON.exists() and policy.device.type == "cpu":
        sides["vLLM"] = VLLM(dtype, prompts, policy.eos_ids, torch.get_num_threads(), args.batch)
    else:
        print("without vLLM: make vllm-env makes its environment")
    found = workload.interleaved(sides, args.rounds)
    mine = found["sppo local"]
    workload.finish(
        {
            "ratio_vs_generate": workload.ratios(mine, found["transformers.generate"]),
            "ratio_vs_vllm": workload.ratios(mine, found["vLLM"]) if "vLLM" in found else None,
            "tokens_per_second": {name: [round(x, 1) for x in v] for name, v in found.items()},
            "prompts": args.prompts,
            "limit": LIMIT,
            "dtype": dtype,
            "device": str(policy.device),
            "threads": torch.get_num_threads(),
        }
    )


if __name__ == "__main__":
    main()
