"""How time and memory grow with the response: 256, 1,024, 4,096 and 8,192 tokens. `make bench-length`

One sequence of 64 prompt tokens and so many response tokens on SmolLM2-135M, activations checkpointed: forward and backward of an
update; the time of one decoding step in the middle of the response; and, apart, the head and log-softmax alone, whose memory
must not grow with the length. Each length in a process of its own. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import workload

LENGTHS = (256, 1024, 4096, 8192)
PROMPT = 64


def measure(length: int) -> dict[str, Any]:
    """Everything at one length."""
    import torch

    from sppo.kernels.logprobs import token_logps
    from sppo.memory import keep_memory
    from sppo.models.loading import pick_device
    from sppo.models.policy import Policy
    from sppo.rollout.local import LocalEngine

    keep_memory()
    policy, _ = Policy.load(workload.model_folder(), dtype="auto", device=pick_device(), seed=0)
    cuda = policy.device.type == "cuda"
    peak = workload.peak_bytes
    for p in policy.model.parameters():
        p.grad = torch.zeros_like(p)
    head = policy.model.get_output_embeddings().weight
    hidden = torch.randn(length, head.size(1), device=policy.device, dtype=policy.dtype, requires_grad=True)
    target = torch.arange(length, device=policy.device)
    before = peak()
    token_logps(hidden, head, None, target, 1.0)[0].sum().backward()
    logits_bytes = peak() - before
    policy.checkpoint_activations()
    if cuda:  # what is compiled the first time is not the length's
        policy.logps(torch.arange(8)[None], torch.arange(8)[None] >= 2, 1.0).logp_BT.sum().backward()
        torch.cuda.synchronize()
    row = [[(31 * t) % 40000 for t in range(PROMPT + length)]]
    before, began = peak(), time.perf_counter()
    policy.logps(torch.tensor(row), torch.arange(PROMPT + length)[None] >= PROMPT, 1.0).logp_BT.sum().backward()
    update, update_bytes = workload.since(began), peak() - before
    engine = LocalEngine(policy)
    middle = [row[0][: PROMPT + length // 2]]
    engine.score(middle, [[5] * 3])  # with a step, which a GPU captures the first time
    times = []
    for tokens in (1, 17):
        began = time.perf_counter()
        engine.score(middle, [[5] * tokens])
        times.append(time.perf_counter() - began)
    return {
        "update_seconds": round(update, 2), "update_us_per_token": round(1e6 * update / length, 1),
        "update_mib": round(update_bytes / 2**20), "logits_mib": round(logits_bytes / 2**20),
        "decode_step_ms": round(1000 * (times[1] - times[0]) / 16, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    result = {}
    for length in LENGTHS:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(length)], stdout=subprocess.PIPE, text=True, check=True
        )
        result[str(length)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{length:>5} tokens  {result[str(length)]}", flush=True)
    workload.finish({"by_length": result})


if __name__ == "__main__":
    main()
