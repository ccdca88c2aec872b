"""What the evidence's scripts compute, on numbers whose answer is known."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_critic_that_knows_the_rates_reaches_its_ceiling():
    generator = torch.Generator().manual_seed(0)
    rate_B = torch.rand(400, generator=generator)
    reward_BN = (torch.rand(400, 64, generator=generator) < rate_B[:, None]).float()
    found = script("critic_quality").figures(reward_BN, rate_B)
    assert found["share_of_ceiling"] == pytest.approx(1.0, abs=0.02)
    assert found["brier"] == pytest.approx(found["brier_unavoidable"], rel=0.02)
    assert found["pearson_without_noise"] == pytest.approx(1.0, abs=0.01)
    assert found["auc"] == pytest.approx(found["auc_ceiling"], abs=0.02)
    assert found["ece"] < 0.02


def test_a_critic_that_knows_nothing_and_one_that_is_too_sure():
    generator = torch.Generator().manual_seed(0)
    rate_B = torch.rand(400, generator=generator) * 0.5 + 0.25
    reward_BN = (torch.rand(400, 64, generator=generator) < rate_B[:, None]).float()
    quality = script("critic_quality")
    constant = quality.figures(reward_BN, torch.full((400,), 0.5))
    assert constant["explained_variance"] == pytest.approx(0.0)
    assert constant["pearson"] is None
    sure = quality.figures(reward_BN, ((rate_B - 0.5) * 3 + 0.5).clamp(0, 1))
    assert sure["ece"] > 0.1
    assert sure["auc"] == pytest.approx(sure["auc_ceiling"], abs=0.02)  # it ranks as well as can be
    intervals = quality.intervals(reward_BN[:50], rate_B[:50], quality.figures)
    assert all(
        x["low"] <= x["value"] <= x["high"] for x in (intervals["brier"], intervals["auc"], intervals["mean_reward"])
    )


def test_a_stall_of_the_machine_is_not_the_runs_pace():
    curve = {"seconds": [0.0, 2.0, 4.0, 44.0, 46.0], "tokens": [0.0, 10.0, 20.0, 30.0, 40.0], "accuracy": [0.1] * 5}
    assert script("grpo_trainer").pace(curve) == pytest.approx(0.2)


def test_the_gpu_benchmark_runs_in_small(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--small", "--seconds", "50", "--out", out]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | hidden, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(out.read_text())
    for name in ("Llama-3.1-8B", "Qwen3-4B"):
        for kind, batches in (("lora", ("8", "16")), ("full", ("8",))):
            one = found[f"{name} {kind}"]
            assert "failed" not in one, one
            assert one["tokens"] == 8 * (16 + 8)
            assert one["tokens_per_second"] > 0
            assert one["mfu"] is None  # no device of the table
            assert min(one["peak_gib"], one["planned_gib"], one["sampling"]["peak_gib"]) > 0.1
            assert all(one["sampling"][batch]["again"] > 0 for batch in batches)
            assert one["trained"] < one["parameters"] if kind == "lora" else one["trained"] == one["parameters"]
    assert "s are left" in found["TRL Qwen3-4B lora"]["skipped"]  # the clock


def test_the_gpu_benchmarks_shapes_and_work(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from sppo.models.adapters import Adapters
    from sppo.models.policy import Policy
    from sppo.recipe.sections import AdapterSection

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = script("gpu")
    for name, parameters in (("Llama-3.1-8B", 8_030_261_248), ("Qwen3-4B", 4_022_468_096)):  # as published
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(gpu.shape(name, False))
        assert sum(p.numel() for p in model.parameters()) == parameters
        config, length = gpu.shape(name, True), 24
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with FlopCounterMode(display=False) as counter:
            model(torch.arange(length)[None], use_cache=False).logits.sum().backward()
        policy = Policy(model, gpu.tokenizer(config.vocab_size))
        row = torch.tensor([length])
        attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length**2
        needed = gpu.needed_flops(policy, row, row)
        assert counter.get_total_flops() == needed + attention  # eager attention computes what the mask hides, too
        assert gpu.needed_flops(policy, row, row - 8) == needed - 6 * 8 * 64 * 512  # no head where nothing was written
        adapters = Adapters.onto(model, AdapterSection(rank=16), seed=0)
        adapted = Policy(model, policy.tokenizer, adapters=adapters, base={"name": name})
        rest = 6 * length * sum(p.numel() for p in adapted.trained.values())
        assert gpu.needed_flops(adapted, row, row) == pytest.approx((needed - attention) * 2 / 3 + attention + rest)
