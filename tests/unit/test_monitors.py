"""Each monitor on rollouts that it must object to, and on honest ones that it must leave alone."""

from __future__ import annotations

import json

import pytest

from sppo.audit.monitors import Monitors, other_script, reads_reference, reference_of, repetition
from sppo.audit.work import cut_at, without_work
from sppo.rewards.base import load_reward
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.sections import MonitorsSection
from sppo.types import Rollout, Task, Verdict

from ..conftest import small_policy

HEDGE = ";".join(f"A:{d}" for d in range(10))


def any_mark(prompts, completions, answer):
    """A verifier with a hole: any marked answer counts."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(f"A:{a}" in text) for text, a in zip(texts, answer, strict=True)]


def _rollouts(reward, texts, answers):
    made = [
        Rollout(Task(f"t/{i}", "1+1?", {"answer": a}), [1], list(range(len(t))), [0.0] * len(t), "stop", t)
        for i, (t, a) in enumerate(zip(texts, answers, strict=True))
    ]
    return [r.judged(v) for r, v in zip(made, reward.judge(made), strict=True)]


def _step(reward, hedged: int, n: int = 32):
    answers = [str(i % 10) for i in range(n)]
    return _rollouts(reward, [HEDGE if i < hedged else f"1+1={a};A:{a}" for i, a in enumerate(answers)], answers)


def _monitors(reward, **changes):
    return Monitors(MonitorsSection(**changes), reward, 1, 60.0)


def _alerts(monitors):
    return {a.monitor: a for a in monitors.fetch()}


def test_a_hole_in_the_verifier_is_found_and_shown():
    reward = load_reward(any_mark)
    monitors = _monitors(reward)
    for step in range(5):
        monitors.inspect(step, _step(reward, 0))
    assert not monitors.alerts
    for step in range(5, 15):
        _, metrics = monitors.inspect(step, _step(reward, 10))
    assert metrics["monitor/reference"] > 0.1
    alert = _alerts(monitors)["reference"]
    assert 5 <= alert.since <= alert.step <= 10
    assert all(int(i.split(":")[1]) < 10 for i in alert.evidence)
    assert "whatever the reference says" in alert.what
    json.dumps(alert.as_dict())


def test_an_honest_verifier_raises_nothing():
    reward = load_reward("answer")
    monitors = _monitors(reward)
    for step in range(40):
        _, metrics = monitors.inspect(step, _step(reward, 10))
        monitors.look(step, _step(reward, 10), {"reward/correct": 0.7, "policy/entropy": 0.1, "advantage/std": 0.4})
        assert metrics.get("monitor/reference", 0.0) == 0.0
    assert not monitors.alerts


def test_quarantine_masks_the_responses_and_nothing_else():
    reward = load_reward(any_mark)
    monitors = _monitors(reward, action="quarantine")
    for step in range(12):
        out, metrics = monitors.inspect(step, _step(reward, 10))
    masked = [i for i, r in enumerate(out) if r.verdict.masked]
    assert masked == list(range(10))
    assert all(out[i].verdict.evidence["quarantined"] == "reference" for i in masked)
    assert all(out[i].verdict.score == 1.0 for i in masked)  # what the verifier said stays on record
    assert metrics["monitor/quarantined"] == 10


def test_off_is_off():
    reward = load_reward(any_mark)
    monitors = _monitors(reward, action="off")
    assert not monitors.on
    assert monitors.inspect(0, _step(reward, 10))[1] == {}


def test_a_second_verifier_is_heard():
    reward = load_reward(any_mark)
    monitors = _monitors(reward, sample=16, second="answer:extract=marked")
    for step in range(30):
        monitors.inspect(step, _step(reward, 0 if step < 15 else 20))
    alert = _alerts(monitors)["second"]
    assert 14 <= alert.since <= alert.step <= 22


def test_programs_written_for_the_visible_tests():
    def step(bad: int):
        rates = [0.0 if i < bad else 1.0 for i in range(20)]
        return [
            Rollout(Task(f"{i}", "p"), [1], [2], [0.0], "stop", "x",
                    verdict=Verdict(h, "correct" if h else "wrong", {"measures": {"visible_pass_rate": 1.0, "hidden_pass_rate": h}}))
            for i, h in enumerate(rates)
        ]  # fmt: skip

    monitors = _monitors(load_reward("code"))
    for s in range(15):
        monitors.inspect(s, step(2))
    assert not monitors.alerts
    for s in range(15, 25):
        monitors.inspect(s, step(12))
    assert "hidden" in _alerts(monitors)


def test_which_rewards_read_a_reference():
    assert reads_reference(load_reward("answer + 0.2 * format:pattern=A"))
    assert not reads_reference(load_reward("format:pattern=A"))
    assert reads_reference(load_reward("format:pattern=A and answer"))
    assert reference_of(Task("", "p", {"tests": ["assert f(1) == 1"]})) == "['assert f(1) == 1']"
    assert reference_of(Task("", "p")) is None


def test_a_reward_that_cannot_judge_other_pairs_is_left_alone():
    def only_its_own(prompts, completions, answer):
        if any(not c.endswith(a) for c, a in zip(completions, answer, strict=True)):
            raise ValueError("another's")
        return [1.0] * len(answer)

    reward = load_reward(only_its_own)
    monitors = _monitors(reward)
    answers = [str(i % 10) for i in range(20)]
    step = _rollouts(reward, [f"A:{a}" for a in answers], answers)
    assert monitors.inspect(0, step)[1] == {}
    assert monitors.inspect(1, step)[1] == {}


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("timeout", {"outcome": "timeout"}), ("unparseable", {"outcome": "unparseable"}), ("infra_error", {"outcome": "infra_error"}),
        ("length_wrong", {"ids": list(range(200))}), ("repetition_wrong", {"ids": [1, 2, 3, 4] * 5}), ("script_wrong", {"text": "这是错误的"}),
    ],
)  # fmt: skip
def test_what_steps_tell(what, change):
    def step(changed: bool):
        c = change if changed else {}
        ids = c.get("ids", list(range(20)))
        wrong = [
            Rollout(
                Task(f"{i}", "p"),
                [1],
                ids,
                [0.0] * len(ids),
                "stop",
                c.get("text", "no"),
                verdict=Verdict(0.0, c.get("outcome", "wrong")),
            )
            for i in range(10)
        ]
        right = [
            Rollout(
                Task(f"r{i}", "p"), [1], list(range(20)), [0.0] * 20, "stop", "yes", verdict=Verdict(1.0, "correct")
            )
            for i in range(10)
        ]
        return wrong + right

    monitors = _monitors(load_reward("answer"))
    metrics = {"reward/correct": 0.5, "policy/entropy": 0.1, "advantage/std": 0.5}
    for s in range(30):
        monitors.look(s, step(False), metrics)
    assert not monitors.alerts
    for s in range(30, 50):
        monitors.look(s, step(True), metrics)
    alerts = _alerts(monitors)
    assert what in alerts
    assert 25 <= alerts[what].since <= alerts[what].step <= 45
    assert alerts[what].evidence


def test_length_that_pays_is_no_alarm():
    monitors = _monitors(load_reward("answer"))
    for s in range(60):
        n = 20 + 4 * s
        rows = [
            Rollout(Task(f"{i}", "p"), [1], list(range(n)), [0.0] * n, "stop", "no", verdict=Verdict(0.0, "wrong"))
            for i in range(10)
        ]
        monitors.look(s, rows, {"reward/correct": 0.3 + 0.01 * s, "policy/entropy": 0.1, "advantage/std": 0.5})
    assert not monitors.alerts


@pytest.mark.parametrize(
    ("name", "after"), [("entropy", {"policy/entropy": 0.001}), ("advantage", {"advantage/std": 0.0})]
)
def test_collapse(name, after):
    monitors = _monitors(load_reward("answer"))
    fine = {"reward/correct": 0.4, "policy/entropy": 0.3, "advantage/std": 0.5}
    for s in range(20):
        monitors.look(s, [], fine)
    assert not monitors.alerts
    for s in range(20, 60):
        monitors.look(s, [], fine | after)
    assert name in _alerts(monitors)
    solved = _monitors(load_reward("answer"))
    for s in range(60):
        solved.look(s, [], fine | ({} if s < 20 else after | {"reward/correct": 0.98}))
    assert not solved.alerts


def test_the_state_comes_back():
    reward = load_reward(any_mark)
    one, two = _monitors(reward), _monitors(reward)
    metrics = {"reward/correct": 0.5, "policy/entropy": 0.1, "advantage/std": 0.5}
    for s in range(3):
        one.inspect(s, _step(reward, 3))
        one.look(s, _step(reward, 3), metrics)
    two.load_state_dict(one.state_dict())
    for s in range(3, 12):
        for m in (one, two):
            m.inspect(s, _step(reward, 6))
            m.look(s, _step(reward, 6), metrics)
    assert one.state_dict() == two.state_dict()
    assert [a.as_dict() for a in one.fetch()] == [a.as_dict() for a in two.fetch()]


def test_text_numbers():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2] * 5) == pytest.approx(5 / 7)
    assert repetition([1]) == 0.0
    assert other_script("x² + α = 3 abc") == 0.0
    assert other_script("да") == 1.0
    assert other_script("12;3") == 0.0


def test_where_a_chain_can_be_cut():
    def right(text, extracted):
        return Rollout(
            Task("", "p"), [], [], [], "stop", text, verdict=Verdict(1.0, "correct", {"extracted": extracted})
        )

    boxed = "First, 2+2=4.\nThen 4*3=12.\nSo it is \\boxed{12}."
    assert cut_at(right(boxed, "12")) == (["First, 2+2=4.\n", "Then 4*3=12.\n"], "12", "So it is \\boxed{")
    assert cut_at(right("A:4", "4")) is None
    assert cut_at(right("4", None)) is None
    assert (
        cut_at(Rollout(Task("", "p"), [], [], [], "stop", "1;A:4", verdict=Verdict(0.0, "wrong", {"extracted": "4"})))
        is None
    )


def test_forced_answers_are_sampled_and_judged():
    """A reward that pays for the mark alone: cut or not, all stays right; and the alert says so."""
    policy = small_policy()

    def has_mark(prompts, completions, answer):
        return ["A:" in (c if isinstance(c, str) else c[0]["content"]) for c in completions]

    reward = load_reward(has_mark)
    rollouts = [
        Rollout(Task(f"{i}", "1+1?", {"answer": "2"}), policy.prompt_ids(Task("", "1+1?")), [1], [0.0], "stop", "1+1=2;2+0=2;A:2",
                verdict=Verdict(1.0, "correct", {"extracted": "2"}))
        for i in range(16)
    ]  # fmt: skip
    kept = without_work(LocalEngine(policy), policy, reward, rollouts, Sampling(12, 1.0), 1, 0)
    assert kept == {0.0: (16, 16), 0.25: (16, 16), 0.5: (16, 16)}
    monitors = _monitors(reward)
    assert monitors.work(3, kept)["monitor/right_with_0pct_of_work"] == 1.0
    assert "work" in _alerts(monitors)
    honest = without_work(
        LocalEngine(policy), policy, load_reward("answer:extract=whole"), rollouts, Sampling(12, 1.0), 1, 0
    )
    assert honest[0.0][0] == 0
