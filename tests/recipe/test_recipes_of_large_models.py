"""The recipes for one GPU, two steps each, on models of the same family and shape in small; only names and sizes are
others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sppo.cli.main import main
from sppo.models.tiny import character_tokenizer

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
SHAPE = {
    "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
"""Grouped attention, and a feed-forward layer of three and a half times the width, as theirs."""
FAMILIES = {
    "llama-3.1-8b-lora": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "qwen3-4b-lora-24gb": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True)),
    "qwen2.5-1.5b-full": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
}


def small(folder, name):
    """A model of the recipe's family with random weights, and a chat template."""
    factory, config = FAMILIES[name]
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TURNS
    config.vocab_size = len(tokenizer)
    factory(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_it_trains_two_steps(name, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"problem": f"What is {i} + {i}?", "answer": str(2 * i)}) + "\n" for i in range(60))
    )
    model = str(small(tmp_path / "model", name))
    full = name.endswith("-full")
    sizes = {
        "policy.model": model, "task.train": rows, "run.out": tmp_path / "run", "training.steps": 2, "rollout.prompts": 8,
        "rollout.max_tokens": 8, "evaluation.n": 8, **({"critic.model": model} if full else {}),
    }  # fmt: skip
    keys = [str(piece) for key, value in sizes.items() for piece in (f"--{key}", value)]
    assert main(["train", f"recipes/{name}.toml", *keys, "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["steps"] == 2
    assert "chat template" in said.err
    assert "has no effect" not in said.err
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    for part in ("policy", "critic"):
        assert (checkpoint / part / "adapter_config.json").exists() != full
    assert json.loads(Path(tmp_path / "run/summary.json").read_text())["stopped"] == "finished"
