"""What the critic costs: its share of a step's time, and its memory beside a token-level critic's. `make bench-critic`

A step of SmolLM2-135M on 64 prompts of arithmetic, responses of at most 96 tokens, with the critic of the shipped recipe (1M
parameters, reads the prompt only). The token-level critic is what PPO would train instead: a model of the policy's size with a
value for every token of the response, in float32 with AdamW, as ours. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import workload

CRITIC = "tiny:hidden=128,layers=3,heads=4"


def share(steps: int) -> dict[str, Any]:
    """The critic's share of the last step's time."""
    from sppo.recipe.config import Config
    from sppo.run.loop import train
    from sppo.run.run import Run

    with tempfile.TemporaryDirectory() as folder:
        config = Config.load(None, {
            "policy.model": workload.model_folder(), "policy.chat_template": "off", "critic.model": CRITIC, "task.train": "gym:chain_sum",
            "reward.use": "gym", "rollout.prompts": 64, "rollout.batch": 64, "rollout.max_tokens": 96, "training.steps": steps,
            "training.lr": 1e-6, "training.micro_tokens": 1024, "evaluation.n": 1, "evaluation.every": 0, "run.out": f"{folder}/run",
        })  # fmt: skip
        run = Run.new(config)
        try:
            train(run)
        finally:
            run.close()
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    total = last["seconds/rollout"] + last["seconds/update"]
    return {"critic": last["update/critic_seconds"], "step": total, "share": last["update/critic_seconds"] / total}


def token_critic() -> dict[str, Any]:
    """Memory and time of one update of a token-level critic on 64 sequences of 48 + 96 tokens, micro-batches of eight."""
    import torch
    from transformers import AutoModelForTokenClassification

    from sppo.memory import keep_memory
    from sppo.models.loading import pick_device

    keep_memory()
    model = AutoModelForTokenClassification.from_pretrained(workload.model_folder(), num_labels=1, dtype=torch.float32)
    model.to(device := pick_device())
    before = workload.peak_bytes()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    began = time.perf_counter()
    for _ in range(8):
        value = (
            model(input_ids=torch.randint(40000, (8, 144), device=device), use_cache=False).logits[:, 48:, 0].float()
        )
        (value.square().sum() / (64 * 96)).backward()
    optimiser.step()
    return {"seconds": workload.since(began), "bytes": workload.peak_bytes() - before + _weights(model)}


def prompt_critic() -> dict[str, Any]:
    """The same of the prompt-only critic on the 64 prompts of 48 tokens."""
    import torch

    from sppo.learning.optimizer import MasterAdamW
    from sppo.memory import keep_memory
    from sppo.models.critic import Critic
    from sppo.models.loading import pick_device

    keep_memory()
    critic, _ = Critic.load(CRITIC, dtype="auto", device=pick_device(), seed=0)
    before = workload.peak_bytes()
    optimiser = MasterAdamW(critic.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    began = time.perf_counter()
    logit = critic.prompt_logits([[3 + i % 20 for i in range(48)]] * 64)
    torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.ones_like(logit)).backward()
    optimiser.step(1e-6, 1.0)
    return {"seconds": workload.since(began), "bytes": workload.peak_bytes() - before + _weights(critic)}


def _weights(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


PARTS = {"share": lambda: share(2), "token": token_critic, "prompt": prompt_critic}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part]()))
        return
    found = {}
    for part in PARTS:
        done = subprocess.run([sys.executable, __file__, "--part", part], stdout=subprocess.PIPE, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(f"{part:<6} {found[part]}", flush=True)
    workload.finish(
        {
            "critic_share": round(found["share"]["share"], 4),
            "critic_seconds": round(found["share"]["critic"], 3),
            "step_seconds": round(found["share"]["step"], 2),
            "memory_vs_token_critic": round(found["prompt"]["bytes"] / found["token"]["bytes"], 4),
            "time_vs_token_critic": round(found["prompt"]["seconds"] / found["token"]["seconds"], 4),
        }
    )


if __name__ == "__main__":
    main()
