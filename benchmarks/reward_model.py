"""Scoring responses with a learned reward: one scalar a sequence, packed, against the ordinary ways. `make bench-reward-model`

packed      ours: sequences one after the other, the head at each one's last token
padded      the same model as transformers calls it: a padded batch in the order given
per token   a reward for every token (token classification, padded): what token-level reinforcement would hold

Each variant runs in a process of its own, so that its peak memory is its own. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from sppo.models.loading import LARGE, choose_dtype
from sppo.models.reward_model import RewardModel
from sppo.models.tiny import character_tokenizer

VARIANTS = ("packed", "padded", "per token")
SEQUENCES, SHORTEST, LONGEST, BATCH = 32, 32, 384, 8


def config() -> Any:
    """The widths of SmolLM2-135M and twelve of its layers, with random weights: what is measured does not depend on them."""
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9,
        num_key_value_heads=3, num_labels=1, pad_token_id=0,
    )  # fmt: skip


def sequences() -> list[list[int]]:
    """Responses of uneven lengths, as a policy writes them."""
    rng = random.Random(0)
    return [[rng.randrange(3, 49152) for _ in range(rng.randrange(SHORTEST, LONGEST))] for _ in range(SEQUENCES)]


def peak() -> int:
    """The most memory this process ever held, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def measure(variant: str, rounds: int) -> dict[str, Any]:
    """Seconds a round and memory above the loaded model."""
    torch.manual_seed(0)
    kind = LlamaForTokenClassification if variant == "per token" else LlamaForSequenceClassification
    model = kind(config()).to(choose_dtype("auto", LARGE, torch.device("cpu"))[0]).eval()
    rows = sequences()
    ours = RewardModel(model, character_tokenizer(), name="benchmark") if variant == "packed" else None

    def run() -> None:
        if ours is not None:
            assert ours.packs
            ours.scores(rows, token_budget=BATCH * LONGEST // 2)
            return
        held = []
        with torch.no_grad():
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                width = max(map(len, part))
                ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in part])
                held.append(model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False).logits.float())

    before = peak()
    run()
    memory = peak() - before
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "peak_bytes": memory, "tokens": sum(map(len, rows))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args.rounds)))
        return
    runs: dict[str, list[dict[str, Any]]] = {v: [] for v in VARIANTS}
    for _ in range(2):  # interleaved, so that all see the same machine
        for variant in VARIANTS:
            done = subprocess.run(
                [sys.executable, __file__, "--variant", variant], capture_output=True, text=True, check=True
            )
            runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
    result: dict[str, Any] = {"sequences": SEQUENCES, "tokens": runs["packed"][0]["tokens"]}
    for variant, found in runs.items():
        seconds = statistics.median(r["seconds"] for r in found)
        memory = statistics.median(r["peak_bytes"] for r in found)
        result[variant] = {"tokens_per_s": round(result["tokens"] / seconds, 1), "peak_mib": round(memory / 2**20, 1)}
        print(
            f"{variant:<10} {result[variant]['tokens_per_s']:>9.0f} tokens/s   {result[variant]['peak_mib']:>8.1f} MiB above the model"
        )
    result["speed_ratio"] = round(result["packed"]["tokens_per_s"] / result["per token"]["tokens_per_s"], 3)
    result["memory_ratio"] = round(result["packed"]["peak_mib"] / result["per token"]["peak_mib"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
