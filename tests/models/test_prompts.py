"""Prompts as models read them: one BOS, tools and tool calls in the template, and rows that a template refuses."""

from __future__ import annotations

import json

import pytest
from tokenizers import processors

from sppo.cli.main import main
from sppo.errors import DataError, ModelError
from sppo.models import tiny
from sppo.models.critic import Critic
from sppo.models.policy import Policy
from sppo.report.pages import environment, rollout_view
from sppo.report.reader import RunReader
from sppo.run.prompts import said_prompt
from sppo.tasks.records import task_from
from sppo.tasks.user_source import checked
from sppo.types import Task

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[tools {% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.a }}){% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_bos(tokenizer, template=None):
    """A tokenizer that adds a BOS of its own, as Llama's do."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.chat_template = template
    return tokenizer


def models(template):
    model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    with_bos(tokenizer, template)
    model.resize_token_embeddings(len(tokenizer))
    backbone, other = tiny.build(hidden=32, layers=1, heads=2, head=False)
    with_bos(other, template)
    backbone.resize_token_embeddings(len(other))
    return Policy(model, tokenizer), Critic(backbone, other)


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("prompt", ["2+2?", "<s>2+2?", "<s><s>2+2?", [{"role": "user", "content": "2+2?"}]])
def test_a_prompt_has_one_bos(template, prompt):
    for model in models(template):
        ids = model.prompt_ids(Task("t", prompt))
        assert ids.count(model.tokenizer.bos_token_id) == 1
        assert ids[0] == model.tokenizer.bos_token_id


def test_tools_and_tool_calls_reach_the_template():
    policy, critic = models(TEMPLATE)
    row = {
        "prompt": [
            {"role": "user", "content": "1+1?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 7}'}}],
            },
            {"role": "tool", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    task = task_from(row, "rows:1")
    wanted = "<s>[tools add]<user>1+1?<assistant>(add 7)<tool>2<assistant>"
    assert policy.rendered(policy.prompt_ids(task)) == wanted
    assert critic.tokenizer.decode(critic.prompt_ids(task)) == wanted
    other = task_from({"question": "q", "tools": ["hammer"]}, "rows:1")  # a column of that name for the rewards
    assert policy.rendered(policy.prompt_ids(other)) == "<s><user>q<assistant>"


@pytest.fixture
def chat_model(tmp_path):
    def build(template):
        model, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
        tokenizer.chat_template = template
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return build


def train(tmp_path, model, data, *extra):
    return main(
        [
            "train", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "run"), "--critic.model",
            "tiny:hidden=32,layers=1,heads=2", "--steps", "1", "--rollout.prompts", "4", "--rollout.max_tokens", "4",
            "--evaluation.n", "4", "--training.minibatches", "1", *extra,
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    "refusal",
    [
        "{{ raise_exception('too rude') }}",
        "{{ 1 // 0 }}",
        "{{ m.content.nothing.more }}",
        "{{ m['content'] + 1 }}",
        "{{ ('x' * 10)['a']() }}",
    ],
)
def test_a_row_that_the_template_refuses_is_named_before_the_first_step(chat_model, tmp_path, capsys, refusal):
    model = chat_model(
        "{% for m in messages %}{% if 'rude' in m.content %}" + refusal + "{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(60)]
    rows[16]["question"] = "rude?"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert train(tmp_path, model, path) == 0
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "1 of 5" in err[: err.index("held-out accuracy after step 0")]
    assert "rows are left out: rows.jsonl:17: the model's chat template refuses this conversation" in err
    assert main(["data", "check", str(path), "--model", str(model)]) == 2
    out = capsys.readouterr().out
    assert f"{path}:17: template: the model's chat template refuses this conversation" in out
    assert "1 are refused by the model's chat template" in out


def test_the_critics_template_counts_too(tmp_path, chat_model, capsys):
    folder = chat_model(TEMPLATE.replace("{{ bos_token }}", ""))
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1?"}], "answer": str(i + 1)} for i in range(60)]
    rows[4]["prompt"].insert(0, {"role": "system", "content": "s"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert train(tmp_path, "tiny:hidden=32,layers=1,heads=2", path, "--critic.model", str(folder)) == 0
    assert (
        "rows.jsonl:5: the model's chat template refuses this conversation: no system here (critic.model)"
        in capsys.readouterr().err
    )


def test_the_prompt_is_shown_as_the_policy_reads_it(chat_model, tmp_path, capsys):
    model = chat_model("{% for m in messages %}<<{{ m.role }}>>{{ m.content }}{% endfor %}<<assistant>>")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(60)))
    assert train(tmp_path, model, path) == 0
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("the policy reads")]
    assert "+1?<<assistant>>'" in line
    assert "'<<user>>" in line
    assert err.index("the policy reads") < err.index("held-out accuracy after step 0")
    assert main(["audit", "show", str(tmp_path / "run"), "0:1"]) == 0
    out = capsys.readouterr().out
    assert "prompt, as the policy read it (" in out
    assert "+1?<<assistant>>" in out
    run = RunReader(tmp_path / "run")
    page = (
        environment()
        .get_template("_rollout.html")
        .render(r=rollout_view(run, run.rollouts.one(0, 1)), uid="one", live=True, chosen="")
    )
    assert "as the policy read it" in page
    assert "&lt;&lt;user&gt;&gt;" in page  # what a row holds is text
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "policy" / "tokenizer.json").unlink()
    main(["audit", "show", str(tmp_path / "run"), "0:1"])
    assert "\nprompt\n" in capsys.readouterr().out  # the row's own text is still there


def test_a_long_prompt_is_cut_in_its_middle_and_says_by_how_much():
    said = said_prompt("policy", "t", range(9), "a" * 1000 + "\x1b" + "z" * 200)
    assert "(9 tokens)" in said
    assert "841 characters" in said
    assert "\x1b" not in said
    assert said.endswith("z'")


def test_what_is_no_task_is_named():
    for task, why in (
        ({"question": "q"}, "must give a sppo.Task, not dict"),
        (Task("t", None), "a prompt is text or a list"),
        (Task("t", []), "a prompt is text or a list"),
        (Task("t", [{"role": "user"}]), "a prompt is text or a list"),
        (Task(5, "q"), "an `id` that is text"),
        (Task("t", "q", None), "`columns` that are a mapping"),
    ):
        with pytest.raises(DataError, match=why.replace(".", r"\.")):
            checked(task)


def test_a_tokenizer_of_a_larger_model_is_one_sentence():
    model, _ = tiny.build(hidden=32, layers=1, heads=2)
    _, tokenizer = tiny.build(hidden=32, layers=1, heads=2)
    model.resize_token_embeddings(8)
    task = Task("t", "3+4?", {})
    with pytest.raises(ModelError, match="its tokenizer gives the id"):
        Policy(model, tokenizer).prompt_ids(task)
