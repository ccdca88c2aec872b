"""Mixtures: sums, conjunctions, gates; what reaches the critic; what masks."""

from __future__ import annotations

import pytest

from sppo.errors import RecipeError, RewardError
from sppo.rewards.base import load_reward
from sppo.rewards.combine import MixedReward, Part, parse_mixture
from sppo.types import Outcome, Rollout, Task, Verdict


class Fixed:
    def __init__(self, score: float, outcome: Outcome | None = None) -> None:
        self.verdict = Verdict(score, outcome or ("correct" if score >= 0.5 else "wrong"))

    def judge(self, rollouts):
        return [self.verdict for _ in rollouts]

    def check(self, task):
        return None

    def close(self):
        return None


ROLLOUT = Rollout(Task("t", "p", {"answer": "4"}), [], [], [], "stop", "Answer: 4")


def mixed(*parts: tuple[str, float, float]) -> Verdict:
    return MixedReward([Part("x", Fixed(score), role, weight) for role, weight, score in parts]).judge([ROLLOUT])[0]


@pytest.mark.parametrize(
    ("parts", "score", "correct", "outcome"),
    [
        ([("+", 1, 1.0), ("+", 0.25, 0.0)], 0.8, 1.0, "correct"),
        ([("+", 1, 0.0), ("+", 1, 1.0)], 0.5, 0.0, "wrong"),
        ([("+", 1, 1.0), ("and", 1, 1.0)], 1.0, 1.0, "correct"),
        ([("+", 1, 1.0), ("and", 1, 0.0)], 0.0, 0.0, "wrong"),
        ([("+", 1, 0.0), ("and", 1, 1.0)], 0.0, 0.0, "wrong"),
        ([("+", 1, 1.0), ("gate", 1, 0.0)], 0.0, 1.0, "correct"),  # a gate is no correctness
        ([("+", 1, 1.0), ("gate", 1, 1.0), ("+", 1, 0.5)], 0.75, 1.0, "correct"),
    ],
)
def test_by_hand(parts, score, correct, outcome) -> None:
    verdict = mixed(*parts)
    assert (verdict.score, verdict.correct, verdict.outcome) == (pytest.approx(score), correct, outcome)


def test_a_part_that_cannot_grade_masks_and_keeps_every_parts_value() -> None:
    reward = MixedReward([Part("a", Fixed(1.0)), Part("b", Fixed(0.0, "infra_error"))])
    verdict = reward.judge([ROLLOUT])[0]
    assert (verdict.outcome, verdict.masked) == ("infra_error", True)
    assert [p["score"] for p in verdict.evidence["parts"]] == [1.0, 0.0]


def test_the_sentence() -> None:
    use = "code:partial=true + 0.2 * mine:style gate answer:extract=boxed and gym"
    assert parse_mixture(use) == [
        ("+", 1.0, "code:partial=true"),
        ("+", 0.2, "mine:style"),
        ("gate", 1.0, "answer:extract=boxed"),
        ("and", 1.0, "gym"),
    ]
    for bad, why in (
        ("a and 2 * b", "only a part of a sum"),
        ("0 * a + 0 * b", "above 0"),
        ("a + 1.2.3 * b", "number"),
        ("math gate", "math gate"),
        ("and math", "and math"),
        ("code + x * y", "is not a reward"),
    ):
        with pytest.raises(RecipeError, match=why):
            parse_mixture(bad)
    verdict = load_reward("answer + 1 * answer:mode=exact").judge([ROLLOUT])[0]
    assert (verdict.score, len(verdict.evidence["parts"])) == (1.0, 2)


def test_a_part_that_cannot_grade_says_why_and_one_that_pays_nothing_masks_nothing():
    def leaves(prompts, completions):
        raise SystemExit(3)

    def none(prompts, completions):
        return [None] * len(completions)

    def right(prompts, completions):
        return [1.0] * len(completions)

    rollout = Rollout(Task("t", "?", {}), [], [], [], "stop", "x")
    with pytest.raises(RewardError, match="SystemExit"):
        load_reward(leaves).judge([rollout])
    parts = [Part("right", load_reward(right)), Part("none", load_reward(none), "+", 0.5)]
    verdict = MixedReward(parts).judge([rollout])[0]
    assert verdict.masked
    assert "returned None" in verdict.evidence["reason"]
    verdict = MixedReward([parts[0], Part("none", load_reward(none), "+", 0.0)]).judge([rollout])[0]
    assert (verdict.masked, verdict.score) == (False, 1.0)
