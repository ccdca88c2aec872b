"""The Python API, and the README's worked example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sppo import SPPOConfig, SPPOTrainer
from sppo.errors import DataError, ModelError
from sppo.models import tiny

ROOT = Path(__file__).parents[2]
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


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
