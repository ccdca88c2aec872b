"""What runs only on CUDA, against float64 and against the plain ways: skipped where there is no GPU. `pytest
tests/gpu` on a machine that has one."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

from sppo.kernels import elementwise
from sppo.kernels.cuda import attention as attention_cuda
from sppo.kernels.cuda import head as head_cuda
from sppo.kernels.logprobs import token_logps, token_logps_from_logits
from sppo.learning.optimizer import MasterAdamW
from sppo.models import tiny
from sppo.models.policy import Policy
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.rollout.reference import PlainEngine
from tests.rollout.test_local import FAMILIES, PACKED, PROMPTS, of_family, plain

from ..conftest import logps_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def off(found: torch.Tensor, true: torch.Tensor) -> float:
    """‖found − true‖ / ‖true‖."""
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).norm() / true.norm())


def llama(dtype: torch.dtype = torch.bfloat16, **changes) -> Policy:
    """Llama-like, with grouped queries and whole registers."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes | changes))
    return Policy(model.to("cuda", dtype), tiny.character_tokenizer(), name="llama")


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head(monkeypatch, dtype, temperature):
    monkeypatch.setattr(head_cuda, "CHUNK_ELEMENTS", 64 * 5003)
    torch.manual_seed(0)
    hidden = (2 * torch.randn(301, 96, device="cuda")).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(5003, 96, device="cuda")).to(dtype).requires_grad_()
    target, grad = torch.randint(5003, (301,), device="cuda"), torch.randn(301, device="cuda")
    assert head_cuda.fits(hidden, weight, None)
    logp, entropy = token_logps(hidden, weight, None, target, temperature)
    (logp * grad).sum().backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    true, true_entropy = token_logps_from_logits(h @ w.t(), target, temperature)
    (true * grad).sum().backward()
    assert off(logp, true) < 1e-5  # in float32 whatever the model's dtype
    assert off(entropy, true_entropy) < 1e-5
    assert off(hidden.grad, h.grad) < CLOSE[dtype]
    assert off(weight.grad, w.grad) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("window", [None, 7])
def test_attention_of_a_pack(dtype, window):
    torch.manual_seed(0)
    lengths = [1, 40, 3, 17, 17, 130]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    # as a model has them: [N, heads, D] seen as [heads, N, D]
    parts = [torch.randn(sum(lengths), n, 32, device="cuda").to(dtype).transpose(0, 1) for n in (6, 2, 2)]
    if not attention_cuda.fits(*parts, window):
        assert dtype == torch.float32
        assert window
        return
    q, k, v = (x.detach().requires_grad_() for x in parts)
    out = attention_cuda.attention(q, k, v, starts, 0.2, window)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    for one, two in zip(found, torch.autograd.grad(out, (q, k, v), grad), strict=True):
        assert torch.equal(one, two)  # to the bit
    q, k, v = (x.detach().double().requires_grad_() for x in parts)
    rows = []
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        back = torch.arange(b - a, device="cuda")
        seen = (back[:, None] >= back) & (back[:, None] - back < (window or b))
        one = scaled_dot_product_attention(
            q[None, :, a:b], k[None, :, a:b], v[None, :, a:b], attn_mask=seen, scale=0.2, enable_gqa=True
        )
        rows.append(one[0].transpose(0, 1))
    true = torch.cat(rows)
    assert off(out, true) < CLOSE[dtype]
    for mine, theirs in zip(found, torch.autograd.grad(true, (q, k, v), grad.double()), strict=True):
        assert off(mine, theirs) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE)
def test_what_lies_between_products(dtype):
    torch.manual_seed(0)
    x, gate, up = (torch.randn(1, 37, 3, 96, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    weight = torch.randn(96, device="cuda").to(dtype).requires_grad_()
    angle = torch.randn(1, 37, 48, device="cuda").repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    d = {
        name: t.detach().double().requires_grad_() for name, t in {"x": x, "gate": gate, "up": up, "w": weight}.items()
    }
    first, second = d["x"].chunk(2, -1)
    pairs = [
        (elementwise.rms_norm(x, weight, 1e-5), d["w"] * d["x"] / (d["x"].square().mean(-1, True) + 1e-5).sqrt()),
        (elementwise.gated_unit(gate, up), torch.nn.functional.silu(d["gate"]) * d["up"]),
        (
            elementwise.turned(x, cos, sin),
            d["x"] * cos.double()[:, :, None] + torch.cat([-second, first], -1) * sin.double()[:, :, None],
        ),
    ]
    grad = torch.randn(1, 37, 3, 96, device="cuda").to(dtype)
    for found, true in pairs:
        assert off(found, true) < CLOSE[dtype]
        found.backward(grad)
        true.backward(grad.double())
    for mine, theirs in ((x, "x"), (gate, "gate"), (up, "up"), (weight, "w")):
        assert off(mine.grad, d[theirs].grad) < CLOSE[dtype]


def test_a_policy_scores_as_on_the_cpu():
    policy = llama(torch.float32)
    assert policy.packs
    assert policy.scorer.fusable
    assert attention_cuda.fits(*(torch.zeros(2, 3, 32, device="cuda") for _ in range(3)), None)
    there = Policy(copy.deepcopy(policy.model).cpu(), policy.tokenizer)
    ids_BL = torch.randint(97, (5, 40))
    prompt_B, response_B = torch.tensor([3, 8, 1, 20, 5]), torch.tensor([30, 8, 39, 1, 12])
    found = []
    for one in (policy, there):
        logp_BT = logps_of(one, ids_BL, prompt_B, response_B, 0.8).logp_BT
        logp_BT.square().sum().backward()
        grads = {name: p.grad.cpu() for name, p in one.model.named_parameters()}
        found.append((logp_BT.detach().cpu(), grads))
    assert off(found[0][0], found[1][0]) < 1e-5
    for name, grad in found[0][1].items():
        assert off(grad, found[1][1][name]) < 1e-4, name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_sampled_as_by_the_plain_loop(name):
    policy = of_family(name)
    policy.model.cuda()
    policy = Policy(policy.model, policy.tokenizer, name=name)
    engine = LocalEngine(policy)
    assert (engine.captured is not None) == (name in PACKED), engine.stated
    asked = (PROMPTS, list(range(24)), Sampling(12, 1.0, 5))
    mine, theirs = engine.generate(*asked), plain(policy).generate(*asked)
    assert [s.ids for s in mine] == [s.ids for s in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_follow_the_weights_and_longer_sequences(dtype):
    policy = llama(dtype)
    engine = LocalEngine(policy)
    assert engine.captured is not None, engine.stated
    responses = [[(5 * b + 3 * t) % 97 for t in range(300 - 29 * b)] for b in range(7)]
    prompts = [[b + 1, 2, 3] for b in range(7)]
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    for turn in range(3):
        mine, theirs = engine.score(prompts, responses), policy.given_logps(prompts, responses)
        gap = max(abs(a - b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))
        assert gap < tolerance, turn
        with torch.no_grad():  # an update: in place, as the optimiser does it
            for p in policy.model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
    assert engine.captured.slots is not None
    engine.close()
    assert engine.captured.slots is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_go_through_the_active_adapter(dtype):
    """One adapter, another, none: graphs of one are not replayed for the next. And an update in between."""
    from tests.kernels.test_low_rank import apart, with_adapters

    tuned = with_adapters(llama(dtype).model, "critic", r=6, lora_alpha=9)
    policy = Policy(tuned.base_model.model, tiny.character_tokenizer(), name="llama")
    engine = LocalEngine(policy)
    assert engine.captured is not None, engine.stated
    responses = [[(5 * b + 3 * t) % 97 for t in range(60 - 5 * b)] for b in range(7)]
    prompts = [[b + 1, 2, 3] for b in range(7)]
    tolerance, seen = 0.1 if dtype == torch.bfloat16 else 1e-4, []
    for adapter in ("default", "critic", None, "default"):
        tuned.set_adapter(adapter or "default")
        with tuned.disable_adapter() if adapter is None else contextlib.nullcontext():
            found, theirs = engine.score(prompts, responses), policy.given_logps(prompts, responses)
        assert apart(found, theirs) < tolerance, adapter
        assert all(apart(found, other) > 3 * tolerance for other in seen), adapter
        seen.append(found)
        with torch.no_grad():  # in place, as the optimiser does it
            for name, p in policy.model.named_parameters():
                if ".lora_B.default." in name:
                    p.add_(torch.randn_like(p) * 0.3)


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_layer_with_an_adapter(dtype):
    from peft.tuners import lora

    from sppo.kernels.low_rank import adapted_forward
    from tests.kernels.test_low_rank import replaced_in, with_adapters

    model = with_adapters(llama(dtype).model, r=6, lora_alpha=9).base_model.model
    assert len(replaced_in(model)) == 21
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, lora.Linear)
    x = torch.randn(2, 37, 256, device="cuda").to(dtype).requires_grad_()
    a, b, w = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    found = adapted_forward(layer, x)
    grad = torch.randn_like(found)
    found.backward(grad)
    xd, ad, bd = (t.detach().double().requires_grad_() for t in (x, a, b))
    true = xd @ (w.double() + 1.5 * bd @ ad).t()
    true.backward(grad.double())
    assert off(found, true) < CLOSE[dtype]
    for mine, theirs in ((x, xd), (a, ad), (b, bd)):
        assert off(mine.grad, theirs.grad) < CLOSE[dtype]


def test_what_was_sampled_before_changes_no_bit():
    policy = llama()
    used, fresh = LocalEngine(policy), LocalEngine(policy)
    used.generate([[1, 2]] * 90, list(range(90)), Sampling(400, 1.0, 90))
    prompts = [[1 + b % 7, 5, b % 3] for b in range(40)]
    asked = (prompts, list(range(40)), Sampling(50, 1.0, 13))
    one, two = used.generate(*asked), fresh.generate(*asked)
    assert [(s.ids, s.logps) for s in one] == [(s.ids, s.logps) for s in two]


def test_grouped_queries_are_sampled_as_by_the_plain_loop():
    policy = llama(torch.float32)
    asked = (PROMPTS, list(range(24)), Sampling(12, 1.0, 5))
    assert [s.ids for s in LocalEngine(policy).generate(*asked)] == [
        s.ids for s in PlainEngine(policy).generate(*asked)
    ]


WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 32}


def trained(**made) -> tuple[float, dict[str, torch.Tensor]]:
    """What three steps of two micro-batches each take of the GPU at their peak, as a multiple of the weights, and the
    weights that they lead to."""
    policy = llama(**WIDE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimiser = MasterAdamW(policy.trained.values(), betas=(0.9, 0.95), weight_decay=0.0, **made)
    for step in range(3):
        for part in range(2):
            ids_BL = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(2 * step + part))
            optimiser.backward(logps_of(policy, ids_BL, torch.tensor([4]), torch.tensor([8]), 1.0).logp_BT.sum())
        optimiser.step(1e-2, 1.0)
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    taken = (torch.cuda.max_memory_allocated() - before) / weights
    return taken, {name: p.detach().float().cpu() for name, p in policy.trained.items()}


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_an_offloaded_optimiser_takes_nothing_of_the_gpu_and_trains_the_same(kind):
    """Of bfloat16 weights master, moments and sum of gradients take 8 times as much again, with 8-bit moments 5."""
    (here, stayed), (there, moved) = (trained(kind=kind, offload=offload) for offload in (False, True))
    assert there < 0.5
    assert here > 4
    start = {name: p.detach().float().cpu() for name, p in llama(**WIDE).trained.items()}
    for name, p in stayed.items():
        assert off(moved[name] - start[name], p - start[name]) < 0.2, name  # a rounding to bfloat16 may fall either way
