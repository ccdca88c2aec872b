"""Worked solutions that are conversations: what is learnt is what the policy would write, and it reads back as that."""

from __future__ import annotations

import pytest

from sppo.environments.loading import load_environment
from sppo.learning.sft import Imitation, demonstrated
from sppo.models.calls import SYNTAXES, read_calls, spelt
from sppo.models.policy import Policy
from sppo.models.tiny import build as tiny
from sppo.recipe.sections import EnvironmentSection
from sppo.rollout.trajectory import asked
from sppo.tasks.loading import load_tasks

from ..conftest import small_policy
from ..models.test_calls import template_of


def test_a_conversation_is_learnt_turn_by_turn():
    policy = small_policy()
    task = load_tasks("calculations:steps=2", default_split="train")[3]
    ids, turns = demonstrated(policy, task)
    said = [policy.rendered(ids[start:end]) for start, end in turns]
    assert len(said) == 3
    assert said[0].startswith("[calculate('")
    assert said[2] == f"A:{task.columns['answer']}<eos>"
    between = policy.rendered(ids[turns[0][1] : turns[1][0]])
    assert between == f"\n{task.solution[1]['content']}\n"
    content, calls = policy.said(ids[turns[0][0] : turns[0][1]])
    assert content == ""
    assert calls[0].arguments == task.solution[0]["tool_calls"][0]["function"]["arguments"]


def test_only_what_the_policy_would_write_is_learnt():
    policy = small_policy()
    tasks = load_tasks("calculations:steps=1-2", default_split="train")
    rows = [demonstrated(policy, tasks[i]) for i in range(5)]
    loss, _ = Imitation(policy, 100).learn(rows, 0.0)
    logps = [x for ids, turns in rows for s, e in turns for x in policy.given_logps([ids[:s]], [ids[s:e]])[0]]
    assert loss == pytest.approx(-sum(logps) / len(logps), rel=1e-5)


def test_a_solution_in_one_turn_is_as_before():
    policy = small_policy()
    task = load_tasks("chain:steps=2", default_split="train")[0]
    prompt, response = policy.prompt_ids(task), policy.response_ids(task.solution)
    assert demonstrated(policy, task) == ([*prompt, *response], [(len(prompt), len(prompt) + len(response))])


def test_a_model_with_a_template_is_shown_the_tools_that_it_learns_to_call():
    model, tokenizer = tiny(hidden=32, layers=1, heads=2)
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = template_of("qwen2_5")
    policy = Policy(model, tokenizer)
    environment = load_environment(EnvironmentSection(tools=("calculator",)))
    task = load_tasks("calculations:steps=1", default_split="train")[0]
    ids, turns = demonstrated(policy, asked(environment, policy, task))
    assert "Compute the value" in policy.rendered(ids[: turns[0][0]])
    assert "<tool_call>" in policy.rendered(ids[turns[0][0] : turns[0][1]])
    assert "<tool_response>" in policy.rendered(ids[turns[0][1] : turns[1][0]])


@pytest.mark.parametrize("syntax", [s for s in SYNTAXES if s])
def test_what_is_spelt_is_read_back(syntax):
    arguments = {"text": "a 'b' \"c\" é", "n": 3, "flag": True}
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    text = spelt({"role": "assistant", "content": "", "tool_calls": [call, call]}, syntax)
    _, calls = read_calls(text, syntax)
    assert [c.name for c in calls] == (["look_up"] if syntax == "harmony" else ["look_up"] * 2)
    assert not calls[0].error
    assert calls[0].arguments["text"] == arguments["text"]
    assert str(calls[0].arguments["n"]) == "3"
