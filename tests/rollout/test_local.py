"""The local engine against the plain loop, enumeration and counting."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    Lfm2Config,
    MistralConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

from sppo.errors import RunFailure
from sppo.models import tiny
from sppo.models.policy import Policy
from sppo.rollout.engine import Sampling
from sppo.rollout.kv_cache import _SlotLayer
from sppo.rollout.local import LocalEngine
from sppo.rollout.reference import PlainEngine
from sppo.rollout.sampler import Cut, draw

SIZES = {
    "vocab_size": 33, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "Qwen3": Qwen3Config(**SIZES),
    "Qwen2, biases": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, attention_bias=True),
    "Mistral, sliding window": MistralConfig(**SIZES, sliding_window=6),
    "GPT-2": GPT2Config(vocab_size=33, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "Gemma 2, soft caps": Gemma2Config(**SIZES, query_pre_attn_scalar=8, sliding_window=6),
    "OPT": OPTConfig(
        vocab_size=33,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.1,
        max_position_embeddings=128,
    ),
    "GPT-Neo, attention of its own": GPTNeoConfig(
        vocab_size=33,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        max_position_embeddings=128,
    ),
    "PhiMoE, a window told to the mask only": PhimoeConfig(**SIZES, sliding_window=6, num_local_experts=2),
    "LFM2, convolutions": Lfm2Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"}, layer_types=["conv", "full_attention", "conv"]
    ),
}
PACKED = ("Qwen3", "Qwen2, biases", "Mistral, sliding window", "GPT-2", "OPT")
"""The others are not guessed at: soft caps, recurrent states, masks that this knows nothing of."""
PROMPTS = [[1 + (7 * i + k) % 20 for k in range(2 + (i // 3) % 9)] for i in range(24)]


def of_family(name: str) -> Policy:
    torch.manual_seed(0)
    config = FAMILIES[name]
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return Policy(AutoModelForCausalLM.from_config(config), tiny.character_tokenizer(), name=name)


def plain(policy: Policy) -> PlainEngine:
    """The reference on a copy that knows nothing of packing or slots."""
    copy = policy.as_reference()
    copy.model.set_attn_implementation("eager")
    return PlainEngine(copy)


def chi2_limit(freedom: int) -> float:
    """The 99.9% point of χ² (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.0902 * spread**0.5) ** 3


class TokenCount:
    """How many tokens went through a model's embedding."""

    def __init__(self, policy: Policy) -> None:
        self.total = self.passes = 0
        policy.model.get_input_embeddings().register_forward_hook(self)

    def __call__(self, module, inputs, output) -> None:
        self.total += inputs[0].numel()
        self.passes += 1


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("batch", [24, 5, 1])
def test_slots_draw_what_the_plain_loop_draws(policy, batch, compiled):
    engine = LocalEngine(policy)
    assert engine.plain is None
    assert engine.compiled
    engine.compiled = compiled
    mine = engine.generate(PROMPTS, range(24), Sampling(20, 1.0, batch))
    theirs = plain(policy).generate(PROMPTS, range(24), Sampling(20))
    assert [s.ids for s in mine] == [s.ids for s in theirs]
    assert [s.finish for s in mine] == [s.finish for s in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_decoder(family):
    policy = of_family(family)
    with torch.no_grad():
        for p in policy.model.parameters():  # biases and norms that are not their neutral start
            p.add_(torch.randn_like(p) * 0.05)
    engine = LocalEngine(policy)
    in_slots = family in PACKED
    assert bool(engine.stated) != in_slots  # who samples slowly is told why
    assert engine.compiled == (family in ("Qwen3", "Qwen2, biases"))
    assert (engine.plain is None) == in_slots
    mine = engine.generate(PROMPTS, range(24), Sampling(20, 1.0, 7))
    theirs = plain(policy).generate(PROMPTS, range(24), Sampling(20))
    assert [s.ids for s in mine] == [s.ids for s in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=2e-5)
    learner = policy.given_logps(PROMPTS, [s.ids for s in mine])
    for a, b in zip(mine, learner, strict=True):
        assert a.logps == pytest.approx(b, abs=2e-5)


@pytest.mark.parametrize("batch", [6, 32])
def test_no_pass_computes_padding_and_no_prompt_is_read_twice(policy, batch):
    prompts = [p for p in PROMPTS[:8] for _ in range(4)]
    distinct = {tuple(p) for p in prompts}
    engine = LocalEngine(policy)
    engine.compiled = False  # so that every token goes through the embedding that counts
    count = TokenCount(policy)
    samples = engine.generate(prompts, range(32), Sampling(12, 1.0, batch))
    assert count.total == sum(map(len, distinct)) + sum(len(s.ids) - 1 for s in samples)


@pytest.mark.parametrize("compiled", [True, False])
def test_slots_grow_beyond_their_first_columns(policy, monkeypatch, compiled):
    """Where memory is taken at once, as on an accelerator."""
    grown = []
    grow = _SlotLayer.grow
    monkeypatch.setattr("sppo.rollout.kv_cache.FIRST", 4)
    monkeypatch.setattr("sppo.rollout.kv_cache._lazily", lambda states: False)
    monkeypatch.setattr(_SlotLayer, "grow", lambda self, columns: (grown.append(columns), grow(self, columns))[1])
    engine = LocalEngine(policy)
    grown.clear()
    engine.compiled = engine.compiled and compiled
    mine = engine.generate(PROMPTS, range(24), Sampling(20, 1.0, 5))
    assert len(set(grown)) > 1
    assert [s.ids for s in mine] == [s.ids for s in plain(policy).generate(PROMPTS, range(24), Sampling(20))]


def test_prompts_beyond_one_pass(policy, monkeypatch):
    monkeypatch.setattr("sppo.rollout.scheduler.PREFILL", 10)
    mine = LocalEngine(policy).generate(PROMPTS, range(24), Sampling(8))
    assert [s.ids for s in mine] == [s.ids for s in plain(policy).generate(PROMPTS, range(24), Sampling(8))]


def test_the_sampled_distribution_is_the_enumerated_one(policy):
    """All two-token responses to one prompt: counts against their exact probabilities."""
    n, prompt = 6000, [5, 6, 7]
    vocabulary = policy.model.get_input_embeddings().weight.size(0)
    pairs = [(a, b) for a in range(vocabulary) if a not in policy.eos_ids for b in range(vocabulary)]
    exact = {
        p: math.exp(sum(logps))
        for p, logps in zip(pairs, policy.given_logps([prompt] * len(pairs), pairs), strict=True)
    }
    found = Counter(
        tuple(s.ids)
        for s in LocalEngine(policy).generate([prompt] * n, range(n), Sampling(2, 1.0, 512))
        if len(s.ids) == 2
    )
    frequent = [p for p in pairs if exact[p] * n >= 5]
    rest = n * (1 - sum(exact[p] for p in frequent))
    expected = [*(exact[p] * n for p in frequent), rest]
    observed = [*(found[p] for p in frequent), n - sum(found[p] for p in frequent)]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert statistic < chi2_limit(len(expected) - 1)


@pytest.mark.parametrize(
    "cut", [Cut(), Cut(top_k=5), Cut(top_p=0.7), Cut(min_p=0.2), Cut(top_k=20, top_p=0.9, min_p=0.02)], ids=str
)
def test_draw_is_exact_with_and_without_a_cut(cut):
    torch.manual_seed(1)
    vocabulary, n, temperature = 600, 20000, 0.7
    logits_V = torch.randn(vocabulary) * 3
    p_V = (logits_V / temperature).softmax(-1)
    order = p_V.argsort(descending=True)
    keep = order[: cut.top_k or vocabulary]
    mass = p_V[keep].cumsum(0) / p_V[keep].sum()
    keep = keep[: int((mass < cut.top_p).sum()) + 1]
    keep = keep[p_V[keep] >= cut.min_p * p_V.max()]
    q_V = torch.zeros(vocabulary)
    q_V[keep] = p_V[keep] / p_V[keep].sum()
    token_N, logp_N, kept_N = draw(logits_V.expand(n, -1), torch.rand(n), temperature, cut)
    assert (q_V[token_N] > 0).all()
    assert torch.allclose(logp_N, p_V[token_N].log(), atol=1e-4)
    if cut:
        assert torch.allclose(kept_N, p_V[keep].sum().log().expand(n), atol=1e-4)
    else:
        assert kept_N is None
    observed, expected = torch.bincount(token_N, minlength=vocabulary).double(), (q_V * n).double()
    often = expected >= 5
    statistic = ((observed - expected)[often] ** 2 / expected[often]).sum()
    if often.sum() > 1:
        assert statistic < chi2_limit(int(often.sum()))


def test_a_nucleus_wider_than_the_head_is_sorted_whole():
    logits_V = torch.zeros(5000)  # uniform: 90% of the mass needs 4,500 tokens, more than the 1,024 looked at first
    token_N, _, kept_N = draw(logits_V.expand(50, -1) + torch.arange(5000) * -1e-6, torch.rand(50), 1.0, Cut(top_p=0.9))
    assert torch.allclose(kept_N.exp(), torch.tensor(0.9), atol=1e-3)
    assert token_N.max() < 4520


def test_a_cut_reports_what_was_sampled_from(policy):
    samples = LocalEngine(policy).generate(PROMPTS, range(24), Sampling(10, 1.0, 7, cut=Cut(top_k=3)))
    whole = policy.given_logps(PROMPTS, [s.ids for s in samples])
    for s, full in zip(samples, whole, strict=True):
        assert [a + b for a, b in zip(s.logps, s.kept, strict=True)] == pytest.approx(full, abs=2e-5)
        assert all(k < 0 for k in s.kept)


def test_a_stop_string_ends_a_response_and_is_part_of_it(policy):
    engine = LocalEngine(policy)
    free = engine.generate(PROMPTS, range(24), Sampling(20))
    text = [policy.text(s.ids) for s in free]
    stop = next(t[3:5] for t in text if len(t) > 6 and t.find(t[3:5]) == 3)
    stopped = engine.generate(PROMPTS, range(24), Sampling(20, 1.0, 7, stop=(stop, "never said")))
    assert any(stop in t for t in text)
    for whole, before, after in zip(text, free, stopped, strict=True):
        if stop in whole:
            said = policy.text(after.ids)
            assert said.endswith(stop)
            assert said.count(stop) == 1
            assert after.finish == "stop"
            assert before.ids[: len(after.ids)] == after.ids
        else:
            assert (after.ids, after.finish) == (before.ids, before.finish)


def test_score_is_what_sampling_reports(policy):
    engine = LocalEngine(policy)
    samples = engine.generate(PROMPTS, range(24), Sampling(12))
    for mine, s in zip(engine.score(PROMPTS, [s.ids for s in samples]), samples, strict=True):
        assert mine == pytest.approx(s.logps, abs=2e-5)


def test_a_bfloat16_model_is_sampled_as_closely_as_the_learner_knows_it(policy):
    """Rounding apart: neither the compiled step nor the slots may be further from the float32 model than the
    learner's own pass is."""
    responses = [[1 + (5 * i + k) % 20 for k in range(3 + i % 9)] for i in range(24)]
    rounded = copy.deepcopy(policy.model).to(torch.bfloat16)
    exact = Policy(copy.deepcopy(rounded).float(), policy.tokenizer).given_logps(PROMPTS, responses)
    policy = Policy(rounded, policy.tokenizer)

    def error(found):
        gaps = [(a - b) ** 2 for x, y in zip(found, exact, strict=True) for a, b in zip(x, y, strict=True)]
        return math.sqrt(sum(gaps) / len(gaps))

    engine = LocalEngine(policy)
    assert engine.compiled
    learners = error(policy.given_logps(PROMPTS, responses))
    assert 1e-4 < learners < 0.02
    for engine.compiled in (True, False):
        assert error(engine.score(PROMPTS, responses)) < 1.5 * learners


def test_bits_repeat(policy):
    engine = LocalEngine(policy)
    first, again = (engine.generate(PROMPTS, range(24), Sampling(15, 0.9, 7)) for _ in range(2))
    assert first == again


def test_a_model_is_left_as_it_was_when_sampling_breaks(policy):
    engine = LocalEngine(policy)
    assert engine.plain is None
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RunFailure, match="not finite"):
        engine.generate(PROMPTS, range(24), Sampling(4))
    assert not any("forward" in m.__dict__ for m in policy.model.modules())


def test_nothing_asked_nothing_sampled(policy):
    assert LocalEngine(policy).generate([], [], Sampling(4)) == []


def test_a_stop_string_that_is_a_special_token_ends_a_response(policy):
    eos = policy.tokenizer.eos_token
    policy.eos_ids = [policy.model.get_input_embeddings().weight.size(0) - 1]  # as if the model did not know its own
    samples = LocalEngine(policy).generate(PROMPTS, range(24), Sampling(60, stop=(eos,)))
    end = policy.tokenizer.eos_token_id
    assert any(s.ids[-1] == end and s.finish == "stop" for s in samples)
    assert not any(end in s.ids[:-1] for s in samples)
