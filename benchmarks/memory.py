"""The memory plan against the measured peak: full training, LoRA, LoRA on four bits, 8-bit moments and checkpointed activations, of a Llama
of 69M random weights and of SmolLM2-135M. `make bench-memory`

Each setting is a process of its own that makes two updates on 16 responses in micro-batches of 512 tokens, with `run.memory` so low that
freed memory goes back to the machine. Both figures are from its summary.json: the plan that is stated at the start, and the peak of the
resident memory (on a GPU: of PyTorch's tensors). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import workload

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "8-bit": {"training.optimizer": "adamw-8bit"},
    "checkpointing": {"training.checkpoint_activations": "true"},
    "lora": {"adapter.rank": 16},
    "nf4": {"adapter.rank": 16, "policy.quantize": "nf4"},
}
COMMON = {
    "task.train": "chain:steps=4-6", "critic.model": "tiny:hidden=64,layers=2,heads=4", "rollout.prompts": 16, "rollout.batch": 16,
    "rollout.max_tokens": 64, "training.steps": 1, "training.epochs": 2, "training.minibatches": 1, "training.micro_tokens": 512,
    "evaluation.n": 1, "evaluation.every": 0, "monitors.action": "off",
}  # fmt: skip
LOW, HIGH = 0.95, 1.10
"""Where planned / measured must lie."""


def random_llama(folder: Path) -> str:
    """A Llama that reads characters, its weights random: 69M, a dozen of its layers' kind in SmolLM2's proportions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sppo.models.tiny import character_tokenizer

    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12, num_key_value_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measured(model: str, changes: dict[str, Any], out: Path) -> dict[str, Any]:
    """What one run says of its memory."""
    options = COMMON | {"policy.model": model, "run.memory": 2, "run.out": str(out)} | changes
    command = [sys.executable, "-m", "sppo", "train", "--quiet", "--json"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    memory: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["memory"]
    return memory


def main() -> None:
    """Run the settings one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--models", nargs="+", choices=("llama", "smollm2"), default=("llama", "smollm2"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        made = {"llama": lambda: random_llama(Path(work) / "llama"), "smollm2": workload.model_folder}
        folders = {name: made[name]() for name in args.models}
        print(f"{'model':<10}{'setting':<15}{'planned':>10}{'measured':>10}{'ratio':>8}  peak phase")
        for model, folder in folders.items():
            for kind in args.kinds:
                memory = measured(folder, KINDS[kind], Path(work) / f"{model}-{kind}")
                planned, peak = memory["planned_bytes"], memory["peak_bytes"]
                rows.append({"model": model, "setting": kind, "ratio": round(planned / peak, 3), **memory})
                print(
                    f"{model:<10}{kind:<15}{planned / 2**20:>6.0f} MiB{peak / 2**20:>6.0f} MiB{planned / peak:>8.3f}  {memory['phase']}",
                    flush=True,
                )
    ratios = [row["ratio"] for row in rows]
    workload.finish(
        {"settings": rows, "low": min(ratios), "high": max(ratios), "ok": min(ratios) >= LOW and max(ratios) <= HIGH}
    )


if __name__ == "__main__":
    main()
