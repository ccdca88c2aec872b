"""`sppo doctor RECIPE [--gpu SIZE]`: what a recipe needs, without a GPU, a network, data or weights."""

from __future__ import annotations

import json
import time

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig

from sppo.cli.main import main
from sppo.models import tiny

GIB = 2**30


@pytest.fixture
def eight_billion(tmp_path):
    """A folder with the config of Llama-3.1-8B's shape alone."""
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path / "8b")  # fmt: skip
    return str(tmp_path / "8b")


def doctor(capsys, *arguments):
    """The plan, and what is printed for people; the command says by its exit whether it fits."""
    status = main(["doctor", *map(str, arguments), "--json"])
    out = capsys.readouterr().out
    plan = json.loads(out.splitlines()[-1])["recipe"]
    assert status == (0 if plan["fits"] else 1)
    return plan, out


def fails(capsys, *arguments):
    assert main(["doctor", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_eight_billion_weights_on_24_gb(eight_billion, tmp_path, capsys):
    """All weights: 20 bytes each and more. Two of the changes that are named make it fit, when they are made."""
    plan, said = doctor(capsys, "--model", eight_billion, "--data", "chain:steps=4", "--gpu", "24GB")
    assert plan["memory_bytes"]["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert (
        plan["memory_bytes"]["optimiser"] == 6 * plan["memory_bytes"]["weights"]
    )  # a master and two moments, 4 bytes each
    assert not plan["fits"]
    assert "does NOT fit" in said
    assert 1 <= len(plan["changes"]) <= 3
    assert any("adapter.rank = 16" in change["keys"] for change in plan["changes"])
    assert plan["fits_with_changes"] == (plan["bytes_with_changes"] < plan["capacity_bytes"])

    lora = ["--adapter.rank", "16", "--policy.quantize", "nf4", "--critic.model", "policy", "--rollout.batch", "16"]
    small, said = doctor(capsys, "--model", eight_billion, "--data", "chain:steps=4", "--gpu", "24GB", *lora)
    assert small["fits"], said
    assert small["changes"] == []
    assert small["memory_bytes"]["weights"] < 6 * GIB
    assert small["memory_bytes"]["critic and its optimiser"] < 1 * GIB


def test_a_gpu_that_is_not_here_is_not_asked(eight_billion, capsys, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("CUDA was asked")

    for name in ("_lazy_init", "mem_get_info", "get_device_properties", "is_bf16_supported", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, asked)
    for engine in ("local", "vllm:memory=0.3"):
        plan, _ = doctor(
            capsys, "--model", eight_billion, "--data", "chain:steps=4", "--gpu", "80", "--rollout.engine", engine
        )
        assert plan["capacity_bytes"] == int(80 * 0.98 * GIB)
        assert "bfloat16" in plan["policy"]


def test_offloaded_state_is_said_to_be_the_hosts(eight_billion, capsys):
    plan, said = doctor(capsys, "--model", eight_billion, "--gpu", "80GB", "--training.offload", "true")
    assert plan["host_bytes"]["masters and moments"] == pytest.approx(12 * 8.03e9, rel=0.01)
    assert "of main memory (masters and moments, sums of gradients)" in said


@pytest.mark.parametrize("size", ["24XB", "-3GB", "0", "much"])
def test_a_size_that_is_none(capsys, size):
    assert "is no size of a GPU; write it as 24GB" in fails(capsys, "--model", "tiny", f"--gpu={size}")


def test_a_size_without_a_recipe(capsys):
    assert "--gpu plans a recipe" in fails(capsys, "--gpu", "24GB")


def test_a_hub_model_that_is_not_cached_is_refused_at_once_with_the_way_to_get_it(tmp_path, capsys, monkeypatch):
    """Also where the network would be tried: nothing is connected to."""
    import socket

    def connected(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    began = time.monotonic()
    said = fails(capsys, "--model", "somebody/nobody-8B", "--data", "chain:steps=4", "--gpu", "24GB")
    assert "hf download somebody/nobody-8B config.json (a gated" in said
    assert said.count("\n") == 1
    assert time.monotonic() - began < 30
    assert constants.HF_HUB_OFFLINE is False  # as it was


def test_data_of_the_hub_is_not_fetched(capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    plan, _ = doctor(capsys, "--model", "tiny", "--data", "hub:somebody/nothing")
    assert "not to be had here" in plan["problems"]


def test_a_reward_model_is_counted_and_not_loaded(tmp_path, capsys):
    backbone, _ = tiny.build(hidden=32, layers=1, heads=2, head=False)
    tiny.classifier(backbone, 0).config.save_pretrained(tmp_path / "judge")  # no weights
    assert (
        AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path / "judge")).num_labels == 1
    )
    use = f"answer + 0.5 * model:{tmp_path / 'judge'}"
    plan, _ = doctor(capsys, "--model", "tiny", "--data", "chain:steps=1", "--reward.use", use)
    assert plan["memory_bytes"]["the reward model"] == 4 * sum(p.numel() for p in backbone.parameters())
    use = f"model:{tmp_path / 'none'}"
    assert "reward model: there is no folder" in fails(
        capsys, "--model", "tiny", "--data", "chain:steps=1", "--reward.use", use
    )


def test_targets_that_are_no_layers_are_refused(capsys):
    said = fails(capsys, "--model", "tiny", "--data", "chain:steps=1", "--adapter.targets", '["q_prj"]')
    assert "adapter.targets: no layer of this model is called 'q_prj'; did you mean 'q_proj'" in said


def test_a_rank_and_a_worker_of_a_cluster(eight_billion, capsys):
    cluster = [
        "--cluster.learners",
        "8",
        "--cluster.rollouts",
        "8",
        "--cluster.gather",
        "layer",
        "--rollout.batch",
        "32",
    ]
    more = ["--data", "chain:steps=4", "--training.checkpoint_activations", "true"]
    plan, said = doctor(capsys, "--model", eight_billion, "--gpu", "80GB", *cluster, *more)
    assert plan["fits"], said
    assert plan["memory_bytes"]["masters and moments"] == pytest.approx(12 * 8.03e9 / 8, rel=0.01)
    assert plan["worker_bytes"]["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert "each learner rank: about" in said
    assert "each rollout worker: about" in said
    plan, said = doctor(capsys, "--model", eight_billion, "--gpu", "24GB", *cluster, *more, "--rollout.batch", "512")
    assert not plan["worker_fits"]
    assert "lower rollout.batch" in said
