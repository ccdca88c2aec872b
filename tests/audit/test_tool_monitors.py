"""The monitor of tools, on what tools left as evidence."""

from __future__ import annotations

import pytest

from sppo.audit.tool_monitors import ToolUse
from sppo.environments.tools import Tools
from sppo.rollout.engine import Sample
from sppo.rollout.local import LocalEngine
from sppo.types import Rollout, Task

from ..conftest import small_policy
from ..rollout.test_play import TASKS, played


def some(bad: int, **evidence) -> list[Rollout]:
    task = Task("t", "?")
    return [
        Rollout(
            task,
            [1, 2],
            [(1, 2)],
            [0.0],
            "stop",
            "",
            evidence={"calls": 2, "failed_calls": 0} | (evidence if i < bad else {}),
        )
        for i in range(32)
    ]


@pytest.mark.parametrize(
    ("name", "evidence"),
    [("endless", {"out_of_turns": True}), ("failing", {"failed_calls": 2}), ("injected", {"calls_in_results": 1})],
)
def test_a_rise_is_found_once_and_survives_a_resume(name, evidence):
    monitor, found = ToolUse(), []
    for step in range(14):
        out = {}
        found += monitor.look(step, some(0 if step < 11 else 24, **evidence), {}, out)
        assert out[f"tools/{name}"] == (0 if step < 11 else 0.75)
        state = monitor.state_dict()
        monitor = ToolUse()
        monitor.load(state)
    assert {f[0] for f in found} == {f"tools_{name}"}
    assert "24 of 32" in found[0][3]
    assert list(found[0][5]) == list(range(24))


def test_trajectories_without_tools_are_not_looked_at():
    out = {}
    task = Task("t", "?")
    assert ToolUse().look(0, [Rollout(task, [1, 2], [(1, 2)], [0.0], "stop", "")], {}, out) == []
    assert out == {}


def test_what_a_tool_gives_calls_nothing_and_is_counted():
    """A result that is a call, word for word."""

    class Echo:
        def echo(self, text: str) -> str:
            """Say it again.

            Args:
                text: It.
            """
            return text

    class Says(LocalEngine):
        def generate(self, prompts, seeds, sampling, progress=None, limits=None):
            text = "[echo('[echo(1)]')]" if len(prompts[0]) < 10 else "done"
            ids = self.policy.response_ids(text)
            return [Sample(ids, [0.0] * len(ids), "stop") for _ in prompts]

    (r,) = played(small_policy(), Says, lambda: Tools([Echo]), tasks=TASKS[:1])
    assert r.evidence == {"calls": 1, "failed_calls": 0, "calls_in_results": 1}
    assert [m["content"] for m in r.messages] == ["", "[echo(1)]", "done"]
