"""The Python API, and the README's worked example."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sppo import SPPOConfig, SPPOTrainer
from sppo.errors import DataError, ModelError, RecipeError, UserError
from sppo.models import tiny
from sppo.recipe.config import Config

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's use of transformers
ROOT = Path(__file__).parents[1]
SMALL = "tiny:hidden=32,layers=1,heads=2"


def rows(n=40):
    return [{"question": f"{i}+{j}?", "answer": str(i + j), "level": i} for i in range(n // 10) for j in range(10)]


def length_reward(prompts, completions, level, **kwargs):
    assert len(level) == len(prompts)
    return [1.0 if len(c[-1]["content"]) > 3 else 0.0 for c in completions]


def settings(tmp_path, **kwargs):
    return SPPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, prompts_per_step=8, max_completion_length=6, eval_steps=0,
        disable_progress=True, recipe={"evaluation.n": 8, "critic.model": SMALL}, **kwargs,
    )  # fmt: skip


def test_rows_and_a_callable(tmp_path):
    args = settings(tmp_path, report_to="tensorboard")
    trainer = SPPOTrainer(model=SMALL, reward_funcs=length_reward, train_dataset=rows(), args=args)
    summary = trainer.train()
    assert summary["steps"] == 2
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert SPPOConfig(report_to="none").overrides()["run.trackers"] == []
    assert 0 <= trainer.predicted_chance(["1+1?"])[0] <= 1
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_a_dataset_a_loaded_model_and_several_rewards(tmp_path):
    from datasets import Dataset

    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    trainer = SPPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=["answer", length_reward], args=settings(tmp_path, beta=0.01, epsilon=0.1),
        train_dataset=Dataset.from_list(rows()), eval_dataset=Dataset.from_list(rows(10)), critic=tiny.build(hidden=32, layers=1, heads=2, head=False),
    )  # fmt: skip
    assert trainer.config.objective.clip == (0.1, 0.1)
    assert trainer.train()["stopped"] == "finished"
    assert trainer.policy is model


def test_a_loaded_tokenizer_without_pad_and_a_causal_critic(tmp_path):
    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    tokenizer.pad_token = None
    trainer = SPPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=length_reward, train_dataset=rows(), args=settings(tmp_path),
        critic=tiny.build(hidden=32, layers=1, heads=2),
    )  # fmt: skip
    assert trainer.train()["steps"] == 2
    with pytest.raises(DataError, match="DatasetDict"):
        SPPOTrainer(model=SMALL, reward_funcs="answer", train_dataset={"train": rows()})


def test_a_run_given_in_python_resumes_in_python_only(tmp_path, capsys):
    import torch

    from sppo.cli.main import main

    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    given = {
        "model": model.to(torch.bfloat16),
        "processing_class": tokenizer,
        "reward_funcs": length_reward,
        "train_dataset": rows(),
    }
    SPPOTrainer(**given, args=settings(tmp_path)).train()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "given in Python" in capsys.readouterr().err
    args = settings(tmp_path, resume_from_checkpoint=True)
    args.max_steps = 4
    again = SPPOTrainer(**given, args=args)
    assert again.train()["steps"] == 4
    assert again.policy.dtype == torch.bfloat16


def test_clear_errors(tmp_path):
    with pytest.raises(ModelError, match="processing_class"):
        SPPOTrainer(model=tiny.build(hidden=32, heads=2)[0], reward_funcs="answer", train_dataset=rows())
    with pytest.raises(DataError, match="too few"):
        SPPOTrainer(model=SMALL, reward_funcs="answer", train_dataset=rows()[:1])
    with pytest.raises(DataError, match="train_dataset:1: the row has no prompt"):
        SPPOTrainer(model=SMALL, reward_funcs="answer", train_dataset=[{"answer": "1"}])


def test_the_readmes_example_runs(tmp_path):
    reward, example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(reward)
    (tmp_path / "example.py").write_text(example)
    ran = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def test_weights_of_rewards(tmp_path):
    def one(completions):
        return [1.0] * len(completions)

    def none(completions):
        return [0.0] * len(completions)

    def scores(rewards, **kwargs):
        args = settings(tmp_path, **kwargs)
        args.recipe = dict(args.recipe) | {"rollout.truncated": "keep", "monitors.action": "off"}
        args.output_dir = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        trainer = SPPOTrainer(model=SMALL, reward_funcs=rewards, train_dataset=rows(), args=args)
        trainer.train()
        lines = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["reward/mean"]

    assert scores([one, none], reward_weights=[3, 1]) == pytest.approx(0.75)
    assert scores([none, one], reward_weights=[1.0, 0.0]) == 0.0
    for weights, why in (
        ([1], "1 weights for 2 rewards"),
        ([1, -1], "0 or more"),
        ([1, float("nan")], "0 or more"),
        ([0, 0], "above 0"),
        (["a", 1], "0 or more"),
    ):
        with pytest.raises(UserError, match=why):
            SPPOTrainer(SMALL, [one, none], rows(), args=settings(tmp_path, reward_weights=weights))


def test_predicted_chance_of_questions_conversations_and_rows(tmp_path):
    args = settings(tmp_path)
    args.recipe = dict(args.recipe) | {"task.instruction": "Answer with a number."}
    trainer = SPPOTrainer(model=SMALL, reward_funcs=length_reward, train_dataset=rows(), args=args)
    trainer.train()
    conversation = [{"role": "user", "content": "1+1?"}]
    asked = trainer.predicted_chance(
        [
            "1+1?",
            conversation,
            {"question": "1+1?"},
            {"prompt": "1+1?"},
            [{"role": "system", "content": "x"}, *conversation],
        ]
    )
    assert asked[0] == pytest.approx(asked[1]) == pytest.approx(asked[2])
    assert asked[4] != asked[0]
    critic = trainer.run.components.critic
    from sppo.types import Task

    trained_on = Task("t", [{"role": "user", "content": "1+1?\nAnswer with a number."}])
    assert asked[0] == pytest.approx(float(critic.logits([trained_on]).sigmoid()[0]))
    for wrong, why in (
        ("1+1?", "takes a list"),
        ([3], "prompts:1"),
        (["x" * 100_000], "the critic reads"),
    ):
        with pytest.raises(DataError, match=why):
            trainer.predicted_chance(wrong)


def test_settings_by_trls_names():
    given = SPPOConfig(
        bf16=True, use_vllm=True, vllm_gpu_memory_utilization=0.5, weight_decay=0.1, adam_beta2=0.99, optim="adamw_bnb_8bit", save_total_limit=3,
        mask_truncated_completions=False,
        importance_sampling_level="sequence", delta=4.0, logging_steps=1, fp16=False, lr_scheduler_type="constant_with_warmup",
        num_generations=4, scale_rewards=False, recipe={"training.weight_decay": 0.2}, tf32=None, sapo_temperature_neg=2.0,
    ).overrides()  # fmt: skip
    wanted = {
        "policy.dtype": "bfloat16", "rollout.engine": "vllm:memory=0.5", "training.weight_decay": 0.2, "training.betas": [0.9, 0.99],
        "training.optimizer": "adamw-8bit", "run.keep": 3, "rollout.truncated": "keep", "objective.ratio": "geometric", "objective.dual_clip": 4.0,
        "training.schedule": "constant", "rollout.samples": 4, "objective.scale": "none",
        "objective.gate_temperature": [1.0, 2.0],
    }  # fmt: skip
    assert {key: given[key] for key in wanted} == wanted
    Config.load(None, given)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beyond", ["truncate", "mask"])
def test_trls_correction_of_the_engine(level, beyond):
    """With ratios of tokens a response's weight is the joint one, as TRL's always is; with others it is not, and that is said."""
    named = {"vllm_importance_sampling_mode": f"{level}_{beyond}", "vllm_importance_sampling_clip_max": 3.0}
    given = SPPOConfig(importance_sampling_level="token", **named).overrides()
    o = Config.load(None, given).objective
    assert (o.ratio, o.engine_correction) == ("token", 3.0)
    assert (o.engine_correction_level, o.engine_correction_beyond) == (level, beyond)
    for ratio in ({}, {"importance_sampling_level": "sequence"}):
        if level == "token":
            SPPOConfig(**ratio, **named)
        else:
            with pytest.raises(RecipeError, match="of the kind of its ratio"):
                SPPOConfig(**ratio, **named)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
            "prompts_per_step.*8 × 4 = 32 responses",
        ),
        ({"loss_type": "dapo"}, "objective.algorithm"),
        ({"logging_steps": 10}, "metrics.jsonl holds every step"),
        ({"num_train_epochs": 3}, "max_steps counts steps"),
        ({"fp16": True}, "bf16=True"),
        ({"model_init_kwargs": {"a": 1}}, "processing_class"),
        ({"ddp_timeout": 3}, "one process on one device"),
        ({"lerning_rate": 1e-5}, "did you mean 'learning_rate'"),
        ({"max_tokens": 5}, r"recipe={'rollout.max_tokens': 5}"),
        ({"num_generation": 5}, "did you mean 'num_generations'"),
    ],
)
def test_settings_without_an_equivalent_name_ours(settings, why):
    with pytest.raises(RecipeError, match=why):
        SPPOConfig(**settings)


def test_every_name_of_trls_config_is_taken_or_explained():
    trl = pytest.importorskip("trl")
    ours = {f.name for f in dataclasses.fields(SPPOConfig)}
    said = {}
    for field in dataclasses.fields(trl.GRPOConfig):
        for value in (True, "something else", 12345.0):
            try:
                Config.load(None, SPPOConfig(**{field.name: value}).overrides())
            except RecipeError as error:
                said[field.name] = str(error)
    assert not {name: text for name, text in said.items() if name not in ours and "unknown" in text}


def test_the_package_lists_its_public_names():
    import sppo

    assert {*sppo.__all__} <= {*dir(sppo)}
    assert all(getattr(sppo, name) is not None for name in sppo.__all__)


# -- adapters ----------------------------------------------------------------------------------------------------------

ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(tmp_path, steps=2, **given):
    args = settings(tmp_path, resume_from_checkpoint=steps > 2)
    args.max_steps, args.recipe = steps, {"evaluation.n": 8, "objective.kl": 0.01}
    return SPPOTrainer(**{"critic": "policy", **given}, reward_funcs=length_reward, train_dataset=rows(), args=args)


def recorded(tmp_path):
    """What the run says of its adapter, and the base that its checkpoint names."""
    run = tmp_path / "run"
    found = json.loads((run / "checkpoints/step-000002/policy/base.json").read_text())
    return Config.load(run / "recipe.toml").adapter, found["name"]


def test_a_lora_config_trains_an_adapter_that_peft_loads(tmp_path, base, capsys):
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    config = LoraConfig(**ADAPTER, lora_dropout=0.1)
    trainer = adapted(tmp_path, model=str(base), peft_config=config)
    trainer.args.disable_progress = False
    trainer.train()
    assert "lora_dropout = 0.1 has no effect" in capsys.readouterr().err
    section, name = recorded(tmp_path)
    assert (section.rank, section.alpha, section.targets, name) == (4, 8, ("q_proj", "v_proj"), str(base))
    assert not (tmp_path / "run/base").exists()
    assert isinstance(trainer.policy, PeftModel)
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved").state_dict()
    mine = {n: p for n, p in trainer.policy.state_dict().items() if ".critic." not in n}
    assert again.keys() == mine.keys()
    assert all((again[n] == p).all() for n, p in mine.items())
    assert config.base_model_name_or_path is None  # the user's own is not written into
    assert 0 <= trainer.predicted_chance(["1+1?"])[0] <= 1


def test_a_peft_model_is_trained_itself_and_its_run_resumes_to_the_same_bits(tmp_path, base):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def given():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**ADAPTER))
        return {"model": model, "processing_class": AutoTokenizer.from_pretrained(base)}

    first = given()
    trainer = adapted(tmp_path, **first)
    trainer.train()
    assert trainer.policy is first["model"]
    section, name = recorded(tmp_path)
    assert (section.rank, section.targets, name) == (4, ("q_proj", "v_proj"), str(base))
    assert not (tmp_path / "run/base").exists()
    resumed = adapted(tmp_path, steps=4, **given())
    resumed.train()
    (tmp_path / "whole").mkdir()
    whole = adapted(tmp_path / "whole", steps=4, **given())
    assert whole.train()["policy_sha256"] == resumed.summary["policy_sha256"] != trainer.summary["policy_sha256"]


def test_a_model_that_is_nowhere_else_is_kept_with_the_run(tmp_path, base):
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)  # not the folder's any more
    expected = {n: p.clone() for n, p in model.state_dict().items()}
    given = {"model": model, "processing_class": AutoTokenizer.from_pretrained(base)}
    adapted(tmp_path, **given, peft_config=LoraConfig(**ADAPTER)).train()
    _, name = recorded(tmp_path)
    assert name == str(tmp_path / "run/base")
    kept = AutoModelForCausalLM.from_pretrained(name).state_dict()
    assert all(torch.equal(kept[n], p) for n, p in expected.items())


def test_an_adapter_that_was_loaded_to_infer_is_trained_on(tmp_path, base):
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = adapted(tmp_path, model=str(base), peft_config=LoraConfig(**ADAPTER))
    first.train()
    first.save_model(str(tmp_path / "saved"))
    (tmp_path / "object").mkdir()
    (tmp_path / "folder").mkdir()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved")
    of_object = adapted(tmp_path / "object", model=model, processing_class=AutoTokenizer.from_pretrained(base))
    of_folder = adapted(tmp_path / "folder", model=str(tmp_path / "saved"))
    assert of_object.train()["policy_sha256"] == of_folder.train()["policy_sha256"] != first.summary["policy_sha256"]


def test_a_quantised_model_by_trls_argument_and_as_an_object(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    lora = LoraConfig(**ADAPTER)
    how = BitsAndBytesConfig(**nf4, bnb_4bit_use_double_quant=True)
    trainer = adapted(tmp_path, model=str(base), peft_config=lora, quantization_config=how)
    assert trainer.config.policy.quantize == "nf4"
    (tmp_path / "object").mkdir()
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**nf4), device_map="cpu")
    given = {"model": model, "processing_class": AutoTokenizer.from_pretrained(base), "peft_config": lora}
    adapted(tmp_path / "object", **given).train()
    kept = tmp_path / "object/run/base"  # quantised in a way of its own
    assert json.loads((kept / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert adapted(tmp_path / "object", steps=3, **given).train()["steps"] == 3
    for wrong, words in (
        ({"quantization_config": BitsAndBytesConfig(**nf4)}, "bnb_4bit_use_double_quant"),
        ({**given, "quantization_config": how}, "for models that are named"),
    ):
        with pytest.raises(ModelError, match=words):
            adapted(tmp_path, **{"model": str(base), "peft_config": lora, **wrong})
    with pytest.raises(ModelError, match="is quantised, so its weights cannot be trained"):
        adapted(tmp_path, **given | {"peft_config": None}, critic=SMALL).train()


def test_adapters_that_cannot_be_trained_are_one_sentence(tmp_path, base):
    from peft import IA3Config, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**ADAPTER))
    given = {"model": model, "processing_class": AutoTokenizer.from_pretrained(base)}
    for wrong, words in (
        ({**given, "peft_config": LoraConfig(**ADAPTER)}, "model is a PeftModel, whose own adapter is trained"),
        ({"peft_config": IA3Config()}, "IA3Config: only adapters of a fixed rank"),
        ({"peft_config": {"r": 4}}, "peft_config is a dict; give peft's LoraConfig"),
        ({"peft_config": LoraConfig(**ADAPTER, bias="all")}, "bias = 'all' trains biases of the base"),
        ({"peft_config": LoraConfig(r=4, target_modules=["attn"])}, "attn"),
        ({"critic": "policy"}, r"add \[adapter\]"),
    ):
        with pytest.raises(UserError, match=words):
            adapted(tmp_path, **{"model": str(base), **wrong}).train()
        assert not (tmp_path / "run").exists()
