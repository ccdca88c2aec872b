"""Heads that scale or cap their logits (Gemma 2, Granite, Cohere): found by asking the model, and computed in chunks.
In bfloat16 projection, scale, cap and log-softmax are float32, learner and engine."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
)

from sppo.kernels import logprobs
from sppo.models import tiny
from sppo.models.head import backbone
from sppo.models.policy import Policy
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine

from ..conftest import logps_of

SIZES = {
    "vocab_size": 33, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
HEADS = {
    "Gemma 2": (
        Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=30.0),
        lambda z: 30 * torch.tanh(z / 30),
    ),
    "Granite": (GraniteConfig(**SIZES, logits_scaling=0.5), lambda z: z / 0.5),
    "Cohere": (CohereConfig(**SIZES, logit_scale=4.0), lambda z: z * 4.0),
}
LENGTHS = [(3, 5), (4, 2), (2, 7)]


def capped(family: str, dtype: torch.dtype = torch.bfloat16) -> Policy:
    """A small one, whose logits reach from −40 to 40."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS[family][0])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(400 if family == "Gemma 2" else 100)
    return Policy(model.to(dtype), tiny.character_tokenizer(), name=family)


def watched(policy: Policy) -> list[torch.Tensor]:
    """What the head is given, pass by pass."""
    seen: list[torch.Tensor] = []
    backbone(policy.model).register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state.detach()))
    return seen


def exact(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of given states in float64."""
    return HEADS[policy.name][1](hidden.double() @ policy.model.get_output_embeddings().weight.double().T)


@pytest.mark.parametrize("family", HEADS)
def test_the_learners_log_probabilities_and_gradient_are_those_of_a_float64_head(family):
    policy = capped(family)
    assert policy.scorer.head.direct
    prompt, response = torch.tensor(LENGTHS).T
    ids = torch.randint(1, 33, (3, 9))
    seen = watched(policy)
    found = logps_of(policy, ids, prompt, response, 0.7)
    rounded = policy.model(ids, use_cache=False).logits.float()
    weight = policy.model.get_output_embeddings().weight
    (gradient,) = torch.autograd.grad(found.logp_BT.sum(), weight, retain_graph=True, allow_unused=True)
    head = weight.detach().double().requires_grad_(True)
    total, off, off_rounded, largest = 0.0, 0.0, 0.0, 0.0
    states = seen[0].flatten(0, 1)
    at = 0
    for b, (p, r) in enumerate(LENGTHS):
        rows = states[at + p - 1 : at + p + r - 1] if policy.packs else seen[0][b, p - 1 : p + r - 1]
        at += p + r - 1
        z = HEADS[family][1](rows.double() @ head.T)
        assert float(z.detach().abs().max()) > 15
        logps = torch.log_softmax(z / 0.7, -1)[torch.arange(r), ids[b, p : p + r]]
        by_model = torch.log_softmax(rounded[b, p - 1 : p + r - 1] / 0.7, -1)[torch.arange(r), ids[b, p : p + r]]
        off = max(off, float((found.logp_BT[b, :r] - logps).detach().abs().max()))
        off_rounded = max(off_rounded, float((found.logp_BT[b, :r] - by_model).detach().abs().max()))
        total = total + logps.sum()
    assert off < 1e-4
    assert off_rounded > 1e-2  # what a head of bfloat16 would have cost
    (true,) = torch.autograd.grad(total, head)
    if not policy.model.config.tie_word_embeddings:
        largest = float(true.abs().max())
        assert float((gradient.double() - true).abs().max()) < 2**-7 * largest  # rounded once, to the weight's dtype


@pytest.mark.parametrize("family", HEADS)
@torch.no_grad()
def test_the_engines_logits_are_those_of_a_float64_head(family):
    policy = capped(family)
    seen = watched(policy)
    ids = torch.randint(1, 33, (2, 6))
    logits = policy.next_logits(input_ids=ids, past_key_values=DynamicCache(config=policy.model.config))
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), exact(policy, seen[0][:, -1]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", HEADS)
def test_engine_and_learner_agree_in_float32(family):
    policy = capped(family, torch.float32)
    prompts = [[1 + (7 * i + k) % 20 for k in range(2 + i)] for i in range(6)]
    samples = LocalEngine(policy).generate(prompts, range(6), Sampling(10))
    for a, b in zip(samples, policy.given_logps(prompts, [s.ids for s in samples]), strict=True):
        assert a.logps == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_cap_are_found(dtype):
    found = {family: capped(family, dtype).scorer.head for family in HEADS}
    assert [(h.scale, h.cap) for h in found.values()] == [(1.0, 30.0), (2.0, None), (4.0, None)]


def test_a_cap_is_found_where_the_models_own_logits_are_too_small_to_feel_it():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS["Gemma 2"][0])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    assert Policy(model, tiny.character_tokenizer()).scorer.head.cap == 30.0
    plain = Policy(*tiny.build(hidden=32, layers=1, heads=2)).scorer.head
    assert (plain.direct, plain.scale, plain.cap) == (True, 1.0, None)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_in_chunks_are_those_of_whole_logits_in_float64(family, with_bias, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 16 * 33)  # 16 tokens per chunk
    head = capped(family, torch.float64).scorer.head
    torch.manual_seed(1)
    given = [4 * torch.randn(50, 8, dtype=torch.float64), 4 * torch.randn(33, 8, dtype=torch.float64)]
    given += [torch.randn(33, dtype=torch.float64)] if with_bias else []
    target, weight = torch.randint(33, (50,)), torch.randn(50, dtype=torch.float64)
    found = []
    for chunked in (True, False):
        hidden, matrix, *bias = (x.clone().requires_grad_(True) for x in given)
        if chunked:
            bias_V = bias[0] if bias else None
            logp, entropy = logprobs.token_logps(hidden, matrix, bias_V, target, 0.7, head.scale, head.cap)
        else:
            logits = HEADS[family][1](torch.nn.functional.linear(hidden, matrix, bias[0] if bias else None))
            logp, entropy = logprobs.token_logps_from_logits(logits, target, 0.7)
        (logp * weight).sum().backward()
        found.append([logp.detach(), entropy, *(x.grad for x in (hidden, matrix, *bias))])
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", HEADS)
def test_no_tensor_of_tokens_times_vocabulary_is_kept(family):
    """A pass keeps tensors for its backward pass; none of them holds a logit of every token."""
    policy = capped(family, torch.float32)
    kept: list[int] = []
    ids, lengths = torch.randint(1, 33, (8, 40)), torch.full((8,), 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.extend(x.shape[-1:]) or x, lambda x: x):
        logps_of(policy, ids, lengths, torch.full((8,), 38), 1.0)
    assert kept
    assert 33 not in kept


def test_a_head_that_does_something_else_keeps_whole_logits():
    class Wavy(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + out.logits.sin()
            return out

    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    policy = Policy(Wavy(model.config), tokenizer)
    assert not policy.scorer.head.direct
    ids = torch.randint(3, 33, (2, 6))
    found = logps_of(policy, ids, torch.tensor([2, 3]), torch.tensor([4, 3]), 1.0)
    logits = policy.model(ids).logits.log_softmax(-1)
    assert torch.allclose(found.logp_BT[0], logits[0, 1:5].gather(-1, ids[0, 2:, None])[:, 0], atol=1e-5)
