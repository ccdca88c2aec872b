"""Calibration by hand-worked numbers, and the confidence that a response states."""

from __future__ import annotations

import numpy as np
import pytest

from sppo.errors import RecipeError
from sppo.evaluation.calibration import calibration, reliability
from sppo.evaluation.evaluate import calibrations
from sppo.objective.diagnostics import expected_calibration_error
from sppo.rewards.confidence import stated_confidence
from sppo.rewards.loading import load_reward
from sppo.tasks.chain import build, check_steps
from sppo.types import Rollout, Task, Verdict

from ..conftest import small_critic


def test_by_hand():
    """Two bins, 0.2 (one of two right) and 0.9 (both right): ECE (2·0.3 + 2·0.1)/4, Brier (0.04 + 0.64 + 0.01 + 0.01)/4."""
    c = calibration([0, 1, 1, 1], [0.2, 0.2, 0.9, 0.9])
    assert c["ece"] == pytest.approx(0.2)
    assert c["brier"] == pytest.approx(0.175)
    assert c["auc"] == pytest.approx((2 + 0.5) / 3)  # one wrong below two right, and level with one
    assert c["selective_accuracy"]["0.5"] == 1.0
    assert c["selective_accuracy"]["0.8"] == pytest.approx(1 - (0.5 / 3))  # ties share their error
    assert c["aurc"] == pytest.approx((0 + 0 + 0.5 / 3 + 1 / 4) / 4)
    assert c["aurc_oracle"] == pytest.approx((0 + 0 + 0 + 1 / 4) / 4)
    assert [(b.predicted, b.observed, b.count) for b in reliability([0, 1, 1, 1], [0.2, 0.2, 0.9, 0.9])] == [
        (pytest.approx(0.2), 0.5, 2),
        (pytest.approx(0.9), 1.0, 2),
    ]


def test_the_two_ways_to_the_calibration_error_agree():
    import torch

    rng = np.random.default_rng(0)
    q = rng.random(500)
    c = (rng.random(500) < q**2).astype(float)
    ours = calibration(c, q)["ece"]
    assert ours == pytest.approx(expected_calibration_error(torch.tensor(c), torch.tensor(q)), abs=1e-9)


def test_ties_do_not_depend_on_the_order():
    kept = calibration([1, 0, 1, 0], [0.5] * 4)["selective_accuracy"]
    assert kept == calibration([0, 0, 1, 1], [0.5] * 4)["selective_accuracy"]
    assert set(kept.values()) == {0.5}


def test_nothing_and_one_kind_are_no_numbers():
    assert calibration([], [])["ece"] is None
    assert calibration([1, 1], [0.4, 0.6])["auc"] is None
    with pytest.raises(ValueError, match="as many"):
        calibration([1], [0.5, 0.5])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer: 4\nConfidence: 85%", 0.85), ("confidence is 0.3", 0.3), ("**Confidence:** 90", 0.9), ("Confidence = **75%**", 0.75),
        ("<confidence> .5 </confidence>", 0.5),
        ("<confidence>70%</confidence>", 0.7), ("3+4=7;C:07;A:7", 0.07), ("Confidence: 20%, no: Confidence: 60%", 0.6), ("confidence = 1", 1.0),
        ("Confidence: 250%", None), ("Confidence: 0,8", None), ("Confidence: 8/10", None), ("Confidence: 1000", None),
        ("with confidence, 5 apples", None), ("A:10 B:12 C:15 D:20 Answer: B", None), ("my confidence is 0.8.", 0.8),
        ("ABC:12", None), ("C:123", None), ("I am sure", None), ("", None),
    ],
)  # fmt: skip
def test_what_a_response_states(text, value):
    assert stated_confidence(text) == (None if value is None else pytest.approx(value))


def _rollout(text: str, answer: str = "4") -> Rollout:
    return Rollout.answer(Task("t", "1+3?", {"answer": answer}), [1], [2], [0.0], "stop", text)


def test_the_reward_is_rlcr_in_the_unit_interval():
    """R = c − (q − c)² for right and wrong answers, shifted by 1 and halved; correctness stays c."""
    reward = load_reward("answer:extract=marked + confidence")
    for text, c, q in (("C:80;A:4", 1, 0.8), ("C:80;A:5", 0, 0.8), ("C:10;A:5", 0, 0.1)):
        [v] = reward.judge([_rollout(text)])
        assert v.score == pytest.approx((c - (q - c) ** 2 + 1) / 2)
        assert v.correct == c
        assert v.evidence["measures"]["confidence_brier"] == pytest.approx((q - c) ** 2)
    [silent] = reward.judge([_rollout("A:4")])
    assert silent.score == 0.5
    assert silent.outcome == "correct"


def test_it_is_a_proper_score():
    """Of a problem solved with chance p, the mean reward is largest at q = p."""
    reward = load_reward("answer:extract=marked + confidence")
    qs = np.arange(100)
    right = np.array([v.score for v in reward.judge([_rollout(f"C:{q:02};A:4") for q in qs])])
    wrong = np.array([v.score for v in reward.judge([_rollout(f"C:{q:02};A:5") for q in qs])])
    for p in (0.05, 0.3, 0.5, 0.77):
        assert qs[np.argmax(p * right + (1 - p) * wrong)] == pytest.approx(100 * p)


@pytest.mark.parametrize(
    "use", ["confidence", "confidence + answer", "answer gate confidence", "answer and confidence", "0.5 * confidence"]
)
def test_out_of_its_place_it_says_where_it_belongs(use):
    with pytest.raises(RecipeError, match="write answer \\+ confidence"):
        load_reward(use)


def test_chains_that_state_a_confidence():
    source = build("2-3", confidence=True)
    task = source[0]
    assert stated_confidence(task.solution) is not None
    steps = task.solution.split(";")
    assert check_steps(task, steps) == [1.0] * (len(steps) - 2) + [None, 1.0]
    [v] = load_reward("answer:extract=marked").judge([Rollout.answer(task, [1], [2], [0.0], "stop", task.solution)])
    assert v.outcome == "correct"
    assert len({stated_confidence(source[i].solution) for i in range(50)}) > 20


def test_an_evaluation_tells_of_critic_and_model():
    tasks = [build("1")[i] for i in range(6)]
    rollouts = [
        Rollout.answer(t, [1], [2], [0.0], "stop", "C:90;A:1", verdict=Verdict(float(i % 2), "correct"))
        for i, t in enumerate(tasks)
    ]
    found = calibrations(rollouts, small_critic())
    assert found["critic"]["n"] == 6
    assert found["model"]["stated"] == 1.0
    assert found["model"]["ece"] == pytest.approx(0.4)
    assert "model" not in calibrations([r.judged(r.verdict) for r in rollouts[:0]], None)
