"""Heads that scale or cap their logits (Gemma 2, Granite, Cohere) in bfloat16: projection, scale, cap and log-softmax
are float32, learner and engine."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, DynamicCache, Gemma2Config, GraniteConfig

from sppo.models import tiny
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
    policy.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    return seen


def exact(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of given states in float64."""
    return HEADS[policy.name][1](hidden.double() @ policy.model.get_output_embeddings().weight.double().T)


@pytest.mark.parametrize("family", HEADS)
def test_the_learners_log_probabilities_and_gradient_are_those_of_a_float64_head(family):
    policy = capped(family)
    assert not policy.scorer.head.direct
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
        # packed: the wanted states follow each other; padded: rows of the longest prompt and response less one
        rows = states[at : at + r] if len(states) == int(response.sum()) else seen[0][b, p - 1 : p + r - 1]
        at += r
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
    assert "forward" not in policy.model.get_output_embeddings().__dict__


@pytest.mark.parametrize("family", HEADS)
def test_engine_and_learner_agree_in_float32(family):
    policy = capped(family, torch.float32)
    prompts = [[1 + (7 * i + k) % 20 for k in range(2 + i)] for i in range(6)]
    samples = LocalEngine(policy).generate(prompts, range(6), Sampling(10))
    for a, b in zip(samples, policy.given_logps(prompts, [s.ids for s in samples]), strict=True):
        assert a.logps == pytest.approx(b, abs=1e-4)


def test_a_cap_is_found_where_the_models_own_logits_are_too_small_to_feel_it():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS["Gemma 2"][0])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    assert not Policy(model, tiny.character_tokenizer()).scorer.head.direct
    assert Policy(*tiny.build(hidden=32, layers=1, heads=2)).scorer.head.direct
