"""Scored steps: splitting, the checkers by hand, process reward models, and what a wrong checker is told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForTokenClassification

from sppo.errors import ModelError, RecipeError, RewardError
from sppo.models.process_reward import StepModel
from sppo.models.tiny import character_tokenizer
from sppo.rewards.arithmetic import check, value_of
from sppo.rewards.loading import load_reward
from sppo.rewards.segments import split_steps
from sppo.tasks.chain import check_steps
from sppo.tasks.loading import load_tasks
from sppo.types import Rollout, Task, Verdict


def judged(spec: str, text: str, task: Task | None = None) -> Verdict:
    return load_reward(spec).judge([Rollout.answer(task or Task("t", "7+5-3*2?"), [], [], [], "stop", text)])[0]


def test_steps_and_where_they_end() -> None:
    assert split_steps("a; b ;c;") == [("a", 1), ("b", 5), ("c", 7)]
    assert split_steps("one\n\n two \n") == [("one", 3), ("two", 9)]
    assert split_steps("It is 3.5. Then 4! So?") == [("It is 3.5.", 10), ("Then 4!", 18), ("So?", 22)]
    assert split_steps("a\nb\n\nc", "paragraphs") == [("a\nb", 3), ("c", 6)]
    assert split_steps(" \n ") == []
    text = "7+5=2;2-3=9"
    assert [text[:end] for _, end in split_steps(text)] == ["7+5=2", text]


def test_chains_own_steps() -> None:
    task = Task("t", "7+5-3*2?")
    assert check_steps(task, ["7+5=2", "2-3=9", "9*2=8", "A:8"]) == [1, 1, 1, 1]
    assert check_steps(task, ["7+5=3", "3-3=0", "0*2=0", "A:0"]) == [0, 1, 1, 1]  # one slip costs one step
    assert check_steps(task, ["7+5=2", "2*2=4", "A:4"]) == [1, 0, 0]  # a step left out
    assert check_steps(task, ["7+5=2", "2-3=9", "9*2=8", "8+1=9", "A:9"]) == [1, 1, 1, 0, 1]  # one made up
    assert check_steps(task, ["A:8", "nonsense", "1" * 5000 + "+1=1"]) == [0, 0, 0]
    source = load_tasks("chain:steps=2-6")
    for i in range(50):  # every worked solution is right in every step
        made = source[i]
        assert made.solution
        assert set(check_steps(made, made.solution.split(";"))) == {1.0}
    verdict = judged("steps:check=chain", "7+5=3;3-3=0;0*2=0;A:0")
    assert verdict.score == 0.75
    assert [s["score"] for s in verdict.evidence["steps"]] == [0, 1, 1, 1]
    assert judged("steps:check=chain,score=min", "7+5=3;3-3=0;0*2=0;A:0").score == 0


@pytest.mark.parametrize(
    ("step", "right"),
    [
        ("12 * 3 = 36", 1), ("so 12*3 = 35.", 0), ("(2 + 3) × 4 = 20 and 20 - 1 = 19", 1), ("20/8 = 2.5 = 5/2", 1),
        ("10 / 3 = 3.33", 1), ("10 / 3 = 3.34", 0), ("1,200 + 34 = 1,234", 1), ("2^10 = 1024", 1), ("-3 + 5 = 2", 1),
        ("1. 3+4=7", 1), ("2) 3+4=8", 0), ("3 x 4 = 12", 1), ("3 plus 4 = 8", 0), ("5 - 3 = 2 km", 1), ("3 + 4 = 7 - 2 = 5", 0),
        ("x = 3 + 4", None), ("f(2) = 4", None), ("2x = 6", None), ("3 dozen + 4 = 40", None), ("4 = 7", None), ("no numbers", None),
        ("3 dozen - 4 = 32", None), ("1/0 = 3", None), ("9^9^9^9 = 1", None), ("((((1))) = 1", None), ("2 + 2 = 4x", None), ("x=5", None),
        ("2+2 apples=5", None), ("[2+2]=5", None), ("2+2:=5", None), ("((((1/9)^64)^64)^64)^64 + 1 = 2", None),
    ],
)  # fmt: skip
def test_equations_in_free_text(step: str, right: float | None) -> None:
    assert check(step) == right


def test_no_text_keeps_the_checker_busy() -> None:
    began = time.monotonic()
    for hostile in (
        "1" * 100_000,
        "1=" * 50_000,
        "(" * 100_000,
        "1+" * 50_000 + "=1",
        "=" * 100_000,
        "2^" * 150 + "2=1",
        " " * 100_000 + "=",
        "1 x " * 20_000,
    ):
        check(hostile)
        split_steps(hostile)
    assert time.monotonic() - began < 2
    assert value_of("2 * (3 - 5) / 3") == Fraction(-4, 3)


def own(task: Task, steps: Sequence[str]) -> list[float | None]:
    return [None if "?" in step else float(len(step)) / 10 for step in steps]


def short(task: Task, steps: Sequence[str]) -> list[float]:
    return [0.5]


def test_a_checker_of_ones_own() -> None:
    verdict = judged("steps:check=tests.rewards.test_steps:own,score=product", "aaaaa\n?\naaaa")
    assert verdict.score == pytest.approx(0.2)
    assert verdict.evidence["measures"] == {"steps": 3.0, "steps_judged": 2.0, "step_mean": pytest.approx(0.45)}
    nothing = judged("steps:check=tests.rewards.test_steps:own", "?")
    assert (nothing.outcome, nothing.score) == ("unparseable", 0)
    with pytest.raises(RewardError, match="1 scores for the 2 steps"):
        judged("steps:check=tests.rewards.test_steps:short", "a\nb")
    with pytest.raises(RewardError, match=r"2\.0"):
        judged("steps:check=tests.rewards.test_steps:own", "a" * 20)
    for spec in (
        "steps",
        "steps:check=chain,model=x",
        "steps:check=nothing",
        "steps:check=chain,split=words",
        "steps:check=chain,score=max",
    ):
        with pytest.raises(RecipeError):
            load_reward(spec)
    mixed = judged("answer + 1 * steps:check=chain", "7+5=3;3-3=0;0*2=0;A:8", Task("t", "7+5-3*2?", {"answer": "8"}))
    assert (mixed.score, mixed.correct) == (0.75, 1.0)  # the critic learns correctness, not the steps


@pytest.mark.parametrize("labels", [1, 2])
def test_a_process_reward_model_reads_each_step_at_its_separator(labels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(character_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_labels=labels, max_position_embeddings=64,
    )  # fmt: skip
    network = LlamaForTokenClassification(config)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0, 0.3)
    tokenizer = character_tokenizer()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = StepModel.load(str(tmp_path), device=torch.device("cpu"), dtype="float32")
    rows = [("ab:", ["c", "de"]), ("x:", ["y"]), ("q" * 70, ["a"])]
    first, second, third = model.scores(rows)
    ids = tokenizer("ab:c\nde\n")["input_ids"]
    logits = network.eval()(input_ids=torch.tensor([ids])).logits[0]
    good = logits[:, 0].sigmoid() if labels == 1 else logits.softmax(-1)[:, 1]
    assert first == pytest.approx([float(good[4].detach()), float(good[7].detach())], abs=1e-5)
    assert second is not None
    assert third is None
    verdict = judged(f"steps:model={tmp_path}", "c\nde", Task("t", "ab:"))
    assert verdict.score == pytest.approx(sum(first) / 2, abs=1e-5)
    assert judged(f"steps:model={tmp_path}", "c", Task("t", "q" * 70)).outcome == "infra_error"
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace("ForTokenClassification", "ForCausalLM")
    )
    with pytest.raises(ModelError, match="no folder"):
        load_reward("steps:model=/nowhere/at/all")
