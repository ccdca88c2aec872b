"""Base and adapter as one model, and the base alone: against the model that holds both."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")

from sppo.errors import ModelError
from sppo.models import tiny
from sppo.models.adapters import Adapters
from sppo.models.merging import base_folder, base_weights, merged_weights, save_whole
from sppo.models.policy import Policy
from sppo.recipe.sections import AdapterSection

SMALL = "tiny:hidden=64,layers=2,heads=2"
IDS = torch.arange(3, 43).view(2, 20)


@torch.no_grad()
def adapted(name: str = SMALL, dtype: str = "float32", quantize: str = "", **kinds) -> Policy:
    section = AdapterSection(rank=4, alpha=6, **kinds)
    policy = Policy.load(name, dtype=dtype, device=torch.device("cpu"), seed=0, adapter=section, quantize=quantize)[0]
    for p in policy.trained.values():
        p.add_(0.05 * torch.randn_like(p))
    return policy


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(("quantize", "kinds"), [("", {}), ("", {"rslora": True}), ("", {"dora": True}), ("nf4", {})])
def test_the_merged_folder_is_base_and_adapter(tmp_path, quantize, kinds):
    policy = adapted(quantize=quantize, **kinds)
    save_whole(policy.adapters, merged_weights(policy.adapters), tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(found), logits(policy.model), atol=1e-4)
    assert not hasattr(found.config, "quantization_config")


@pytest.mark.parametrize(("dtype", "quantize"), [("float32", ""), ("bfloat16", ""), ("float32", "nf4")])
def test_the_base_is_what_computes_without_the_adapter(tmp_path, dtype, quantize):
    policy = adapted(dtype=dtype, quantize=quantize)
    assert base_folder(policy, tmp_path) == str(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=policy.dtype)
    with policy.adapters.using(None):
        assert torch.equal(logits(found), logits(policy.model))


def test_merging_rounds_once():
    policy = adapted(dtype="bfloat16")
    merged, base = dict(merged_weights(policy.adapters)), dict(base_weights(policy.adapters))
    assert merged.keys() == base.keys()
    name = "model.layers.0.mlp.up_proj"
    a, b = (policy.trained[f"{name}.lora_{x}.default.weight"].float() for x in "AB")
    wide = base[f"{name}.weight"].float() + 1.5 * (b @ a)
    assert torch.equal(merged[f"{name}.weight"], wide.bfloat16())
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def test_whole_modules_beside_the_adapter_come_along(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    policy = Policy.load(SMALL, dtype="float32", device=torch.device("cpu"), seed=0, adapter=config)[0]
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(0.05 * torch.randn_like(p))
    save_whole(policy.adapters, merged_weights(policy.adapters), tmp_path)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(policy.model), atol=1e-4)


def test_what_cannot_be_merged_is_said():
    with pytest.raises(ModelError, match="only plain LoRA can be merged into a quantised base"):
        list(merged_weights(adapted(quantize="nf4", dora=True).adapters))


def test_a_base_that_lies_in_a_folder_is_not_written_again(tmp_path, monkeypatch):
    there, hub = tmp_path / "there", tmp_path / "hub"
    Policy.load(SMALL, dtype="float32", device=torch.device("cpu"), seed=0)[0].save(there)
    assert base_folder(adapted(str(there)), tmp_path / "new") == str(there)
    fetched = hub / "models--some--model" / "snapshots" / "abc"
    fetched.parent.mkdir(parents=True)
    there.rename(fetched)
    (hub / "models--some--model" / "refs").mkdir()
    (hub / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    policy = adapted(str(fetched))
    policy.base["name"] = "some/model"
    assert base_folder(policy, tmp_path / "new") == str(fetched)
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore")  # peft's, of what is refused here
def test_a_matrix_that_the_head_shares_is_not_merged():
    from peft import LoraConfig, get_peft_model

    model, tokenizer = tiny.build(hidden=64, layers=2, heads=2)
    adapters = Adapters(get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens"])))
    assert Policy(model, tokenizer, adapters=adapters, base={"name": SMALL}).trained
    with pytest.raises(ModelError, match="the head's weight too"):
        list(merged_weights(adapters))
