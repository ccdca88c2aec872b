"""How a critic's passes are computed: packed and fused where it is large, its layers again in the backward pass where
the recipe asks for it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

from sppo.models import critic as module
from sppo.models import tiny
from sppo.models.critic import Critic

from ..conftest import small_critic

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13] * 9, [14] * 9]


def stirred(critic: Critic) -> Critic:
    """Its read-out starts as zeros."""
    with torch.no_grad():
        critic.head.weight.copy_(torch.randn(critic.head.weight.shape, generator=torch.Generator().manual_seed(3)))
    return critic


def encoder() -> Critic:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = tiny.character_tokenizer()
    tokenizer.padding_side = "right"
    return Critic(BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False), tokenizer)


def learnt(critic: Critic) -> list[torch.Tensor]:
    """The read-outs and the gradients of one pass."""
    readout = critic.prompt_logits(PROMPTS)
    (readout * torch.arange(1, 5)).sum().backward()
    return [readout.detach(), *(p.grad for p in critic.parameters() if p.grad is not None)]


def test_a_large_critic_is_packed_and_fused_and_a_small_one_computes_what_transformers_does(monkeypatch):
    small = stirred(small_critic())
    large = copy.deepcopy(small)
    monkeypatch.setattr(module, "LARGE", 1)
    assert large.packs
    assert large.reader.fusable
    monkeypatch.undo()
    assert not small.packs
    assert not small.reader.fusable
    tokens: list[int] = []
    for critic in (small, large):
        critic.backbone.layers[0].mlp.register_forward_pre_hook(lambda _, x: tokens.append(x[0].numel() // 32))
    found, expected = learnt(large), learnt(small)
    assert tokens == [26, 36]  # no padding
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4 * float(theirs.abs().max()))
    hidden = small.backbone(input_ids=torch.tensor([PROMPTS[1]])).last_hidden_state[0, -1]
    assert torch.allclose(expected[0][1], small.head(hidden)[0], atol=1e-6)


def test_a_large_encoder_stays_padded(monkeypatch):
    """Its tokens see what comes after them, so packed ones would see each other."""
    plain = stirred(encoder())
    large = copy.deepcopy(plain)
    monkeypatch.setattr(module, "LARGE", 1)
    assert not large.packs
    monkeypatch.undo()
    assert not plain.packs
    assert all(map(torch.equal, learnt(large), learnt(plain)))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("make", [small_critic, encoder])
def test_recomputed_activations_give_the_same_bits(make, large, monkeypatch):
    if large:
        monkeypatch.setattr(module, "LARGE", 1)
    found = []
    for checkpointed in (False, True):
        critic = stirred(make())
        assert critic.packs == (large and make is small_critic)
        if checkpointed:
            critic.checkpoint_activations()
        seen: list[int] = []
        layers = critic.backbone.layers if make is small_critic else critic.backbone.encoder.layer
        (layers[0].self_attn if make is small_critic else layers[0].attention).register_forward_hook(
            lambda *_, seen=seen: seen.append(1)
        )
        found.append(learnt(critic))
        assert len(seen) == 1 + checkpointed
    assert all(map(torch.equal, *found))


def test_what_computes_a_critics_passes_is_no_part_of_it():
    """Its parameters are the backbone's and the head's, in this order: saved optimisers count on it."""
    critic = small_critic()
    before = list(critic.state_dict())
    assert not critic.packs
    assert list(critic.state_dict()) == before
    assert before[-2:] == ["head.weight", "head.bias"]
    other = copy.deepcopy(critic)
    assert other.reader.model is other.backbone
