"""Layers are replaced by compiled arithmetic, and neither what they compute nor their gradients change."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sppo.kernels.patch_layers import fusable, fused
from sppo.models import tiny
from sppo.models.policy import Policy

from ..conftest import logps_of

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # fmt: skip


def test_replaced_layers_change_neither_the_model_nor_its_gradients():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    replaced = fusable(model)
    assert (
        len(replaced) == 2 * 5 + 2
    )  # two norms, two of queries and keys, and a gated unit in each layer; the last norm; the embedding
    ids = torch.arange(12)[None]

    def gradients() -> tuple[torch.Tensor, ...]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return tuple(p.grad.clone() for p in model.parameters() if p.grad is not None)

    plain = gradients()
    with fused(replaced), fused(replaced):
        assert all("forward" in module.__dict__ for module, _ in replaced)
        mine = gradients()
    assert not any("forward" in module.__dict__ for module, _ in replaced)
    for a, b in zip(mine, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_module_that_does_something_else_is_left_alone(monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    assert len(fusable(model)) == 2 * 3 + 2
    assert fusable(model.double()) == []
    model = model.float()
    right = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: right(self, x) + x * self.weight)
    assert len(fusable(model)) == 2 + 1
    monkeypatch.undo()
    assert len(fusable(LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_act": "gelu"})))) == 2 * 2 + 2
    assert len(fusable(LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 75})))) == 2 * 2 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_gives_its_gradient_to_the_rows_that_were_read(tied, dtype):
    """Also of a row read twice, beside what the head adds to a tied matrix, on top of what was there; nothing for the
    padding's."""
    torch.manual_seed(0)
    sizes = SIZES | {"pad_token_id": 3, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(dtype)
    ids = torch.tensor([[5, 3, 7, 5, 5, 90]])
    replaced = [pair for pair in fusable(model) if isinstance(pair[0], torch.nn.Embedding)]
    assert len(replaced) == 1

    def gradients() -> tuple[torch.Tensor, ...]:
        model.zero_grad()
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
        return tuple(p.grad.clone() for p in model.parameters())

    plain = gradients()
    with fused(replaced):
        with pytest.raises(IndexError):
            model.get_input_embeddings()(torch.tensor([-1]))
        mine = gradients()
        model.requires_grad_(False)
        assert not model(ids).logits.requires_grad
    for a, b in zip(mine, plain, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < (1e-6 if dtype == torch.float32 else 2**-7)


def test_attention_is_replaced_where_it_is_the_packed_one():
    """With whole registers of halves, and no window; a whole model then finds what it does by itself."""
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": 32}
    for kind, config in ((LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)):
        policy = Policy(kind(config(**sizes)), tiny.character_tokenizer())
        replaced = fusable(policy.model)
        assert sum("Attention" in type(module).__name__ for module, _ in replaced) == 2
        ids, prompt, response = torch.arange(24).view(2, 12), torch.tensor([4, 5]), torch.tensor([8, 6])
        found = []
        for now in (replaced, []):
            policy.scorer.fusable = now
            policy.model.zero_grad()
            logp = logps_of(policy, ids, prompt, response, 1.0).logp_BT
            logp.sum().backward()
            found.append([logp.detach(), *(p.grad.clone() for p in policy.model.parameters())])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    windowed = Qwen3Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    policy = Policy(Qwen3ForCausalLM(windowed), tiny.character_tokenizer())
    assert not any("Attention" in type(module).__name__ for module, _ in fusable(policy.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_layers_are_computed_again_in_the_same_way(dtype):
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype), tiny.character_tokenizer())
    ids, prompt, response = torch.arange(24).view(2, 12), torch.tensor([4, 5]), torch.tensor([8, 6])
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            policy.checkpoint_activations()
        policy.model.zero_grad()
        logps_of(policy, ids, prompt, response, 1.0).logp_BT.sum().backward()
        found.append([p.grad.clone() for p in policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert policy.as_reference().scorer.fusable[0][0] is not policy.scorer.fusable[0][0]


def test_numbers_of_another_kind_are_left_to_the_module():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    replaced = fusable(model)
    x = torch.randn(3, 64).bfloat16()
    own = model.model.norm(x)
    with fused(replaced):
        assert torch.equal(model.model.norm(x), own)
    model.model.norm.bfloat16()
    assert fusable(model) == []
