"""Each monitor on rollouts that it must object to, and on honest ones that it must leave alone."""

from __future__ import annotations

import json

import pytest

from sppo.audit.monitors import Monitors
from sppo.audit.step_monitors import other_script, repetition
from sppo.audit.verdict_monitors import reads_reference, reference_of
from sppo.audit.work import cut_at, without_work
from sppo.recipe.sections import MonitorsSection
from sppo.rewards.loading import load_reward
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.types import Rollout, Task, Verdict

from ..conftest import small_policy

HEDGE = ";".join(f"A:{d}" for d in range(10))


def any_mark(prompts, completions, answer):
    """A verifier with a hole: any marked answer counts."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(f"A:{a}" in text) for text, a in zip(texts, answer, strict=True)]


def _rollouts(reward, texts, answers):
    made = [
        Rollout.answer(Task(f"t/{i}", "1+1?", {"answer": a}), [1], list(range(len(t))), [0.0] * len(t), "stop", t)
        for i, (t, a) in enumerate(zip(texts, answers, strict=True))
    ]
    return [r.judged(v) for r, v in zip(made, reward.judge(made), strict=True)]


def _step(reward, hedged: int, n: int = 32):
    answers = [str(i % 10) for i in range(n)]
    return _rollouts(reward, [HEDGE if i < hedged else f"1+1={a};A:{a}" for i, a in enumerate(answers)], answers)


def _monitors(reward, **changes):
    return Monitors(MonitorsSection(**changes), reward, 1, 60.0)


def _inspect(monitors, step, rollouts):
    return monitors.inspect(step, rollouts, len(rollouts))


def _alerts(monitors):
    return {a.monitor: a for a in monitors.fetch()[0]}


def test_a_hole_in_the_verifier_is_found_and_shown():
    reward = load_reward(any_mark)
    monitors = _monitors(reward)
    for step in range(5):
        _inspect(monitors, step, _step(reward, 0))
    assert not monitors.alerts
    for step in range(5, 15):
        _, metrics = _inspect(monitors, step, _step(reward, 10))
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
        _, metrics = _inspect(monitors, step, _step(reward, 10))
        monitors.look(step, _step(reward, 10), {"reward/correct": 0.7, "policy/entropy": 0.1, "advantage/std": 0.4})
        assert metrics.get("monitor/reference", 0.0) == 0.0
    assert not monitors.alerts


def test_quarantine_masks_the_responses_and_nothing_else():
    reward = load_reward(any_mark)
    monitors = _monitors(reward, action="quarantine")
    for step in range(12):
        out, metrics = _inspect(monitors, step, _step(reward, 10))
    masked = [i for i, r in enumerate(out) if r.verdict.masked]
    assert masked == list(range(10))
    assert all(out[i].verdict.evidence["quarantined"] == "reference" for i in masked)
    assert all(out[i].verdict.score == 1.0 for i in masked)  # what the verifier said stays on record
    assert metrics["monitor/quarantined"] == 10


def test_off_is_off():
    reward = load_reward(any_mark)
    monitors = _monitors(reward, action="off")
    assert not monitors.on
    assert _inspect(monitors, 0, _step(reward, 10))[1] == {}


def test_a_second_verifier_is_heard():
    reward = load_reward(any_mark)
    monitors = _monitors(reward, sample=16, second="answer:extract=marked")
    for step in range(30):
        _inspect(monitors, step, _step(reward, 0 if step < 15 else 20))
    alert = _alerts(monitors)["second"]
    assert 14 <= alert.since <= alert.step <= 22


def test_programs_written_for_the_visible_tests():
    def step(bad: int):
        rates = [0.0 if i < bad else 1.0 for i in range(20)]
        return [
            Rollout.answer(Task(f"{i}", "p"), [1], [2], [0.0], "stop", "x",
                    verdict=Verdict(h, "correct" if h else "wrong", {"measures": {"visible_pass_rate": 1.0, "hidden_pass_rate": h}}))
            for i, h in enumerate(rates)
        ]  # fmt: skip

    monitors = _monitors(load_reward("code"))
    for s in range(15):
        _inspect(monitors, s, step(2))
    assert not monitors.alerts
    for s in range(15, 25):
        _inspect(monitors, s, step(12))
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
    assert _inspect(monitors, 0, step)[1] == {}
    alerts, notes = monitors.fetch()
    assert not alerts
    assert "'reference' is off from now on" in notes[0]
    assert _inspect(monitors, 1, step)[1] == {}
    assert monitors.fetch() == ([], [])
    again = _monitors(reward)
    again.load_state_dict(monitors.state_dict())
    _inspect(again, 2, step)
    assert again.fetch() == ([], [])  # it stays off in a resumed run


def test_multiple_choice_by_the_options_text_is_no_hole():
    """Many problems share a letter; an honest `B` is right for a quarter of them."""
    reward = load_reward("answer:mode=choice")
    monitors = _monitors(reward)
    names = ["Paris", "Rome", "Oslo", "Bern", "Riga", "Lima", "Doha", "Baku"]
    for step in range(40):
        rollouts = []
        for i in range(32):
            options = [names[(i + k + step) % 8] for k in range(4)]
            letter = "ABCD"[i % 4]
            task = Task(f"{step}/{i}", "p", {"answer": options[i % 4], "choices": options})
            rollouts.append(Rollout.answer(task, [1], [2], [0.0], "stop", f"Answer: {letter}"))
        rollouts = [r.judged(v) for r, v in zip(rollouts, reward.judge(rollouts), strict=True)]
        assert all(r.verdict.outcome == "correct" for r in rollouts)
        _inspect(monitors, step, rollouts)
    assert not monitors.alerts


def test_partial_credit_for_form_is_no_hole():
    def half_for_form(prompts, completions, answer):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [0.5 * ("A:" in t) + 0.5 * t.endswith(a) for t, a in zip(texts, answer, strict=True)]

    reward = load_reward(half_for_form)
    monitors = _monitors(reward)
    for step in range(30):
        _inspect(monitors, step, _step(reward, 0))
    assert not monitors.alerts


def test_samples_of_one_problem_are_one_trial():
    """One bad row in eight, sixteen samples of each: that is how this data is, and no alarm in a hundred steps."""
    monitors = _monitors(load_reward("answer"))
    metrics = {"reward/correct": 0.5, "policy/entropy": 0.1, "advantage/std": 0.5}
    for step in range(100):
        bad = step % 12 == 0
        rows = [
            Rollout.answer(Task(f"{step}/{p}", "p"), [1], list(range(20)), [0.0] * 20, "stop", "x", k,
                    verdict=Verdict(0.0, "timeout" if bad and p == 0 else "wrong"))
            for p in range(8) for k in range(16)
        ]  # fmt: skip
        monitors.look(step, rows, metrics)
    assert not monitors.alerts


def test_a_rate_that_is_as_high_as_can_be_does_not_rise():
    monitors = _monitors(load_reward("answer"))
    rows = [
        Rollout.answer(Task(f"{i}", "p"), [1], [2], [0.0], "stop", "x", verdict=Verdict(0.0, "unparseable"))
        for i in range(64)
    ]
    for step in range(40):
        monitors.look(step, rows, {"reward/correct": 0.0, "policy/entropy": 0.1, "advantage/std": 0.5})
    assert not monitors.alerts


def test_what_is_not_paid_is_neither_objected_to_nor_masked():
    reward = load_reward("tests.audit.test_monitors:any_mark gate format:pattern=^1")
    monitors = _monitors(reward, action="quarantine")
    for step in range(12):
        _inspect(monitors, step, _step(reward, 10))  # hedges fail the gate
    assert not monitors.alerts
    hidden = _monitors(load_reward("code"), action="quarantine")
    hidden.raised["hidden"] = 0
    rows = [
        Rollout.answer(Task(f"{i}", "p"), [1], [2], [0.0], "stop", "x",
                verdict=Verdict(h, "correct" if h else "wrong", {"measures": {"visible_pass_rate": 1.0, "hidden_pass_rate": h}}))
        for i, h in enumerate([0.0, 1.0, 0.0])
    ]  # fmt: skip
    out, _ = _inspect(hidden, 1, rows)
    assert not any(r.verdict.masked for r in out)  # a 0 already teaches what it should


def test_lessons_of_a_search_are_refused_in_quarantine():
    reward = load_reward(any_mark)
    monitors = _monitors(reward, action="quarantine")
    assert monitors.refuses(_step(reward, 10)) == set()
    for step in range(12):
        _inspect(monitors, step, _step(reward, 10))
    assert monitors.refuses(_step(reward, 10)) == set(range(10))


def test_groups_that_were_thrown_away_count_and_are_no_evidence():
    reward = load_reward(any_mark)
    monitors = _monitors(reward)
    for step in range(12):
        monitors.inspect(step, _step(reward, 32), 5)
    alert = _alerts(monitors)["reference"]
    assert alert.evidence
    assert all(int(i.split(":")[1]) < 5 for i in alert.evidence)


def test_a_reward_of_ones_own_can_say_that_it_reads_no_reference():
    class Style:
        reference_free = True

        def judge(self, rollouts):
            return [Verdict(1.0, "correct") for _ in rollouts]

    def style(prompts, completions, **columns):
        return [1.0] * len(prompts)

    assert not reads_reference(load_reward(Style()))
    assert reads_reference(load_reward(style))
    style.reference_free = True
    assert not reads_reference(load_reward(style))


def test_stop_is_for_every_monitor():
    monitors = _monitors(load_reward("answer"), action="stop")
    for s in range(60):
        monitors.look(s, [], {"reward/correct": 0.4, "policy/entropy": 0.3 if s < 20 else 0.001, "advantage/std": 0.5})
    assert _alerts(monitors)["entropy"].action == "stop"


def test_drift_is_told_from_when_the_reward_last_rose():
    """Longer while better is the new usual; much longer after that is an alarm, though the reward is above where it began."""
    monitors = _monitors(load_reward("answer"))

    def look(s, n, reward):
        rows = [
            Rollout.answer(
                Task(f"{i}", "p"), [1], list(range(n)), [0.0] * n, "stop", "no", verdict=Verdict(0.0, "wrong")
            )
            for i in range(10)
        ]
        monitors.look(s, rows, {"reward/correct": reward, "policy/entropy": 0.1, "advantage/std": 0.5})

    for s in range(60):
        look(s, 20 + 2 * s, 0.2 + 0.01 * s)
    for s in range(60, 90):
        look(s, 138, 0.8)
    assert not monitors.alerts
    for s in range(90, 120):
        look(s, 900, 0.4)
    assert "length_wrong" in _alerts(monitors)


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
            Rollout.answer(
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
            Rollout.answer(
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
            Rollout.answer(
                Task(f"{i}", "p"), [1], list(range(n)), [0.0] * n, "stop", "no", verdict=Verdict(0.0, "wrong")
            )
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
        _inspect(one, s, _step(reward, 3))
        one.look(s, _step(reward, 3), metrics)
    two.load_state_dict(one.state_dict())
    for s in range(3, 12):
        for m in (one, two):
            _inspect(m, s, _step(reward, 6))
            m.look(s, _step(reward, 6), metrics)
    assert one.state_dict() == two.state_dict()
    assert [a.as_dict() for a in one.fetch()[0]] == [a.as_dict() for a in two.fetch()[0]]


def test_text_numbers():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2] * 5) == pytest.approx(5 / 7)
    assert repetition([1]) == 0.0
    assert other_script("x² + α = 3 abc") == 0.0
    assert other_script("да") == 1.0
    assert other_script("12;3") == 0.0


def test_where_a_chain_can_be_cut():
    def right(text, extracted):
        return Rollout.answer(
            Task("", "p"), [], [], [], "stop", text, verdict=Verdict(1.0, "correct", {"extracted": extracted})
        )

    boxed = "First, 2+2=4.\nThen 4*3=12.\nSo it is \\boxed{12}."
    assert cut_at(right(boxed, "12")) == (["First, 2+2=4.\n", "Then 4*3=12.\n"], "12", "So it is \\boxed{")
    assert cut_at(right("A:4", "4")) is None
    assert (
        cut_at(right("First 3*3=9.\nSo she makes 9*2 = 18 a day. The answer is 18", "18")) is None
    )  # the cue would give it away
    assert cut_at(right("4", None)) is None
    assert (
        cut_at(
            Rollout.answer(
                Task("", "p"), [], [], [], "stop", "1;A:4", verdict=Verdict(0.0, "wrong", {"extracted": "4"})
            )
        )
        is None
    )


def test_forced_answers_are_sampled_and_judged():
    """A reward that pays for the mark alone: cut or not, all stays right; and the alert says so."""
    policy = small_policy()

    def has_mark(prompts, completions, answer):
        return ["A:" in (c if isinstance(c, str) else c[0]["content"]) for c in completions]

    reward = load_reward(has_mark)
    rollouts = [
        Rollout.answer(Task(f"{i}", "1+1?", {"answer": "2"}), policy.prompt_ids(Task("", "1+1?")), [1], [0.0], "stop", "1+1=2;2+0=2;A:2",
                verdict=Verdict(1.0, "correct", {"extracted": "2"}))
        for i in range(16)
    ]  # fmt: skip
    assert len({r.task.id for r in rollouts}) == 16
    again = [*rollouts, *rollouts]  # further samples of the same problems tell nothing more
    assert without_work(LocalEngine(policy), policy, reward, again, Sampling(12, 1.0), 1, 0)[0.0] == (16, 16)
    short = without_work(LocalEngine(policy), policy, reward, rollouts, Sampling(6, 1.0), 1, 0)
    assert short == {0.0: (16, 16), 0.25: (16, 16)}  # half of the work would leave no room in a response of six tokens
    kept = without_work(LocalEngine(policy), policy, reward, rollouts, Sampling(12, 1.0), 1, 0)
    assert kept == {0.0: (16, 16), 0.25: (16, 16), 0.5: (16, 16)}
    monitors = _monitors(reward)
    assert monitors.work(3, kept)["monitor/right_with_0pct_of_work"] == 1.0
    assert "work" in _alerts(monitors)
    honest = without_work(
        LocalEngine(policy), policy, load_reward("answer:extract=whole"), rollouts, Sampling(12, 1.0), 1, 0
    )
    assert honest[0.0][0] == 0
