"""The task of small Python functions: its solutions pass, near misses do not, held-out problems are others."""

from __future__ import annotations

import shutil

import pytest

from sppo.errors import RecipeError
from sppo.rewards.loading import load_reward
from sppo.tasks.functions import ENDS, STEPS, run
from sppo.tasks.loading import load_tasks
from sppo.types import Rollout, Task


def test_a_problem_by_hand() -> None:
    add, keep, total = STEPS[0], STEPS[3], ENDS[1]
    from dataclasses import replace

    steps = [replace(add, k=3), replace(keep, k=4), total]
    assert run(steps, [1, 2, 5]) == 5 + 8
    assert run(steps, []) == 0


def test_every_step_is_as_its_code_says() -> None:
    for step in (*STEPS, *ENDS):
        for xs in ([], [3], [5, -2, 8, 3, 3, -7, 10]):
            names: dict[str, list[int]] = {"xs": list(xs)}
            code = step.code.format(k=2)
            if code.startswith("return "):
                assert eval(code.removeprefix("return "), names) == step.apply(list(xs), 2)
            else:
                exec(code, names)
                assert names["xs"] == step.apply(list(xs), 2)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_solutions_pass_and_near_misses_fail_in_the_sandbox() -> None:
    source = load_tasks("functions:steps=1-4")
    tasks = [source[i] for i in range(40)]
    reward = load_reward("code")

    def judged(task: Task, text: str) -> Rollout:
        return Rollout.answer(task, [], [], [], "stop", text)

    assert {v.outcome for v in reward.judge([judged(t, t.solution or "") for t in tasks])} == {"correct"}
    shorter = []
    for t in tasks:
        lines = (t.solution or "").splitlines()
        shorter += [judged(t, "\n".join([*lines[:i], *lines[i + 1 :]])) for i in range(1, len(lines) - 1)]
    assert {v.outcome for v in reward.judge(shorter)} == {"wrong"}
    assert {
        v.evidence["measures"]["hidden_pass_rate"]
        for v in reward.judge([judged(t, t.solution or "") for t in tasks[:3]])
    } == {1.0}
    reward.close()


def test_the_same_problem_for_ever_and_none_in_both_splits() -> None:
    train, again, held_out = (load_tasks(f"functions:split={s}") for s in ("train", "train", "held-out"))
    assert [train[i] for i in range(5)] == [again[i] for i in range(5)]
    texts = {train[i].text for i in range(300)}
    assert not texts & {held_out[i].text for i in range(300)}
    hidden = train[0].columns["hidden_tests"]
    assert len(hidden) == 6
    for spec in (
        "functions:steps=0",
        "functions:steps=a",
        "functions:split=test",
        "functions:hidden=1",
        "functions:visible=0",
    ):
        with pytest.raises(RecipeError):
            load_tasks(spec)
