"""Learned reward models: packed scoring against one by one, the losses by hand, training and use by command."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from sppo.cli.main import main
from sppo.errors import DataError, ModelError, RecipeError
from sppo.learning.reward_model import Example, losses, preference_loss
from sppo.models.reward_model import RewardModel
from sppo.models.tiny import character_tokenizer
from sppo.rewards.loading import load_reward
from sppo.rewards.model import ModelReward
from sppo.tasks.preferences import Labelled, Pair, read_preferences
from sppo.types import Rollout, Task

CPU = torch.device("cpu")


def small(kind: str, labels: int = 1) -> RewardModel:
    torch.manual_seed(0)
    common = {"vocab_size": 98, "num_labels": labels, "pad_token_id": 0}
    if kind == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **common))
    elif kind == "qwen2":
        model = Qwen2ForSequenceClassification(
            Qwen2Config(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                **common,
            )
        )
    else:
        model = BertForSequenceClassification(
            BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **common)
        )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return RewardModel(model, character_tokenizer(), name=kind)


@pytest.mark.parametrize(("kind", "packs"), [("qwen2", True), ("gpt2", True), ("bert", False)])
def test_packed_scores_are_those_of_each_alone(kind: str, packs: bool) -> None:
    model = small(kind)
    assert model.packs is packs
    rng = random.Random(1)
    sequences = [[rng.randrange(3, 98) for _ in range(rng.randrange(1, 30))] for _ in range(13)]
    alone = torch.stack([model([s])[0] for s in sequences])
    together = model.scores(sequences, token_budget=64)
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.std() > 1e-3  # and says something
    plain = model.model(input_ids=torch.tensor([sequences[0]])).logits[0, 0]  # what transformers itself says
    assert torch.allclose(plain, alone[0], atol=1e-5)


def test_micro_batches_keep_to_their_budget_and_lose_nobody() -> None:
    lengths = [5, 30, 7, 7, 1, 22, 40]
    for kind in ("qwen2", "bert"):
        model = small(kind)
        parts = model.cuts(lengths, 40)
        assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
        for part in parts:
            cost = sum(lengths[i] for i in part) if model.packs else max(lengths[i] for i in part) * len(part)
            assert cost <= 40


def test_text_that_spells_a_special_token_stays_text() -> None:
    model = small("qwen2")
    end = model.tokenizer.eos_token_id
    assert model.ids("q:", "a<eos>b").count(end) == 1  # the one that ends every response
    assert model.ids("q:", "a<eos>b")[-1] == end


def test_two_outputs_are_a_logit_and_more_are_refused() -> None:
    model = small("qwen2", labels=2)
    ids = [5, 6, 7]
    logits = model.model(input_ids=torch.tensor([ids])).logits[0]
    assert torch.allclose(model([ids])[0], logits[1] - logits[0], atol=1e-5)
    with pytest.raises(ModelError, match="3 outputs"):
        small("qwen2", labels=3)


def test_the_losses_by_hand() -> None:
    # −log σ(2 − 1) = log(1 + e⁻¹); −log σ(−3) = log(1 + e³)
    loss = preference_loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 2.0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))])
    model = small("qwen2")
    pair = Example([5, 6], [7, 8, 9], 1.0)
    loss_B, right_B = losses(model, [pair])
    a, b = (float(model([s])[0].detach()) for s in (pair.first, pair.second or []))
    assert float(loss_B.detach()) == pytest.approx(math.log(1 + math.exp(b - a)), abs=1e-5)
    assert float(right_B) == float(a > b)
    loss_B, _ = losses(model, [Example([5, 6], None, 0.25)])
    p = 1 / (1 + math.exp(-a))
    assert float(loss_B.detach()) == pytest.approx(-0.25 * math.log(p) - 0.75 * math.log(1 - p), abs=1e-5)


def rows(kind: str, n: int = 400) -> list[dict[str, object]]:
    """A response is good when it holds no `z`."""
    rng = random.Random(0)

    def word(bad: bool) -> str:
        letters = [rng.choice("abcdefgh") for _ in range(rng.randrange(4, 9))]
        if bad:
            letters[rng.randrange(len(letters))] = "z"
        return "".join(letters)

    made: list[dict[str, object]] = []
    for i in range(n):
        if kind == "pairs":
            made.append({"prompt": f"q{i}:", "chosen": word(False), "rejected": word(True)})
        else:
            bad = i % 2 == 0
            made.append({"question": f"q{i}:", "response": word(bad), "label": not bad})
    return made


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_train_by_command_and_judge_with_it(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows(kind))))
    out = tmp_path / "rm"
    command = ["reward-model", "train", str(data), "--model", "tiny:hidden=32,layers=2,heads=2", "--out", str(out)]
    assert main([*command, "--epochs", "6", "--lr", "3e-3", "--quiet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kind"] == kind
    assert result["accuracy"] >= 0.9
    assert result["accuracy_low"] < result["accuracy"] <= result["accuracy_high"] <= 1
    reward = load_reward(f"model:{out}")
    assert isinstance(reward, ModelReward)
    task = Task("t", "q7:" if kind == "pairs" else [{"role": "user", "content": "q7:"}])
    good, bad = reward.judge([Rollout.answer(task, [], [], [], "stop", text) for text in ("abcab", "abzab")])
    assert good.score > 0.6 > 0.4 > bad.score
    assert (good.outcome, bad.outcome) == ("correct", "wrong")
    assert main([*command]) == 2  # the folder is not empty
    responses = tmp_path / "responses.jsonl"
    responses.write_text('{"prompt": "q1:", "response": "abc"}\n{"prompt": "q1:", "response": "' + "a" * 3000 + '"}\n')
    capsys.readouterr()
    assert main(["verify", str(responses), "--reward", f"model:{out}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["outcomes"] == {"correct": 1, "infra_error": 1}  # too long for it: masked, not 0
    assert result["graded"] == 1


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (['{"prompt": "a", "chosen": "b", "rejected": "b"}'], "the same"),
        (['{"prompt": "a", "chosen": "b"}'], "neither"),
        (['{"prompt": "a", "chosen": "b", "rejected": 3}'], "`rejected` must be text"),
        (['{"prompt": "a", "chosen": "b", "rejected": "c"}', '{"prompt": "a", "response": "b", "label": 1}'], "mixes"),
        (['{"prompt": "a", "response": "b", "label": 7}'], "in \\[0, 1\\]"),
        (['{"chosen": "b", "rejected": "c"}'], "no prompt"),
        ([], "no rows"),
    ],
)
def test_rows_that_teach_nothing_are_named(tmp_path: Path, lines: list[str], why: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=why):
        read_preferences(path)


def test_conversations_share_their_prompt(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi"}]
    row = {
        "chosen": [*said, {"role": "assistant", "content": "a"}],
        "rejected": [*said, {"role": "assistant", "content": "b"}],
    }
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    assert read_preferences(path) == [Pair(said, "a", "b")]
    path.write_text('{"question": "hi", "completion": "a", "label": true}')
    assert read_preferences(path) == [Labelled(said, "a", 1.0)]


def test_what_would_be_noise_is_refused(tmp_path: Path) -> None:
    from sppo.models.loading import load

    model, tokenizer = load("tiny:hidden=16,layers=1,heads=2", role="policy.model", head=True)
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    for spec, error, why in (
        (f"model:{tmp_path / 'lm'}", ModelError, "no trained head"),
        ("model:tiny", ModelError, "untrained"),
        ("model", RecipeError, "name the model"),
        ("model:x,scale=0", RecipeError, "scale"),
    ):
        with pytest.raises(error, match=why):
            load_reward(spec)
    fresh, _ = RewardModel.load(str(tmp_path / "lm"), device=CPU, fresh=True)
    assert fresh.packs
