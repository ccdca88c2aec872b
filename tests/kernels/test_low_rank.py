"""Adapters (LoRA) through the compiled decoding and the replaced layers, against their products written out."""

from __future__ import annotations

import copy
import shutil
import warnings
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sppo.kernels.low_rank import adapted_forward, base_of, dense, is_adapted
from sppo.kernels.patch_layers import fusable, fused
from sppo.models.policy import Policy
from sppo.rollout.local import LocalEngine

from .test_cpu_decode import PROMPTS, SHAPES, model_of, policy_of, stepped

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

RESPONSES = [[(5 * i + k) % 90 for k in range(20 - i)] for i in range(len(PROMPTS))]
KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 6, "lora_alpha": 9},
    "some, of several ranks": {
        "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "rank_pattern": {"v_proj": 5, "up_proj": 17}, "alpha_pattern": {"v_proj": 11},
    },
    "rsLoRA": {"r": 7, "lora_alpha": 3, "use_rslora": True},
}  # fmt: skip


def with_adapters(model: Any, *names: str, **options: Any) -> Any:
    """A peft model over this one, whose adapters, "default" and these, all do something; "default" is active."""
    config = peft.LoraConfig(**{"target_modules": "all-linear", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reads an attribute that transformers renamed; an adapter may not merge
        made = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        for name in names:
            made.add_adapter(name, config, autocast_adapter_dtype=False)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.data = p.to(model.dtype)  # over int8 peft makes float32
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=drawn))
    return made.eval()


def written_out(model: Any, adapter: str = "default") -> Any:
    """The model without peft: every adapted layer a matrix in float64, W + scale · B A."""
    plain = copy.deepcopy(model).double()
    for name, module in list(plain.named_modules()):
        if is_adapted(module):
            a, b = (part[adapter].weight.data for part in (module.lora_A, module.lora_B))
            module.base_layer.weight.data += module.scaling[adapter] * b @ a
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, module.base_layer)
    return plain


def flat(found: list[list[float]]) -> Tensor:
    return torch.tensor([x for row in found for x in row])


def apart(one: list[list[float]], two: list[list[float]]) -> float:
    return float((flat(one) - flat(two)).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", KINDS)
def test_what_is_sampled_is_the_product_written_out(compiled_for, adapters, shape):
    model = with_adapters(model_of(shape, "qwen3" if adapters == "rsLoRA" else "llama"), **KINDS[adapters])
    policy = policy_of(model.base_model.model)
    engine = LocalEngine(policy)
    assert engine.compiled
    exact = policy_of(written_out(policy.model)).given_logps(PROMPTS, RESPONSES)
    found = engine.score(PROMPTS, RESPONSES)
    assert apart(found, exact) < 3e-5
    assert apart(found, policy.given_logps(PROMPTS, RESPONSES)) < 3e-5
    with model.disable_adapter():
        base = engine.score(PROMPTS, RESPONSES)
        assert apart(base, policy.given_logps(PROMPTS, RESPONSES)) < 3e-5
    assert apart(base, exact) > 0.1


@pytest.mark.parametrize("wrong", ["scale", "q and k", "gate and up", "o", "down"])
def test_a_wrong_adapter_is_seen(wrong):
    """What the test above would find were a part left out, scaled wrongly or taken for another."""
    policy = policy_of(with_adapters(model_of("whole registers"), **KINDS["all"]).base_model.model)
    before = policy.given_logps(PROMPTS, RESPONSES)
    layer = policy.model.model.layers[0]
    parts = layer.self_attn._modules | layer.mlp._modules
    if wrong == "scale":
        parts["v_proj"].scaling["default"] *= 1.1
    elif " and " in wrong:
        one, two = (parts[f"{name}_proj"] for name in wrong.split(" and "))
        one.lora_A, two.lora_A = two.lora_A, one.lora_A
    else:
        parts[f"{wrong}_proj"].scaling["default"] = 0.0
    assert apart(policy.given_logps(PROMPTS, RESPONSES), before) > 1e-3
    assert apart(LocalEngine(policy).score(PROMPTS, RESPONSES), before) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", KINDS)
def test_in_bfloat16_it_is_as_exact_as_the_model(compiled_for, adapters, shape):
    model = with_adapters(model_of(shape, dtype=torch.bfloat16), **KINDS[adapters]).base_model.model
    exact = policy_of(written_out(model)).given_logps(PROMPTS, RESPONSES)
    policy = policy_of(model)
    engine = LocalEngine(policy)
    assert engine.compiled

    def error(found: list[list[float]]) -> float:
        return float((flat(found) - flat(exact)).square().mean().sqrt())

    assert error(engine.score(PROMPTS, RESPONSES)) < 1.3 * error(policy.given_logps(PROMPTS, RESPONSES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_is_not_active_changes_no_bit(dtype):
    alone = with_adapters(model_of("whole registers", dtype=dtype), **KINDS["all"])
    two = with_adapters(model_of("whole registers", dtype=dtype), "critic", **KINDS["all"])
    alone.load_state_dict({k: v for k, v in two.state_dict().items() if ".critic." not in k})
    one, other = (LocalEngine(policy_of(m.base_model.model)) for m in (alone, two))
    assert one.compiled
    assert other.compiled
    found = one.score(PROMPTS, RESPONSES)
    assert other.score(PROMPTS, RESPONSES) == found
    two.set_adapter("critic")
    critics = other.score(PROMPTS, RESPONSES)
    assert apart(critics, found) > 0.1
    exact = policy_of(written_out(two.base_model.model, "critic")).given_logps(PROMPTS, RESPONSES)
    assert apart(critics, exact) < (3e-5 if dtype == torch.float32 else 0.1)
    two.set_adapter("default")
    assert other.score(PROMPTS, RESPONSES) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_bits_whoever_is_beside_it(shape, dtype):
    """With one other or many, by several threads, and with so many others that threads take sequences."""
    model = with_adapters(model_of(shape, dtype=dtype), **KINDS["some, of several ranks"]).base_model.model
    together = stepped(model, list(range(90)))
    for threads in (1, 2, 3):
        assert torch.equal(stepped(model, list(range(90)), threads), together)
    for row in (0, 5, 17, 89):
        assert torch.equal(stepped(model, [row], 3)[0], together[row])


def test_new_weights_of_an_adapter_are_sampled_from_at_once():
    policy = policy_of(with_adapters(model_of("whole registers"), **KINDS["all"]).base_model.model)
    engine = LocalEngine(policy)
    before = engine.score(PROMPTS, RESPONSES)
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.mul_(1.5)
    after = engine.score(PROMPTS, RESPONSES)
    assert apart(after, before) > 1e-3
    assert apart(after, policy.given_logps(PROMPTS, RESPONSES)) < 3e-5


def test_other_adapters_are_left_to_the_models_own_layers():
    """DoRA, biases, dropout, merged ones, adapters of the embedding, two at a time: sampled rightly, if more slowly."""

    def engine(change: Any = lambda model: None, **options: Any) -> LocalEngine:
        model = with_adapters(model_of("whole registers"), "critic", **KINDS["all"] | options)
        change(model)
        found = LocalEngine(policy_of(model.base_model.model))
        assert apart(found.score(PROMPTS, RESPONSES), found.policy.given_logps(PROMPTS, RESPONSES)) < 3e-5
        return found

    assert engine().compiled
    assert not engine(use_dora=True).compiled
    assert not engine(lora_bias=True, target_modules=["q_proj"]).compiled
    assert not engine(target_modules=["q_proj", "embed_tokens"]).compiled
    assert not engine(target_modules=["q_proj", "lm_head"]).compiled
    assert not engine(lambda model: model.base_model.set_adapter(["default", "critic"])).compiled
    assert not engine(lambda model: model.merge_adapter()).compiled


def quantised(folder: Any, how: str, dtype: torch.dtype) -> Policy:
    """A policy over a base whose linear layers are quantised."""
    pytest.importorskip("bitsandbytes")
    model_of("whole registers", "qwen3").to(dtype).save_pretrained(folder)
    options = {"load_in_8bit": True} if how == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": how == "double nf4",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options), dtype=dtype)
    return policy_of(with_adapters(model, **KINDS["some, of several ranks"]).base_model.model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["nf4", "double nf4", "int8"])
def test_a_quantised_base_is_sampled_as_the_learner_has_it(tmp_path, how, dtype):
    policy = quantised(tmp_path, how, dtype)
    engine = LocalEngine(policy)
    assert engine.compiled
    theirs = policy.given_logps(PROMPTS, RESPONSES)
    assert apart(engine.score(PROMPTS, RESPONSES), theirs) < (3e-5 if dtype == torch.float32 else 0.1)
    before = flat(engine.score(PROMPTS, RESPONSES))
    plain = policy_of(model_of("whole registers", "qwen3").to(dtype))
    assert float((flat(plain.given_logps(PROMPTS, RESPONSES)) - before).abs().max()) > 0.05  # it is quantised


def replaced_in(model: Any) -> list[Any]:
    return [pair for pair in fusable(model) if pair[1] is adapted_forward]


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", KINDS)
def test_gradients_equal_those_of_the_product_written_out(adapters):
    """In float64: dL/dA = scale · Bᵀ dL/dW and dL/dB = scale · dL/dW Aᵀ, for dL/dW of the matrix W + scale · B A."""
    model = with_adapters(model_of("whole registers", dtype=torch.float64), **KINDS[adapters]).base_model.model
    ids = (torch.arange(24).view(2, 12) * 7) % 100
    plain = gradients(written_out(model), ids)
    layers = [(name, m) for name, m in model.named_modules() if is_adapted(m)]
    assert len(layers) == 2 * (7 if adapters != "some, of several ranks" else 4)
    for now in ([], [(m, adapted_forward) for _, m in layers]):
        with fused(now):
            found = gradients(model, ids)
        assert len(found) == 2 * len(layers)  # nothing else has a gradient
        for name, m in layers:
            a, b, scale = m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"]
            grad_NK = plain[f"{name}.weight"]
            wanted = {"A": scale * b.T @ grad_NK, "B": scale * grad_NK @ a.T}
            for part, grad in wanted.items():
                error = found[f"{name}.lora_{part}.default.weight"] - grad
                assert float(error.norm() / grad.norm()) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_layers_change_neither_the_model_nor_its_gradients(dtype):
    model = with_adapters(model_of("whole registers", dtype=dtype), "critic", **KINDS["all"]).base_model.model
    ids = torch.arange(24).view(2, 12)
    assert len(replaced_in(model)) == 14
    exact = gradients(copy.deepcopy(model).double(), ids)
    plain = gradients(model, ids)
    with fused(replaced_in(model)):
        mine = gradients(model, ids)
    assert mine.keys() == plain.keys() == exact.keys()
    for name, grad in mine.items():
        own, true = plain[name].double(), exact[name]
        assert float((grad.double() - true).norm()) < 1e-5 * float(true.norm()) + 1.2 * float((own - true).norm()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_adapter_off_the_layers_are_the_base_bit_for_bit(dtype):
    base = model_of("whole registers", dtype=dtype)
    policy, plain = (policy_of(m) for m in (with_adapters(copy.deepcopy(base), **KINDS["all"]).base_model.model, base))
    for m in policy.model.modules():
        if is_adapted(m):
            m.enable_adapters(False)
    assert policy.given_logps(PROMPTS, RESPONSES) == plain.given_logps(PROMPTS, RESPONSES)
    mine, theirs = LocalEngine(policy), LocalEngine(plain)
    assert mine.compiled
    assert mine.score(PROMPTS, RESPONSES) == theirs.score(PROMPTS, RESPONSES)


def test_a_layer_that_does_something_else_is_left_alone(monkeypatch):
    """Where peft's own forward differs, even if by a fresh adapter it could not be seen."""
    model = with_adapters(model_of("whole registers"), **KINDS["all"]).base_model.model
    for m in model.modules():
        if is_adapted(m):
            torch.nn.init.zeros_(m.lora_B["default"].weight)
    assert len(replaced_in(model)) == 14
    assert not any(m.lora_B["default"].weight.any() for m, _ in replaced_in(model))
    right = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x: 2 * right(self, x) - self.base_layer(x))
    assert replaced_in(model) == []


@pytest.mark.filterwarnings("ignore")
def test_int8_is_the_product_with_its_matrix_whoever_is_beside_a_token(tmp_path):
    layer = base_of(quantised(tmp_path, "int8", torch.float32).model.model.layers[0].mlp.gate_proj)
    other = copy.deepcopy(layer)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    x[3, 7] = 60.0  # an outlier, as bitsandbytes has them
    assert torch.allclose(layer(x)[0], layer(x[:1])[0], rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    grad = torch.randn(5, 256)
    other(x).backward(grad)
    assert torch.allclose(x.grad, grad @ dense(layer, torch.float32), rtol=1e-5, atol=1e-5)
    del layer.forward
    own = layer(x[:3]).detach()
    assert 1e-4 < float((own - other(x[:3])).norm() / own.norm()) < 0.03  # rounded inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_layers_over_a_quantised_base_are_replaced(tmp_path, how):
    policy = quantised(tmp_path, how, torch.float32)
    kinds = {forward.__name__ for _, forward in policy.scorer.fusable}
    assert kinds == {"_norm_forward", "_mlp_forward", "_attention_forward", "adapted_forward", "_embedding_forward"}
    ids, action = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.bool)
    action[:, 0] = False
    found = []
    for now in (policy.scorer.fusable, []):
        policy.scorer.fusable = now
        policy.model.zero_grad()
        logp_BT = policy.logps(ids, action, 1.0).logp_BT
        logp_BT.sum().backward()
        found.append({n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(".lora_" in name for name in found[0])
    for name, grad in found[0].items():
        assert float((grad - found[1][name]).norm() / grad.norm()) < 1e-4, name


def test_a_frozen_embedding_is_looked_up_as_it_is():
    model = with_adapters(model_of("whole registers"), **KINDS["all"]).base_model.model
    with fused(fusable(model)):
        embedded = model.get_input_embeddings()(torch.arange(4)[None])
    assert not embedded.requires_grad
