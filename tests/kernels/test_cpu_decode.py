"""The compiled decoding step against the model's own layers."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sppo.kernels import elementwise
from sppo.kernels.cpu import attention, decode, head
from sppo.kernels.cpu import build as compiled
from sppo.models import tiny
from sppo.models.policy import Policy
from sppo.rollout.engine import Sampling
from sppo.rollout.kv_cache import Slots
from sppo.rollout.local import LocalEngine

from ..conftest import forget_compiled

SIZES = {"vocab_size": 101, "num_hidden_layers": 2, "max_position_embeddings": 256,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {
    "whole registers": {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
    "five heads a group": {"hidden_size": 160, "intermediate_size": 224, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 32},
    "nothing fits a register": {"hidden_size": 44, "intermediate_size": 75, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 22},
}  # fmt: skip
PROMPTS = [[1 + (7 * i + k) % 90 for k in range(2 + 5 * i)] for i in range(9)]


def model_of(shape: str, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = SIZES | SHAPES[shape]
    made = (
        LlamaForCausalLM(LlamaConfig(**config, attention_bias=True))
        if kind == "llama"
        else Qwen3ForCausalLM(Qwen3Config(**config))
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return made.to(dtype).eval()


def policy_of(model: Any) -> Policy:
    return Policy(model, tiny.character_tokenizer())


pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_to_compile_it_computes_the_model(compiled_for, shape, kind):
    """Sizes that fill registers, and sizes that do not."""
    policy = policy_of(model_of(shape, kind))
    engine = LocalEngine(policy)
    assert engine.compiled
    responses = [[(5 * i + k) % 90 for k in range(20 - i)] for i in range(len(PROMPTS))]
    mine, theirs = engine.score(PROMPTS, responses), policy.given_logps(PROMPTS, responses)
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, abs=3e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_it_is_as_exact_as_the_model(compiled_for, shape, kind):
    rounded = model_of(shape, kind, torch.bfloat16)
    responses = [[(5 * i + k) % 90 for k in range(20 - i)] for i in range(len(PROMPTS))]
    exact = policy_of(copy.deepcopy(rounded).float()).given_logps(PROMPTS, responses)
    policy = policy_of(rounded)
    engine = LocalEngine(policy)
    assert engine.compiled

    def error(found: list[list[float]]) -> float:
        gaps = torch.tensor([a - b for x, y in zip(found, exact, strict=True) for a, b in zip(x, y, strict=True)])
        return float(gaps.square().mean().sqrt())

    assert error(engine.score(PROMPTS, responses)) < 1.3 * error(policy.given_logps(PROMPTS, responses))


def stepped(model: Any, rows: list[int], threads: int | None = None) -> torch.Tensor:
    """Logits of these rows, each with its own past, decoded together."""
    slots = Slots(model.config, len(rows), 80)
    for n, layer in enumerate(slots.layers):
        past = torch.zeros(1, model.config.num_key_value_heads, 1, model.config.head_dim, dtype=model.dtype)
        layer.lazy_initialization(past, past)
        for b, row in enumerate(rows):
            made = torch.Generator().manual_seed(1000 * n + row)
            layer.key_store[b] = torch.randn(layer.key_store[b].shape, generator=made)
            layer.value_store[b] = torch.randn(layer.value_store[b].shape, generator=made)
    lengths = [1 + (13 * row) % 70 for row in rows]
    ids_B = torch.tensor([(31 * row) % 100 for row in rows])
    decoder = decode.Decoder(model, slots)
    decoder.threads = threads or decoder.threads
    slots.write_next(torch.tensor(lengths), max(lengths) + 1)
    return decoder.next_logits(ids_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_bits_whoever_is_beside_it(shape, dtype):
    model = model_of(shape, dtype=dtype)
    together = stepped(model, list(range(23)))
    for row in (0, 4, 5, 17, 22):
        assert torch.equal(stepped(model, [row])[0], together[row])
    for threads in (1, 3, 7):
        assert torch.equal(stepped(model, list(range(23)), threads), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_of_a_small_model_s_pass_are_the_same_bits_as_the_whole(shape, dtype):
    """From some rows on, threads take sequences instead of parts of products: next tokens, and prompts of several
    tokens."""
    model = model_of(shape, dtype=dtype)
    alone = stepped(model, list(range(90)), 1)
    for threads in (2, 3):
        assert torch.equal(stepped(model, list(range(90)), threads), alone)
    lengths = [1 + (7 * b) % 11 for b in range(30)]
    found = []
    for threads in (1, 2, 3):
        slots = Slots(model.config, len(lengths), 16)
        decoder = decode.Decoder(model, slots)
        decoder.threads = threads
        slots.write_prompts(list(range(30)), lengths, torch.device("cpu"))
        ids_N = torch.arange(sum(lengths)) * 17 % 100
        logits = decoder.next_logits(ids_N, torch.tensor(lengths).cumsum(0) - 1).clone()
        found.append(
            (logits, *(store.clone() for layer in slots.layers for store in (layer.key_store, layer.value_store)))
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_new_weights_are_sampled_from_at_once():
    policy = policy_of(model_of("whole registers"))
    engine = LocalEngine(policy)
    before = engine.score([[1, 2]], [[3, 4, 5]])
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    after = engine.score([[1, 2]], [[3, 4, 5]])
    assert after[0] != pytest.approx(before[0], abs=1e-3)
    assert after[0] == pytest.approx(policy.given_logps([[1, 2]], [[3, 4, 5]])[0], abs=3e-5)


@pytest.mark.parametrize(
    ("compiler", "why"), [("no-such-compiler", "no C compiler (no-such-compiler)"), ("false", "does not compile"), ("env false", "does not compile")]
)  # fmt: skip
def test_without_it_sampling_is_slower_and_says_why(monkeypatch, tmp_path, compiler, why):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    forget_compiled()
    policy = policy_of(model_of("whole registers"))
    engine = LocalEngine(policy)
    assert not engine.compiled
    assert engine.plain is None
    assert "not compiled" in engine.stated
    assert why in engine.stated
    slow = engine.generate(PROMPTS, range(9), Sampling(12))
    monkeypatch.undo()
    forget_compiled()
    quick = LocalEngine(policy)
    assert quick.compiled
    assert quick.stated == ""
    assert [s.ids for s in quick.generate(PROMPTS, range(9), Sampling(12))] == [s.ids for s in slow]


def test_no_test_leaves_its_own_way_of_compiling_to_the_next() -> None:
    made = attention._compiled, elementwise._compiled, head._compiled
    caches = [*made, compiled.library]
    for ask, given in zip(made, [[torch.float32], [torch.float32], []], strict=True):
        ask(*given)
    assert all(cache.cache_info().currsize for cache in caches)
    forget_compiled()
    assert not any(cache.cache_info().currsize for cache in caches)


def test_what_is_cached_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_compiled()
    compiled.library("decode", torch.float32)
    (made,) = (tmp_path / "sppo").iterdir()
    made.unlink()
    (tmp_path / "sppo").chmod(0o777)  # somebody else could put a file there
    forget_compiled()
    compiled.library("decode", torch.float32)
    assert list((tmp_path / "sppo").iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no")
    forget_compiled()
    compiled.library("decode", torch.float32)
    forget_compiled()


def test_a_model_with_something_of_its_own_is_left_to_its_own_layers():
    def changed(change) -> bool:
        model = model_of("whole registers")
        change(model)
        return decode.fits(model)

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

    assert changed(lambda m: None)
    assert not changed(
        lambda m: setattr(m.model.layers[0].self_attn, "q_proj", Adapted(m.model.layers[0].self_attn.q_proj))
    )
    assert not changed(lambda m: m.model.norm.register_forward_hook(lambda *a: None))
    assert not changed(lambda m: setattr(m, "lm_head", torch.nn.Linear(192, 101)))
    assert not changed(lambda m: m.double())
    assert not changed(lambda m: setattr(m.config, "sliding_window", 4))
    with pytest.raises(ValueError, match="not a model that"):
        decode.Decoder(model_of("whole registers").double(), None)


def test_an_error_of_the_compiled_step_is_noticed_before_it_is_used(monkeypatch):
    policy = policy_of(model_of("whole registers"))
    right = decode.Decoder.next_logits
    for wrong in (1.5, float("nan")):
        monkeypatch.setattr(decode.Decoder, "next_logits", lambda *a, by=wrong: right(*a) * by)
        engine = LocalEngine(policy)
        assert not engine.compiled
        assert "decoding is not compiled" in engine.stated


def test_a_part_turned_by_rotation_is_refused(monkeypatch):
    model = model_of("whole registers")
    turns = model.model.rotary_emb.forward
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda *a: tuple(t[..., :32] for t in turns(*a)))
    with pytest.raises(ValueError, match="a part of each head"):
        decode.Decoder(model, Slots(model.config, 1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_is_not_hidden(dtype):
    model = model_of("whole registers", dtype=dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    assert stepped(model, [1, 2]).isnan().all()


def test_a_token_that_the_model_does_not_have_is_refused():
    policy = policy_of(model_of("whole registers"))
    engine = LocalEngine(policy)
    assert engine.compiled
    for wrong in (101, -1):
        with pytest.raises(IndexError, match="101 rows"):
            engine.generate([[1, wrong]], [0], Sampling(2))
