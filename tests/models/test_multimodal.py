"""Checkpoints that read more than text: trained in their text part, the rest as it was, saved whole."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, Gemma3ForConditionalGeneration

from sppo.errors import DataError, RecipeError
from sppo.models.critic import Critic
from sppo.models.loading import outline, saved_dtype
from sppo.models.multimodal import causal_class
from sppo.models.policy import Policy
from sppo.models.weights import parameter_count
from sppo.rollout.engine import Sampling, load_engine
from sppo.rollout.local import LocalEngine
from sppo.tasks.records import task_from
from sppo.types import Task

from ..test_benchmarks import script

WHOLE = ["Gemma 3", "Qwen 2.5 VL", "Llama 4", "SmolVLM", "Qwen 3.5"]


@pytest.fixture(scope="module", params=WHOLE)
def folder(request, tmp_path_factory):
    """A checkpoint as it is published, and the model that it was saved from."""
    path = tmp_path_factory.mktemp("models") / "model"
    return path, script("architectures").make(request.param, path)


def loaded(path, dtype: str = "float32") -> Policy:
    return Policy.load(str(path), dtype=dtype, device=torch.device("cpu"), seed=0)[0]


def test_vllm_is_refused_before_it_starts(folder):
    """Whether it is installed or not."""
    with pytest.raises(RecipeError, match=r"reads more: take rollout\.engine = 'local'"):
        load_engine("vllm", loaded(folder[0]))


def test_only_the_text_part_is_trained_and_travels(folder):
    policy = loaded(folder[0])
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in policy.weights()}
    assert not any(word in n for n in trained for word in ("vision", "visual", "projector", "connector"))
    assert trained < dict(policy.model.named_parameters()).keys()
    ids = torch.randint(3, 100, (2, 9))
    action = torch.zeros(2, 9, dtype=torch.bool)
    action[:, 4:] = True
    policy.logps(ids, action, 1.0).logp_BT.sum().backward()
    got = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    assert got <= trained
    assert len(got) > 0.8 * len(trained)  # not every expert is asked


def test_a_saved_checkpoint_is_whole_and_loads_in_its_own_class(folder, tmp_path):
    path, before = folder
    policy = loaded(path, "bfloat16")
    with torch.no_grad():
        for _, tensor in policy.weights():
            tensor.add_(0.5)
    policy.save(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(before)
    trained = {n for n, _ in policy.weights()}
    for (name, was), now in zip(before.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(was, now) == (name not in trained), name  # a float32 tower is not rounded to bfloat16
    assert (tmp_path / "preprocessor_config.json").read_text() == (path / "preprocessor_config.json").read_text()
    assert saved_dtype(str(tmp_path)) == "bfloat16"
    resumed = loaded(tmp_path, "bfloat16")
    assert resumed.fingerprint() == policy.fingerprint()
    assert resumed.dtype == torch.bfloat16


def test_a_narrow_tower_stays_narrow(folder, tmp_path):
    path, before = folder
    type(before).from_pretrained(path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    policy = loaded(tmp_path, "float32")
    trained = {n for n, _ in policy.weights()}
    assert {p.dtype for n, p in policy.model.named_parameters() if n not in trained} == {torch.bfloat16}
    assert {p.dtype for n, p in policy.model.named_parameters() if n in trained} == {torch.float32}


def test_engine_learner_and_the_whole_model_agree(folder):
    policy = loaded(folder[0])
    prompts = [[3 + (7 * i + k) % 50 for k in range(2 + i)] for i in range(5)]
    samples = LocalEngine(policy).generate(prompts, range(5), Sampling(10))
    theirs = policy.given_logps(prompts, [s.ids for s in samples])
    for prompt, sample, logps in zip(prompts, samples, theirs, strict=True):
        assert sample.logps == pytest.approx(logps, abs=1e-4)
        ids = torch.tensor([[*prompt, *sample.ids]])
        with torch.no_grad():
            own = folder[1].eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert own.gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist() == pytest.approx(logps, abs=1e-4)


def test_what_is_read_from_the_config_is_the_text_parts(folder):
    policy = loaded(folder[0])
    assert policy.context == 256
    assert policy.eos_ids == [1]
    assert parameter_count(outline(str(folder[0]), role="policy.model", head=True)) == parameter_count(policy.model)


def test_a_reference_shares_what_never_changes(folder):
    policy = loaded(folder[0])
    reference = policy.as_reference()
    trained = {n for n, _ in policy.weights()}
    for (name, p), q in zip(policy.model.named_parameters(), reference.model.parameters(), strict=True):
        assert (p.data_ptr() == q.data_ptr()) == (name not in trained)


def test_a_critic_is_the_text_part_alone(folder, tmp_path):
    critic, _ = Critic.load(str(folder[0]), dtype="float32", device=torch.device("cpu"), seed=0)
    value = critic.logits([Task("1", "1+1=")])
    critic.head.weight.data.fill_(0.1)
    critic.save(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(critic.backbone)
    again, _ = Critic.load(str(tmp_path), dtype="float32", device=torch.device("cpu"), seed=0)
    assert value.tolist() == [0.0]
    assert torch.equal(again.logits([Task("1", "1+1=")]), critic.logits([Task("1", "1+1=")]))


def test_a_checkpoint_without_its_class_gets_transformers_choice(tmp_path):
    model = script("architectures").make("Gemma 3", tmp_path)
    model.config.architectures = None
    assert causal_class(model.config) is AutoModelForImageTextToText
    model.config.architectures = ["Gemma3ForConditionalGeneration"]
    assert causal_class(model.config) is Gemma3ForConditionalGeneration
    model.config.architectures = ["Gemma3ForSequenceClassification"]
    assert causal_class(model.config) is AutoModelForImageTextToText


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is it?", "answer": "a cat", "image": {"bytes": b"\x89PNG", "path": None}},
        {"question": "What is it?", "answer": "a cat", "images": [{"bytes": b"\x89PNG"}]},
        {"question": "What is it?", "answer": "a cat", "image": "cat.png"},
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], "answer": "a"},
        {"prompt": json.dumps([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])},
    ],
)
def test_rows_with_images_are_refused_in_one_sentence(row):
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*image"):
        task_from(row, "rows.jsonl:3")


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_an_empty_image_column_is_no_image(nothing):
    assert task_from({"question": "2+2?", "answer": "4", "image": nothing, "images": nothing}, "rows:1").text
