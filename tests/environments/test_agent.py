"""Agents that speak OpenAI's protocol, by its own client."""

from __future__ import annotations

import json

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, OpenAI

from sppo.environments.agent import Agent
from sppo.environments.base import Maker, Reply
from sppo.environments.endpoint import endpoint
from sppo.rewards.environment import build as environment_reward
from sppo.rollout.collect import collect
from sppo.rollout.engine import Sample, Sampling, in_rounds
from sppo.rollout.local import LocalEngine
from sppo.types import Task

from ..conftest import small_policy

TASK = Task("t/1", "How much is 6 times 7?", {"answer": "42"})
TOOLS = [
    {"type": "function", "function": {"name": "multiply", "description": "Multiply.", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}},
]  # fmt: skip


def solve(prompt, base_url, api_key, answer):
    """An agent as people write them."""
    client = OpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": prompt}]
    for _ in range(4):
        message = (
            client.chat.completions.create(model="policy", messages=messages, tools=TOOLS, temperature=0.3)
            .choices[0]
            .message
        )
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return {"reward": float(answer in message.content), "turns": len(messages)}
        for call in message.tool_calls:
            given = json.loads(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(given["a"] * given["b"])})
    return {"reward": 0.0}


async def solve_later(prompt, base_url, api_key):
    """The same, asynchronous and streamed."""
    text = ""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": prompt}]},
    ]
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        async for chunk in await client.chat.completions.create(model="policy", messages=messages, stream=True):
            text += chunk.choices[0].delta.content or ""
    return text


class Says(LocalEngine):
    """A policy whose turns are known."""

    said = ("[multiply(a=6, b=7)]", "It is 42.")

    def converse(self, turns, sampling):
        in_rounds(self, turns, sampling)

    def generate(self, prompts, seeds, sampling, progress=None, limits=None):
        texts = [self.said[min(self.policy.rendered(p).count("<eos>"), len(self.said) - 1)] for p in prompts]
        ids = [self.policy.response_ids(text) for text in texts]
        return [Sample(i, [0.0] * len(i), "stop") for i in ids]


def played(agent, tasks=(TASK,), engine=Says, most=60):
    policy = small_policy()
    make = Maker(lambda: Agent(agent), workers=8, seconds=20.0)
    return collect(
        engine(policy), policy, environment_reward(), list(tasks), Sampling(most), seed=(1,), environment=make
    ), policy


def test_an_agent_calls_tools_through_the_openai_client():
    (r,), policy = played(solve)
    assert r.verdict.score == 1.0
    assert r.evidence == {"reward": 1.0, "turns": 4}
    assert [m["role"] for m in r.messages] == ["assistant", "tool", "assistant"]
    assert r.messages[1] == {"role": "tool", "name": "multiply", "content": "42"}
    assert policy.rendered(r.ids) == "How much is 6 times 7?[multiply(a=6, b=7)]<eos>\n42\nIt is 42.<eos>"
    assert [policy.rendered(r.ids[s:e]) for s, e in r.turns] == ["[multiply(a=6, b=7)]<eos>", "It is 42.<eos>"]


def test_an_asynchronous_agent_reads_a_stream():
    class Once(Says):
        said = ("Forty-two",)

    (r,), policy = played(solve_later, engine=Once)
    assert r.evidence == {"returned": "Forty-two"}
    assert policy.rendered(r.prompt_ids) == "Be brief.\n\nHow much is 6 times 7?"
    assert r.verdict.outcome == "infra_error"  # nothing was paid


def test_many_agents_talk_at_once_to_a_real_policy():
    tasks = [Task(f"t/{i}", f"{i}?", {"answer": str(i)}) for i in range(24)]
    rollouts, _ = played(solve, tasks, LocalEngine, most=24)
    assert len(rollouts) == 24
    assert [r.task.id for r in rollouts] == [task.id for task in tasks]
    assert not [r.evidence for r in rollouts if "environment failed" in r.evidence]
    assert all(0 < len(r.response_ids) <= 24 for r in rollouts)


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        (lambda prompt: None, "returned before it asked"),
        (lambda prompt: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_agent_that_asks_nothing_is_masked(agent, said):
    tasks = [Task(f"t/{i}", "?", {"answer": ""}) for i in range(12)]

    def sometimes(prompt, base_url, api_key, answer, **row):
        return agent(prompt) if next(turn) == 0 else solve(prompt, base_url, api_key, answer)

    turn = iter(range(100))
    rollouts, _ = played(sometimes, tasks)
    failed = [r for r in rollouts if r.verdict.masked]
    assert len(failed) == 1
    assert said in failed[0].verdict.evidence["reason"]


def test_an_agent_that_changes_what_was_said_is_masked():
    def rewrites(prompt, base_url, api_key):
        with OpenAI(base_url=base_url, api_key=api_key) as client:
            for text in (prompt, "Something else"):
                client.chat.completions.create(model="policy", messages=[{"role": "user", "content": text}])

    one = Agent(rewrites)
    one.reset(TASK)
    with pytest.raises(Exception, match="did not continue the conversation"):
        one.step(Reply("So"))
    one.close()


def test_what_is_no_request_is_refused():
    session = endpoint().open()
    key = {"Authorization": f"Bearer {session.api_key}"}
    url = f"{session.base_url}/chat/completions"
    assert httpx.post(url, json={}).status_code == 401
    assert httpx.post(url, json={}, headers=key).status_code == 400
    assert httpx.post(url, content=b"[" * 10_000, headers=key).status_code == 400
    assert httpx.get(f"{session.base_url}/models", headers=key).json()["data"][0]["id"] == "policy"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    found = httpx.post(url, json={"messages": [{"role": "user", "content": image}]}, headers=key).json()
    assert "only text" in found["error"]["message"]
    endpoint().close(session)
    assert httpx.post(url, json={}, headers=key).status_code == 404
    with (
        pytest.raises(APIStatusError),
        OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client,
    ):
        client.models.list()
