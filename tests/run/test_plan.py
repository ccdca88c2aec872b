"""What a run needs of memory: by arithmetic, against what PyTorch really keeps."""

from __future__ import annotations

import json
import weakref

import psutil
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)

from sppo.cli.main import main
from sppo.kernels import recomputed
from sppo.models import tiny
from sppo.models.policy import Policy
from sppo.recipe.config import Config
from sppo.recipe.sections import AdapterSection
from sppo.run.footprint import EIGHT_BIT, Adapter, Model, activations
from sppo.run.loop import train
from sppo.run.outlines import Outlines
from sppo.run.plan import GIB
from sppo.run.planning import LEAST, plan, plan_of_worker, power_of_two
from sppo.run.remedies import remedies
from sppo.run.run import Run

from ..conftest import logps_of, small_config

CPU = torch.device("cpu")


def smollm(**changes):
    """The shape of SmolLM2-135M, without weights."""
    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape | changes))


class Kept:
    """A tensor in a graph, for as long as the graph holds it."""

    def __init__(self, x):
        self.x = x


def kept_by(policy, monkeypatch, tokens=64, rows=4):
    """Bytes that PyTorch keeps at the end of a training pass."""
    held = weakref.WeakSet()
    hooks = torch.autograd.graph.saved_tensors_hooks

    def counting(pack, unpack):
        def keep(x):
            packed = pack(x)
            if packed is not x:
                return packed
            kept = Kept(x)
            held.add(kept)
            return kept

        return hooks(keep, lambda kept: kept.x if isinstance(kept, Kept) else unpack(kept))

    ids_BL = torch.randint(3, 90, (rows, tokens))
    length_B = torch.full((rows,), tokens // 2)
    with monkeypatch.context() as patch, counting(lambda x: x, lambda x: x):
        patch.setattr(recomputed, "saved_tensors_hooks", counting)
        out = logps_of(policy, ids_BL, length_B, length_B, 1.0)
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    storages = {kept.x.untyped_storage().data_ptr(): kept.x.untyped_storage().nbytes() for kept in held}
    out.logp_BT.sum().backward()
    return sum(size for at, size in storages.items() if at not in weights)


ADAPTERS = {
    "all": {"rank": 4},
    "some": {"rank": 8, "targets": ("q_proj", "v_proj")},
    "dora": {"rank": 4, "dora": True},
}


def adapted(quantize="", hidden=128, layers=3, **settings):
    spec = f"tiny:hidden={hidden},layers={layers},heads=4"
    return Policy.load(
        spec, dtype="float32", device=CPU, seed=0, adapter=AdapterSection(**settings), quantize=quantize
    )[0]


@pytest.mark.parametrize("quantize", ["", "nf4"])
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_and_its_base_are_counted_as_they_are_made(settings, quantize):
    """Of the policy that is there, and of the outline that a recipe gives: the same numbers, and the real ones."""
    policy = adapted(quantize, **settings)
    held = 0
    for name, p in policy.model.named_parameters():
        held += 0 if "lora_" in name else p.nbytes
        if (state := getattr(p, "quant_state", None)) is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    outline, _ = tiny.build(hidden=128, layers=3, heads=4)
    section = AdapterSection(**settings)
    found = Model(outline, torch.float32, Adapter(section.rank, section.targets, section.dora), quantize)
    for model in (Model.of(policy), found):
        assert model.trained == sum(p.numel() for p in policy.trained.values())
        assert model.base == held


@pytest.mark.parametrize("hidden", [128, 96])
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_activations_beside_frozen_weights_are_what_pytorch_keeps(settings, hidden, monkeypatch):
    policy = adapted(hidden=hidden, layers=6, **settings)
    model = Model.of(policy)
    backward = (3 * 3 * hidden + 4 * hidden) * 4  # of one layer, which is no saved tensor
    found = kept_by(policy, monkeypatch) / (4 * 63)
    assert activations(model, CPU, False) - backward == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("hidden", [128, 96])  # with compiled layers, and with a head size that they do not take
def test_activations_are_what_pytorch_keeps(hidden, monkeypatch):
    model, tokenizer = tiny.build(hidden=hidden, layers=6, heads=4)
    policy = Policy(model, tokenizer)
    found = kept_by(policy, monkeypatch) / (4 * 63)
    assert activations(Model(model, torch.float32), CPU, False) == pytest.approx(found, rel=0.15)


def test_the_chosen_micro_batch_follows_the_memory_and_is_bounded():
    config = Config.load(None, {"policy.model": "models/x", "task.train": "chain:steps=3"})
    model = Model(smollm(), torch.bfloat16)
    chosen = {}
    for gib in (1, 4, 8, 64, 1000):
        limited = Config.load(None, {"task.train": "chain:steps=3", "run.memory": gib})
        found = plan(limited, model, None, CPU, 40)
        chosen[gib] = found.micro_tokens
        assert found.fits == (found.total < gib * GIB)
    assert list(chosen.values()) == sorted(chosen.values())
    assert chosen[1] == LEAST
    assert chosen[64] == chosen[1000] == 2048  # a larger one is no faster on a CPU
    given = Config.load(None, {"task.train": "chain:steps=3", "training.micro_tokens": 4096})
    assert plan(given, model, None, CPU, 40).micro_tokens == 4096
    assert config.training.micro_tokens is None


def test_a_small_model_s_micro_batch_is_what_it_always_was():
    model, _ = tiny.build(hidden=128, layers=3, heads=4)
    found = plan(Config.load(None, {"run.memory": 8}), Model(model, torch.float32), None, CPU, 20)
    assert found.micro_tokens == 16384


def test_what_the_plan_counts():
    model = Model(smollm(), torch.bfloat16)

    def parts(**changes):
        given = {"run.memory": 8, "training.micro_tokens": 1024} | {k.replace("__", "."): v for k, v in changes.items()}
        return plan(Config.load(None, given), model, None, CPU, 40)

    plain = parts()
    saved = plain.stays["optimiser"] - parts(training__optimizer="adamw-8bit").stays["optimiser"]
    assert saved == pytest.approx((8 - EIGHT_BIT) * model.parameters, rel=1e-3)  # norms stay in float32
    update = parts(training__checkpoint_activations=True).phases["update"]["one micro-batch"]
    assert update < plain.phases["update"]["one micro-batch"] / 5
    assert parts(objective__kl=0.1, objective__kl_form="k3").stays["reference"] == 2 * model.parameters
    vllm = parts(rollout__engine="vllm:memory=0.2")
    assert vllm.stays["vLLM's keys and values"] == 2 * GIB
    assert vllm.stays["vLLM's weights"] == 2 * model.parameters
    critic = plan(Config.load(None, {"run.memory": 8}), model, model, CPU, 40)
    assert critic.stays["critic and its optimiser"] == 14 * model.parameters
    assert plain.total < 4 * GIB
    assert plain.phases["update"]["gradients in float32"] == 4 * model.parameters  # of several micro-batches
    assert critic.phases["critic"]["gradients of the critic"] == 6 * model.parameters
    one = parts(training__micro_tokens=10**6)
    assert one.phases["update"]["gradients in float32"] == 0
    assert one.phases["optimiser step"]["gradients in float32"] == 4 * model.parameters
    assert (
        parts(training__micro_tokens=10**6, search__below=0.1).phases["update"]["gradients in float32"] > 0
    )  # lessons
    whole = plan(Config.load(None, {"run.memory": 8}), Model(smollm(), torch.float32), None, CPU, 40)
    assert whole.phases["update"]["gradients in float32"] == 0


def test_powers_of_two():
    assert [power_of_two(n) for n in (-5, 100, 257, 1023, 1024, 10**9)] == [256, 256, 256, 512, 1024, 16384]


def test_a_run_keeps_what_was_chosen_and_a_resumed_one_uses_it(tmp_path):
    notes = []

    class Notes:
        def note(self, text):
            notes.append(text)

        def stage(self, *args): ...
        def step(self, *args): ...
        def within(self, *args): ...
        def evaluation(self, *args): ...

    config = small_config(run__out=str(tmp_path / "run"), training__steps=1, run__memory=0.001)
    job = Run.new(config, Notes())
    memory = train(job)["memory"]
    job.close()
    planned = job.components.plan
    assert memory == json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    assert memory["planned_bytes"] == planned.parts()["total"] == sum(planned.parts().values()) / 2
    assert memory["phase"] in planned.phases
    assert psutil.Process().memory_info().rss * 0.9 < memory["peak_bytes"] < psutil.Process().memory_info().rss + GIB
    assert Config.load(tmp_path / "run" / "recipe.toml").training.micro_tokens == LEAST
    assert any(text.startswith("warning: this run needs about") for text in notes)
    again = Run.resume(tmp_path / "run", Notes(), steps=2)
    assert again.components.config.training.micro_tokens == LEAST
    again.close()


def test_doctor_plans_from_a_config_alone_without_data_and_never_runs_a_model_s_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    smollm(num_hidden_layers=2).config.save_pretrained(model)
    assert main(["doctor", "--model", str(model), "--data", "none.jsonl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["recipe"]
    assert found["memory_bytes"]["total"] == sum(v for k, v in found["memory_bytes"].items() if k != "total")
    assert "none.jsonl" in found["problems"]
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "evil.Strange", "AutoModelForCausalLM": "evil.Strange"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass Strange: ...\n")
    assert main(["doctor", "--model", str(model), "--data", "none.jsonl"]) == 2
    assert not (tmp_path / "RAN").exists()


def outlined(gpu=None, prompt=40, **changes):
    """The plan of a recipe for a Llama of SmolLM2's shape, by its config alone."""
    given = {"run.memory": 8, "training.micro_tokens": 1024} | {k.replace("__", "."): v for k, v in changes.items()}
    return Outlines(gpu).plan(Config.load(None, given), prompt)


@pytest.fixture
def shape(tmp_path):
    """A folder with a config alone."""
    smollm().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_an_adapter_takes_the_optimiser_the_gradients_and_the_reference_away(shape):
    kl = {"objective__kl": 0.1, "objective__kl_form": "k3", "policy__dtype": "bfloat16"}
    full, lora = outlined(policy__model=shape, **kl), outlined(policy__model=shape, adapter__rank=16, **kl)
    trained = 16 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))  # q and o, k and v, the unit's three
    assert full.stays["reference"] == full.stays["weights"]
    assert "reference" not in lora.stays
    assert lora.stays["adapter"] == 2 * trained
    assert lora.stays["optimiser"] == 12 * trained
    assert lora.phases["update"]["gradients"] <= 2 * trained
    packed = outlined(policy__model=shape, adapter__rank=16, policy__quantize="nf4", **kl)
    assert packed.stays["weights"] < 0.55 * lora.stays["weights"]


def test_a_critic_on_the_policys_base_is_an_adapter(shape):
    own = outlined(policy__model=shape, adapter__rank=16, critic__model=shape)
    shared = outlined(policy__model=shape, adapter__rank=16, critic__model="policy")
    assert shared.stays["critic and its optimiser"] == 3 * shared.stays["adapter"]  # float32: itself and two moments
    assert own.stays["critic and its optimiser"] > 20 * shared.stays["critic and its optimiser"]


def test_offloaded_masters_and_moments_are_the_hosts(shape):
    here = outlined(24 * GIB, policy__model=shape)
    there = outlined(24 * GIB, policy__model=shape, training__offload=True)
    trained = Model(smollm(), torch.float32).parameters + 112_576  # the critic's beside the policy's
    assert there.host["masters and moments"] == pytest.approx(12 * trained, rel=0.001)
    assert there.host["sums of gradients"] == pytest.approx(4 * trained, rel=0.001)
    assert there.phases["update"]["gradients"] == 2 * 49152 * 576  # the largest one, until it has gone
    assert there.total < here.total - here.stays["optimiser"]
    assert "of the host's" in there.stated()


def test_what_reads_more_than_text_is_frozen_and_in_main_memory():
    text = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    seen = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    with torch.device("meta"):
        made = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=seen, mm_tokens_per_image=4))
    model = Model(made, torch.bfloat16)
    decoder = sum(p.numel() for p in made.get_decoder().parameters())
    assert model.trained == model.parameters == decoder
    assert model.base == 2 * decoder
    assert model.towers == 4 * (sum(p.numel() for p in made.parameters()) - decoder) > 0
    config = Config.load(None, {"training.micro_tokens": 1024})
    here, there = (
        plan(config, model, None, torch.device(kind), 40, gpu) for kind, gpu in (("cpu", None), ("cuda", GIB))
    )
    assert here.stays["weights"] == model.base + model.towers
    assert (there.stays["weights"], there.host) == (model.base, {"towers": model.towers})
    assert len(Model(made, torch.bfloat16, Adapter(4, "all-linear")).adapted) == 2 * 7


def test_a_matrix_that_lies_the_other_way_round_is_adapted_too():
    with torch.device("meta"):
        model = Model(
            GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2)), torch.float32, Adapter(4, "all-linear")
        )
    assert model.trained == 2 * 4 * ((64 + 192) + (64 + 64) + 2 * (64 + 256))


def test_a_reward_model_is_held_too(shape, tmp_path):
    plain = outlined(policy__model=shape)
    judged = outlined(policy__model=shape, reward__use=f"answer + 0.2 * model:{shape}")
    assert judged.stays["the reward model"] == 4 * (Model(smollm(), torch.float32).parameters)
    assert judged.total == plain.total + judged.stays["the reward model"]


def test_changes_that_make_a_recipe_fit_do(shape):
    outlines = Outlines(24 * GIB)

    def planned(config):
        return outlines.plan(config, 40)

    for memory in (0.9, 1.4, 2.5, 4):
        given = {"policy.model": shape, "run.memory": memory, "rollout.batch": 64}
        before = planned(Config.load(None, given))
        assert not before.fits
        found, after = remedies(Config.load(None, given), planned)
        assert 1 <= len(found) <= 3
        alternatives = [remedy for remedy in found if remedy.fits] if found[0].fits else found[:1]
        for remedy in alternatives:
            changed = planned(Config.load(None, given | dict(remedy.change.keys)))
            assert before.total - changed.total == remedy.saved > 0
            assert changed.fits == remedy.fits
        assert after.fits == (memory > 1)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
    ],
)
def test_shapes_that_recipes_name_have_the_published_number_of_weights(name, published, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = Config.load(None, {"policy.model": name})
    assert Outlines(24 * GIB).policy(config)[0].parameters == published


def sharded(gather, model, critic=None, gpu=80 * GIB, **keys):
    """One of four ranks that hold the weights between them, on a GPU."""
    cluster = {"cluster.learners": 4, "cluster.shards": 4, "cluster.gather": gather}
    config = Config.load(None, {"task.train": "chain:steps=3", "training.micro_tokens": 4096} | cluster | keys)
    return plan(config, model, critic, torch.device("cuda"), 40, gpu)


@pytest.mark.parametrize("gather", ["update", "layer"])
def test_a_rank_holds_its_part_of_the_weights(gather):
    """By hand: SmolLM2-135M has 30 layers of 3.54M parameters and 28.3M in its embeddings, 134.5M in all."""
    layer, whole = 2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576, 134_515_008
    rest = whole - 30 * layer
    found = sharded(gather, Model(smollm(), torch.bfloat16), Model(smollm(), torch.bfloat16))
    assert found.stays["masters and moments"] == 12 * whole // 4
    assert found.stays["critic and its optimiser"] == 12 * whole // 4
    update = found.phases["update"]
    assert update["weights put together"] == 2 * (whole if gather == "update" else 2 * layer + rest)
    assert update["gradients before they are added up"] == (4 * whole if gather == "update" else rest * 6)
    assert update["gradients of the shard"] == found.phases["optimiser step"]["gradients of the shard"] == whole
    assert not {"sampling", "judging"} & {*found.phases}
    assert "by each learner rank" in found.stated()


def test_what_is_whole_on_every_rank():
    """An adapter, and a quantised base below it; offloaded state is divided, and the host's."""
    model = Model(smollm(), torch.bfloat16, Adapter(16, ("q_proj",)))
    found = sharded("update", model)
    assert found.stays["weights"] == model.base // 4
    assert (found.stays["adapter"], found.stays["optimiser"]) == (model.beside, model.optimiser("adamw"))
    packed = Model(smollm(), torch.bfloat16, Adapter(16, ("q_proj",)), "nf4")
    assert sharded("update", packed).stays["weights"] == packed.base
    away = sharded("update", Model(smollm(), torch.bfloat16), **{"training.offload": True})
    assert away.stays["masters and moments"] == away.phases["update"]["gradients of the shard"] == 0
    assert away.host["masters and moments"] == 12 * 134_515_008 // 4
    beside = sharded("update", model, **{"training.offload": True})
    assert beside.host["masters and moments"] == 12 * model.trained


def test_processes_on_one_machine_share_its_memory():
    alone, keys = Config.load(None, {"task.train": "chain:steps=3"}), {"cluster.learners": 2, "cluster.rollouts": 3}
    model = Model(smollm(), torch.float32)
    mine = psutil.Process().memory_info().rss
    one, five = (
        plan(c, model, None, CPU, 40).capacity
        for c in (alone, Config.load(None, {"task.train": "chain:steps=3"} | keys))
    )
    assert (one - mine) / (five - mine) == pytest.approx(5, rel=0.1)


def test_a_rollout_worker_holds_weights_and_an_engine_alone():
    config = Config.load(None, {"task.train": "chain:steps=3", "cluster.rollouts": 2, "rollout.batch": 32})
    model = Model(smollm(), torch.bfloat16)
    found = plan_of_worker(config, model, torch.device("cuda"), 40, 8 * GIB)
    assert {*found.stays} == {"the process", "weights"}
    limit = config.task.max_prompt_tokens + config.rollout.max_tokens
    assert found.phases["sampling"]["keys and values"] == 32 * limit * 2 * 30 * 192 * 2
