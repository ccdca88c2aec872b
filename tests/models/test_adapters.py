"""Adapters in a policy, and a second one that is its critic: what they compute, what they leave alone, what is saved.

peft and transformers are the real ones throughout; models are tiny."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch.func import functional_call
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sppo.errors import ModelError, RecipeError
from sppo.kernels import low_rank
from sppo.learning.optimizer import MasterAdamW
from sppo.models.adapter_critic import AdapterCritic, open_critic
from sppo.models.adapters import CRITIC, Adapters
from sppo.models.assembled import given_adapters
from sppo.models.policy import Policy
from sppo.recipe.sections import AdapterSection

from ..conftest import SMALL, small_config, small_policy

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # transformers, to peft
CPU = torch.device("cpu")
TOLERANCE = {"nf4": 1e-4, "int8": 0.05}  # elsewhere int8 layers also round what they are given
"""Of log-probabilities that are computed packed and by themselves: in 8 bits a state rounds with the largest beside it."""
ONE = "tiny:hidden=32,layers=1,heads=2"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model to stand on."""
    folder = tmp_path_factory.mktemp("models") / "base"
    small_policy().save(folder)
    return folder


def adapted(base, *, stirred: bool = True, dtype: str = "float32", quantize: str = "", **section) -> Policy:
    """A policy with an adapter, which does something (`stirred`) or nothing yet."""
    policy, _ = Policy.load(
        str(base), dtype=dtype, device=CPU, seed=3, adapter=AdapterSection(**{"rank": 4, **section}), quantize=quantize
    )
    return stir(policy) if stirred else policy


def stir(policy: Policy, seed: int = 0, name: str = "default") -> Policy:
    """Give an adapter's second matrices numbers: at first they are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in sorted(policy.adapters.named(name).items()):
            if "lora_B" in n:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return policy


def beside(policy: Policy) -> AdapterCritic:
    """A critic on a policy's weights, all of which does something."""
    critic = AdapterCritic.beside(policy, seed=7)
    stir(policy, seed=1, name=CRITIC)
    with torch.no_grad():
        critic.head.weight.copy_(0.1 * torch.randn(1, 32, generator=torch.Generator().manual_seed(5)))
    return critic


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and actions, [3, 12], of three lengths."""
    ids_BL = torch.randint(1, 33, (3, 12), generator=torch.Generator().manual_seed(2))
    action_BL = torch.zeros(3, 12, dtype=torch.bool)
    for b, (start, end) in enumerate([(3, 12), (5, 8), (2, 10)]):
        action_BL[b, start:end] = True
    return ids_BL, action_BL


def logps(policy: Policy) -> torch.Tensor:
    return policy.logps(*rows(), 0.7).logp_BT


def of_logits(logits_BLV: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the actions from whole logits, [N]."""
    ids_BL, action_BL = rows()
    logp_BLV = (logits_BLV[:, :-1].double() / 0.7).log_softmax(-1)
    return logp_BLV.gather(-1, ids_BL[:, 1:, None])[..., 0][action_BL[:, 1:]]


def packed(logp_BT: torch.Tensor) -> torch.Tensor:
    """The actions' log-probabilities in the order of `of_logits`, [N]."""
    count_B = rows()[1].sum(1)
    return torch.cat([row[:n] for row, n in zip(logp_BT, count_B.tolist(), strict=True)])


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_gradients_equal_those_of_the_product_written_out(base, kind):
    """In float64: W + s·B·A in place of W, s = alpha / rank or alpha / √rank; DoRA's rows at their trained lengths,
    the norm they are divided by taken as a constant (arXiv 2402.09353, section 4.3)."""
    plain = AutoModelForCausalLM.from_pretrained(base).double().eval()
    policy = Policy(copy.deepcopy(plain), small_policy().tokenizer)
    section = AdapterSection(rank=4, alpha=8, rslora=kind == "rslora", dora=kind == "dora")
    policy = Policy(policy.model, policy.tokenizer, adapters=Adapters.onto(policy.model, section, seed=1))
    stir(policy)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in policy.trained.items()}
    scale = 8 / 4**0.5 if kind == "rslora" else 8 / 4
    changed = {}
    for name, weight in plain.named_parameters():
        inner = name.removesuffix(".weight")
        if f"{inner}.lora_A.default.weight" not in parameters:
            continue
        whole = weight.detach() + scale * (
            parameters[f"{inner}.lora_B.default.weight"] @ parameters[f"{inner}.lora_A.default.weight"]
        )
        if kind == "dora":
            length = parameters[f"{inner}.lora_magnitude_vector.default.weight"]
            whole = (length / whole.detach().norm(dim=1))[:, None] * whole
        changed[name] = whole
    assert len(changed) == 14  # seven linear layers in each of two
    ids_BL, _ = rows()
    expected = of_logits(functional_call(plain, changed, kwargs={"input_ids": ids_BL}).logits)
    found = packed(logps(policy))
    assert torch.allclose(found, expected, atol=1e-10)
    weight_N = torch.randn(len(found), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (expected * weight_N).sum().backward()
    (found * weight_N).sum().backward()
    for name, p in policy.trained.items():
        assert parameters[name].grad.abs().max() > 0, name
        assert torch.allclose(p.grad, parameters[name].grad, rtol=0, atol=1e-8), name
    assert not [n for n, p in policy.model.named_parameters() if p.grad is not None and n not in policy.trained]


@pytest.mark.parametrize("quantize", ["", "nf4", "int8"])
def test_with_its_adapter_off_a_policy_is_its_base_bit_for_bit(base, quantize):
    policy = adapted(base, quantize=quantize)
    bare = adapted(base, stirred=False, quantize=quantize)
    assert not torch.equal(logps(policy), logps(bare))
    off = copy.copy(policy)
    off.scorer = policy.scorer.under(None)
    if not quantize:
        bare, _ = Policy.load(str(base), dtype="float32", device=CPU, seed=0)
    assert torch.equal(logps(off), logps(bare))
    assert not torch.equal(logps(policy), logps(bare))  # and it is on again


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dora_measures_the_rows_of_a_quantised_matrix_by_their_scales(base, quantize):
    policy = adapted(base, quantize=quantize, dora=True)
    layers = [m for m in policy.model.modules() if low_rank.is_adapted(m)]
    assert layers
    for layer in layers:
        a_RK, b_NR, scale = (getattr(layer, name)["default"] for name in ("lora_A", "lora_B", "scaling"))
        sum_NK = low_rank.dense(layer.base_layer, torch.float32) + scale * b_NR.weight @ a_RK.weight
        length_N = layer.lora_magnitude_vector["default"].weight
        x = torch.randn(3, sum_NK.size(1), generator=torch.Generator().manual_seed(0))
        expected = x @ (length_N[:, None] * sum_NK / sum_NK.norm(dim=1, keepdim=True)).t()
        assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_depends_on_the_seed_alone(base):
    torch.manual_seed(11)
    first = adapted(base, stirred=False)
    torch.manual_seed(12)
    state = torch.get_rng_state()
    assert adapted(base, stirred=False).sha256() == first.sha256()
    assert torch.equal(torch.get_rng_state(), state)
    other, _ = Policy.load(str(base), dtype="float32", device=CPU, seed=4, adapter=AdapterSection(rank=4))
    assert other.sha256() != first.sha256()


# -- two of them in one model ------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


def learns(critic: AdapterCritic, optimiser: MasterAdamW) -> None:
    optimiser.backward((critic.prompt_logits(PROMPTS) - torch.tensor([1.0, -1.0])).square().sum())
    optimiser.step(1e-2, 1.0)


def optimiser_of(parameters) -> MasterAdamW:
    return MasterAdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)


def test_a_critic_that_learns_moves_no_policy_logit_and_a_policy_that_learns_no_value(base):
    policy = adapted(base)
    critic = beside(policy)
    of_policy, of_critic = optimiser_of(policy.trained.values()), optimiser_of(critic.parameters())
    assert len(of_critic.parameters) == 2 * 14 + 2
    assert not {id(p) for p in of_policy.parameters} & {id(p) for p in of_critic.parameters}

    before, name, sha = logps(policy).detach(), policy.fingerprint(), policy.sha256()
    of_policy.backward(logps(policy).sum())
    gradients = [p.grad.clone() for p in policy.trained.values()]
    for _ in range(2):
        value = critic.prompt_logits(PROMPTS).detach()
        learns(critic, of_critic)
        assert not torch.equal(critic.prompt_logits(PROMPTS), value)
    assert all(torch.equal(p.grad, g) for p, g in zip(policy.trained.values(), gradients, strict=True))
    assert torch.equal(logps(policy), before)
    assert (policy.fingerprint(), policy.sha256()) == (name, sha)

    value, frozen = critic.prompt_logits(PROMPTS).detach(), policy.frozen_fingerprint()
    of_policy.step(1e-2, 1.0)
    assert not torch.equal(logps(policy), before)
    assert torch.equal(critic.prompt_logits(PROMPTS), value)
    assert all(p.grad is None for p in critic.parameters())
    assert policy.frozen_fingerprint() == frozen


@pytest.mark.parametrize("kind", [{}, {"dora": True}])
def test_recomputed_activations_give_the_same_gradients_under_either_adapter(base, kind):
    """The backward pass comes when another adapter is at rest, or in the other's turn."""
    found = []
    for checkpointed in (False, True):
        policy = adapted(base, **kind)
        critic = beside(policy)
        if checkpointed:
            policy.checkpoint_activations()
            critic.checkpoint_activations()
        seen: list[int] = []
        policy.model.model.layers[0].self_attn.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        readout, logp_BT = critic.prompt_logits(PROMPTS), logps(policy)
        passes = len(seen)
        readout.sum().backward()
        logp_BT.sum().backward()
        assert len(seen) - passes == 2 * checkpointed
        parameters = [*policy.trained.values(), *critic.parameters()]
        assert all(p.grad is not None for p in parameters)
        found.append([logp_BT, readout, *(p.grad for p in parameters)])
    assert all(map(torch.equal, *found))


def test_the_reference_is_the_base_of_a_fresh_adapter_and_a_frozen_copy_of_another(base):
    policy = adapted(base, stirred=False)
    start = logps(policy).detach()
    reference = policy.as_reference()
    stir(policy)
    assert torch.equal(logps(reference), start)
    assert "reference" not in policy.adapters.peft.peft_config  # the adapter off: no copy

    policy = adapted(base)  # after a bootstrap
    start, trained = logps(policy).detach(), list(policy.trained)
    reference = policy.as_reference()
    stir(policy, seed=5)
    moved = logps(policy).detach()
    assert torch.equal(logps(reference), start)
    assert not torch.equal(moved, start)
    assert not logps(reference).requires_grad
    logps(policy).sum().backward()
    assert list(policy.trained) == trained
    assert all(p.grad is not None for p in policy.trained.values())


def test_a_copy_is_a_policy_of_its_own(base):
    policy = adapted(base)
    critic = AdapterCritic.beside(policy)
    start = logps(policy).detach()
    value = critic.prompt_logits(PROMPTS).detach()
    frozen = policy.copied()
    stir(policy, seed=5)
    assert torch.equal(logps(frozen), start)
    assert not logps(frozen).requires_grad
    moved = logps(policy).detach()
    stir(frozen, seed=6)
    assert torch.equal(logps(policy), moved)
    assert torch.equal(critic.prompt_logits(PROMPTS), value)
    assert frozen.adapters.model is frozen.model
    assert frozen.model is not policy.model
    assert not any(p is q for p in frozen.model.parameters() for q in policy.model.parameters())


def test_a_fingerprint_covers_the_adapter_and_what_it_stands_on(base):
    policy = adapted(base)
    seen = {policy.fingerprint()}
    assert policy.fingerprint() in seen
    with torch.no_grad():
        next(iter(policy.trained.values()))[0, 0] += 1e-3
        seen.add(policy.fingerprint())
        policy.model.model.norm.weight[3] += 1e-3
        seen.add(policy.fingerprint())
    stir(adapted(base), seed=1)
    assert len(seen) == 3
    AdapterCritic.beside(policy)
    assert policy.fingerprint() in seen  # a critic is no part of what is sampled from


# -- saved and loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}, {"targets": ("q_proj", "v_proj")}])
def test_what_is_saved_is_what_peft_loads_and_what_comes_back(base, tmp_path, kind):
    policy = adapted(base, **kind)
    AdapterCritic.beside(policy)  # which is not of the policy's folder
    policy.save(tmp_path / "policy")
    with safe_open(tmp_path / "policy" / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == len(policy.trained)
    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "policy").eval()
    with torch.no_grad():
        elsewhere = of_logits(theirs(input_ids=rows()[0]).logits)
    assert torch.allclose(packed(logps(policy)).double(), elsewhere, atol=1e-5)
    again, _ = Policy.load(str(tmp_path / "policy"), dtype="auto", device=CPU, seed=0)
    assert torch.equal(logps(again), logps(policy))
    assert again.fingerprint() == policy.fingerprint()
    assert list(again.trained) == list(policy.trained)
    assert all(p.requires_grad for p in again.trained.values())


def test_a_critic_is_saved_as_adapter_and_head_and_reads_the_same_beside_its_policy_and_alone(base, tmp_path):
    policy = adapted(base)
    critic = beside(policy)
    value = critic.prompt_logits(PROMPTS).detach()
    policy.save(tmp_path / "policy")
    critic.save(tmp_path / "critic")
    given = {"dtype": "auto", "device": CPU, "seed": 0}
    alone, _ = open_critic(str(tmp_path / "critic"), **given)
    assert torch.equal(alone.prompt_logits(PROMPTS), value)
    again, _ = Policy.load(str(tmp_path / "policy"), **given)
    on_it, stated = open_critic(str(tmp_path / "critic"), **given, policy=again)
    assert torch.equal(on_it.prompt_logits(PROMPTS), value)
    assert on_it.backbone is again.model  # the base is held once
    assert torch.equal(logps(again), logps(policy))
    assert "reads the prompt only" in stated


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_an_adapter_of_a_quantised_base_loads_elsewhere(base, tmp_path, quantize):
    policy = adapted(base, quantize=quantize)
    policy.save(tmp_path / "policy")
    again, _ = Policy.load(str(tmp_path / "policy"), dtype="auto", device=CPU, seed=0)
    assert torch.equal(logps(again), logps(policy))
    assert again.fingerprint() == policy.fingerprint()
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if quantize == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})
    theirs = PeftModel.from_pretrained(plain, tmp_path / "policy").eval()
    with torch.no_grad():
        elsewhere = of_logits(theirs(input_ids=rows()[0]).logits)
    assert torch.allclose(packed(logps(policy)).double(), elsewhere, atol=TOLERANCE[quantize])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_one_sentence(base, tmp_path):
    adapted(base).save(tmp_path / "adapter")
    moved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for what, other in (("other weights", SMALL), ("not an adapter of this base", "tiny:hidden=64,layers=2,heads=2")):
        model, _ = Policy.load(other, dtype="float32", device=CPU, seed=9)
        model.save(tmp_path / what)
        moved["base_model_name_or_path"] = str(tmp_path / what)
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(moved))
        with pytest.raises(ModelError, match=what) as error:
            Policy.load(str(tmp_path / "adapter"), dtype="auto", device=CPU, seed=0)
        assert "\n" not in str(error.value)


def test_a_base_that_is_gone_is_one_sentence(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    adapted(tmp_path / "base").save(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match="there is no folder") as error:
        Policy.load(str(tmp_path / "adapter"), dtype="auto", device=CPU, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "quantize", "words"),
    [
        ({"targets": ("q_prj",)}, "", "'q_prj'.*q_proj"),
        ({"targets": "v_poj"}, "", "'v_poj'.*v_proj"),
        (None, "nf4", r"add \[adapter\]"),
    ],
)
def test_what_no_model_can_do_is_one_sentence(base, section, quantize, words):
    adapter = None if section is None else AdapterSection(**section)
    with pytest.raises(RecipeError, match=words) as error:
        Policy.load(str(base), dtype="float32", device=CPU, seed=0, adapter=adapter, quantize=quantize)
    assert "\n" not in str(error.value)


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"adapter\.rank: input should be greater than or equal to 1 \(got 0\)"):
        small_config(adapter__rank=0)


def test_an_adapter_goes_into_no_adapter(base, tmp_path):
    adapted(base).save(tmp_path / "adapter")
    with pytest.raises(RecipeError, match=r"holds an adapter, which is trained on: leave \[adapter\] out"):
        adapted(tmp_path / "adapter")
    model, tokenizer = small_policy().model, small_policy().tokenizer
    given = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    inner, adapters = given_adapters(given, None, 0)
    assert Policy(inner, tokenizer, adapters=adapters).adapters.name == "default"
