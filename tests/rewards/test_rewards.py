"""Rewards: extraction, comparison, killable workers, and what a user's callable may return."""

from __future__ import annotations

import threading
import time

import pytest

from sppo.errors import RecipeError, RewardError
from sppo.rewards.answer import looks_cut_off
from sppo.rewards.extract import boxed, extract_answer
from sppo.rewards.loading import load_reward
from sppo.rewards.quantity import quantity
from sppo.rewards.workers import WorkerPool
from sppo.types import Rollout, Task, Verdict


def rollout(text, **columns):
    return Rollout.answer(Task("t", "q", columns), [1], [2], [0.0], "stop", text)


def outcome(reward, text, **columns):
    return load_reward(reward).judge([rollout(text, **columns)])[0].outcome


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+4=7;7*2=4;A:4", "4"),
        ("so the total is 12.\nAnswer: 12", "12"),
        ("The final answer is **1/2**", "1/2"),
        ("#### 1,234", "1,234"),
        (r"thus \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        ("it is 7, or rather 8", "8"),
        ("", None),
        ("no idea", None),
        ("Let a = 3.\nSo the area is 9", "9"),
        ("A: 3, B: 4\nAnswer: 5", "5"),
        ("Answer: 3\nwait\nAnswer: 4", "4"),
    ],
)
def test_extract(text, answer):
    assert extract_answer(text) == answer


def test_boxed_balances_braces_and_refuses_what_never_closes():
    assert boxed(r"\boxed{a{b}c}") == "a{b}c"
    assert boxed(r"\boxed{\frac{1}{2") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", 1234.5),
        ("$3", 3),
        ("1/2", 0.5),
        ("50%", 50),
        ("-7.", -7),
        ("1e3", 1000),
        ("x", None),
        ("1e999999", None),
    ],
)
def test_number(text, value):
    found = quantity(text)
    assert found is None if value is None else float(found.value) == value


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Answer: 4.0", "4", "correct"),
        ("Answer: 5", "4", "wrong"),
        ("Answer: Paris", "paris", "correct"),
        ("hm", "4", "unparseable"),
        ("Answer: 4", "", "invalid_task"),
        ("Answer: 4", r"\frac{1", "invalid_task"),
        ("#### 72", "Natalia sold 48/2 = 24 clips.\n#### 72", "correct"),
        ("Answer: 7", "Natalia sold 48/2 = 24 clips.\n#### 72", "wrong"),
        (r"\boxed{1,2}", "12", "wrong"),
    ],
)
def test_answer_reward(text, gold, expected):
    assert outcome("answer", text, answer=gold) == expected


def test_answer_reads_the_nested_layout_and_masks_what_has_no_reference():
    assert outcome("answer", "Answer: 4", reward_model={"ground_truth": "4"}) == "correct"
    verdict = load_reward("answer").judge([rollout("Answer: 4")])[0]
    assert verdict.masked
    assert verdict.outcome == "invalid_task"


@pytest.mark.parametrize("gold", [r"x_{0", r"\frac{1", r"\sqrt", "2^", "}"])
def test_cut_off_golds_are_seen(gold):
    assert looks_cut_off(gold)


@pytest.mark.parametrize("gold", [r"\frac{1}{2}", "x_0", r"\{1, 2\}", "3"])
def test_whole_golds_are_not(gold):
    assert not looks_cut_off(gold)


def test_math_verifies_symbolically_in_any_thread():
    reward = load_reward("math")
    rows = [
        rollout(r"so \boxed{\frac{1}{2}}", answer="0.5"),
        rollout(r"\boxed{x+1}", answer="1+x"),
        rollout(r"\boxed{3}", answer="4"),
        rollout("nothing here", answer="4"),
        rollout(r"\boxed{3}", answer=r"\frac{1"),
    ]
    found = []
    thread = threading.Thread(target=lambda: found.extend(reward.judge(rows)))
    thread.start()
    thread.join()
    reward.close()
    assert [v.outcome for v in found] == ["correct", "correct", "wrong", "unparseable", "invalid_task"]
    assert found[-1].masked


def test_an_expression_that_no_machine_can_work_out_is_wrong_and_holds_nothing_up():
    reward = load_reward("math:workers=2")
    rows = [rollout(r"\boxed{9^{9^{9^{9}}}}", answer="5")] + [
        rollout(rf"\boxed{{{i}}}", answer=str(i)) for i in range(20)
    ]
    verdicts = reward.judge(rows)
    reward.close()
    assert [v.outcome for v in verdicts] == ["wrong"] + ["correct"] * 20


def hang(job):
    time.sleep(job)
    return job


def die(job):
    import os

    os._exit(3) if job else None
    return "alive"


def test_workers_kill_what_overruns_and_survive_what_crashes():
    pool = WorkerPool(f"{__name__}:hang", workers=2, limit=1.0)
    pool.run([0])
    began = time.monotonic()
    results = pool.run([0, 60, 0, 0])
    assert time.monotonic() - began < 55  # not the 60 s that it wants
    pool.close()
    assert results[1] == {"timeout": 1.0}
    assert [r.get("ok") for i, r in enumerate(results) if i != 1] == [0, 0, 0]
    pool = WorkerPool(f"{__name__}:die", workers=1, limit=5.0)
    results = pool.run([0, 1, 0])
    pool.close()
    assert results[0] == {"ok": "alive"}
    assert results[1] == {"crashed": 3}
    assert results[2] == {"ok": "alive"}


def test_gym_reward_scores_with_the_family():
    from sppo.tasks.loading import load_tasks

    task = load_tasks("gym:chain_sum,min_terms=2,max_terms=3,min_digits=1,max_digits=2")[0]
    reward = load_reward("gym")
    rows = [Rollout.answer(task, [1], [2], [0.0], "stop", text) for text in (task.solution, "Answer: 99999", "")]
    verdicts = reward.judge(rows)
    reward.close()
    assert verdicts[0].outcome == "correct"
    assert verdicts[1].score < 1
    assert reward.check(Task("x", "q")) is not None


# -- a user's callable -------------------------------------------------------------------------------------------------------


def test_callable_gets_columns_by_name_and_may_say_none():
    def mine(prompts, completions, answer, **kwargs):
        assert kwargs["extra"] == ["e"] * 2
        return [None if c == "?" else float(c == a) for c, a in zip(completions, answer, strict=True)]

    verdicts = load_reward(mine).judge([rollout("4", answer="4", extra="e"), rollout("?", answer="4", extra="e")])
    assert verdicts[0].score == 1.0
    assert verdicts[1].masked


def test_callable_gets_chat_messages_for_chat_prompts():
    seen = {}

    def mine(prompts, completions):
        seen.update(prompt=prompts[0], completion=completions[0])
        return [1.0]

    task = Task("t", [{"role": "user", "content": "q"}])
    load_reward(mine).judge([Rollout.answer(task, [1], [2], [0.0], "stop", "hello")])
    assert seen["prompt"] == [{"role": "user", "content": "q"}]
    assert seen["completion"] == [{"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 1.0], "returned 2 scores for 1"),
        ([float("nan")], "must lie in"),
        ([1.5], "must lie in"),
        (["good"], "scores are numbers"),
        (0.5, "returned float"),
    ],
)
def test_what_a_callable_may_not_return(returned, message):
    with pytest.raises(RewardError, match=message):
        load_reward(lambda prompts, completions: returned).judge([rollout("x")])


def test_a_callable_may_ask_for_solution_and_question():
    from sppo.tasks.records import task_from

    def accuracy(completions, solution, prompts, **kwargs):
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    task = task_from({"prompt": "2+2=", "solution": "4"}, "rows:1")
    assert load_reward(accuracy).judge([Rollout.answer(task, [1], [2], [0.0], "stop", "4")])[0].score == 1.0


def test_numpy_scores_become_plain_numbers():
    import numpy as np

    class Judge:
        def judge(self, rollouts):
            return [Verdict(np.float32(1.0), "correct")]

    assert type(load_reward(Judge()).judge([rollout("x")])[0].score) is float


def test_workers_end_with_their_trainer():
    import subprocess
    import sys

    script = (
        "import os, threading, time\nfrom sppo.rewards.workers import WorkerPool\n"
        f"pool = WorkerPool('{__name__}:hang', workers=1, limit=600)\npool.run([0])\n"
        "print(next(iter(pool._all)).process.pid, flush=True)\n"
        "threading.Thread(target=pool.run, args=([600],), daemon=True).start()\ntime.sleep(1)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().split()[2] == "Z":
                    break
        except FileNotFoundError:
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"worker {pid} outlived its trainer")


def test_a_callable_that_raises_is_named():
    def broken(prompts, completions):
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"broken raised KeyError"):
        load_reward(broken).judge([rollout("x")])


def test_a_judge_object_is_checked():
    class Judge:
        def judge(self, rollouts):
            return [Verdict(1.0, "correct")]

    assert load_reward(Judge()).judge([rollout("x")])[0].score == 1.0
    with pytest.raises(RewardError, match="one Verdict for each of 2"):
        load_reward(Judge()).judge([rollout("x"), rollout("y")])


def test_names():
    with pytest.raises(RecipeError, match="did you mean 'math'"):
        load_reward("maths")
    with pytest.raises(RecipeError, match="no option 'limits'"):
        load_reward("math:limits=3")
    with pytest.raises(RecipeError, match="cannot be imported"):
        load_reward("no.such.module:f")


def test_one_sample_at_fault_costs_one_sample(monkeypatch):
    """A batch of twenty with one that makes the reward raise, hang, or return what it may not: nineteen are kept."""
    import threading
    import time

    from sppo.rewards import user_reward as guard

    monkeypatch.setattr(guard, "LEAST", 0.2)

    def mine(prompts, completions):
        if "raise" in completions:
            raise KeyError("answer")
        if "sleep" in completions:
            time.sleep(60)
        if "spin" in completions:
            while True:
                pass
        if "count" in completions:
            return [1.0]
        if "swallow" in completions:
            try:
                time.sleep(60)
            except Exception:
                return [1.0] * len(completions)
        return [{"nan": float("nan"), "two": 2.0, "text": "good"}.get(c, 1.0) for c in completions]

    def judged(fault, n=20):
        return load_reward(mine, limit=0.5).judge([rollout("fine") for _ in range(n - 1)] + [rollout(fault)])

    for fault, why in (
        ("raise", "raised KeyError"), ("sleep", "did not come back"), ("spin", "did not come back"), ("swallow", "did not come back"),
        ("nan", "must lie in"), ("two", "must lie in"), ("text", "scores are numbers"),
    ):  # fmt: skip
        verdicts = judged(fault)
        assert [v.score for v in verdicts[:-1]] == [1.0] * 19, fault
        assert verdicts[-1].masked
        assert why in verdicts[-1].evidence["reason"]
    assert [v.masked for v in judged("count")] == [False] * 20  # right for one sample at a time
    with pytest.raises(RewardError, match=r"did not come back within 0\.5 s with 4 completions"):
        judged("sleep", n=4)
    found = []
    thread = threading.Thread(target=lambda: found.extend(judged("spin")))  # no signals outside the main thread
    thread.start()
    thread.join()
    assert found[-1].masked
    assert sum(v.score for v in found) == 19
    with pytest.raises(RewardError, match="3 of 20"):
        load_reward(mine).judge([rollout("fine")] * 17 + [rollout("nan")] * 3)
    began = time.monotonic()
    with pytest.raises(RewardError, match="did not come back"):
        load_reward(mine, limit=0.5).judge([rollout("sleep")] * 40)
    assert time.monotonic() - began < 5  # a reward that always hangs is found out soon


def test_an_answer_is_never_executed(tmp_path):
    """Some families' scorers evaluate what they are given: only literals and mathematics reach them."""
    from sppo.tasks.loading import load_tasks

    mark = tmp_path / "mark"
    for family in ("countdown", "spiral_matrix", "n_queens"):
        task = load_tasks(f"gym:{family}")[0]
        good = str(task.columns["answer"])
        evil = [f"__import__('os').system('touch {mark}') or 5", f"[open('{mark}', 'w')]", "().__class__"]
        with_reward = load_reward("gym")
        verdicts = with_reward.judge(
            [Rollout.answer(task, [], [], [], "stop", f"Answer: {text}") for text in (good, *evil)]
        )
        with_reward.close()
        assert verdicts[0].score == 1.0, (family, good)
        assert [v.score for v in verdicts[1:]] == [0.0, 0.0, 0.0]
    assert not mark.exists()
    task = load_tasks("gym:polynomial_multiplication")[
        0
    ]  # depends on the process's hash seed: masked, never a silent 0
    with_reward = load_reward("gym")
    verdict = with_reward.judge([Rollout.answer(task, [], [], [], "stop", f"Answer: {task.columns['answer']}")])[0]
    with_reward.close()
    assert verdict.score == 1.0 or "another process" in verdict.evidence["reason"]
