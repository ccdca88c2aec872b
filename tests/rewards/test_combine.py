"""Mixtures: sums, conjunctions, gates; what reaches the critic; what masks."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from sppo.errors import RecipeError, RewardError
from sppo.rewards.combine import MixedReward, Part, adds, parse_mixture
from sppo.rewards.loading import load_reward
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.types import Outcome, Rollout, Task, Verdict

from ..conftest import small_config


class Fixed:
    def __init__(self, score: float, outcome: Outcome | None = None) -> None:
        self.verdict = Verdict(score, outcome or ("correct" if score >= 0.5 else "wrong"))

    def judge(self, rollouts):
        return [self.verdict for _ in rollouts]

    def check(self, task):
        return None

    def close(self):
        return None


ROLLOUT = Rollout.answer(Task("t", "p", {"answer": "4"}), [], [], [], "stop", "Answer: 4")


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

    rollout = Rollout.answer(Task("t", "?", {}), [], [], [], "stop", "x")
    with pytest.raises(RewardError, match="SystemExit"):
        load_reward(leaves).judge([rollout])
    parts = [Part("right", load_reward(right)), Part("none", load_reward(none), "+", 0.5)]
    verdict = MixedReward(parts).judge([rollout])[0]
    assert verdict.masked
    assert "returned None" in verdict.evidence["reason"]
    verdict = MixedReward([parts[0], Part("none", load_reward(none), "+", 0.0)]).judge([rollout])[0]
    assert (verdict.masked, verdict.score) == (False, 1.0)


def test_what_is_added_fades_and_the_first_part_stays():
    reward = MixedReward([Part("x", Fixed(0.0)), Part("y", Fixed(1.0), "+", 1.0)])
    found = []
    for fade in (1.0, 0.5, 0.0):
        reward.fade = fade
        found.append(reward.judge([ROLLOUT])[0])
    assert [v.score for v in found] == pytest.approx([1 / 2, 1 / 3, 0.0])
    assert [v.correct for v in found] == [0.0] * 3
    assert [v.evidence.get("fade") for v in found] == [None, 0.5, 0.0]  # what replays a verdict must know it


def test_a_part_that_has_faded_masks_nothing():
    reward = MixedReward([Part("x", Fixed(1.0)), Part("y", Fixed(0.0, "infra_error"), "+", 1.0)])
    assert reward.judge([ROLLOUT])[0].masked
    reward.fade = 0.0
    assert not reward.judge([ROLLOUT])[0].masked
    assert not adds([Part("x", Fixed(1.0), "+", 0.0), Part("y", Fixed(1.0), "+", 1.0)])  # nothing would be left


def test_fading_in_a_run(tmp_path):
    use = "answer + 1 * steps:check=chain,split=semicolons"
    config = small_config(**{"reward.use": use, "reward.anneal": 2, "run.out": str(tmp_path / "run")})
    job = Run.new(config)
    train(job)
    job.close()
    fades = []
    for step in range(3):
        rows = pq.read_table(tmp_path / "run" / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
        fades.append({json.loads(row["evidence"]).get("fade") for row in rows})
    assert fades == [{None}, {0.5}, {0.0}]
    with pytest.raises(RecipeError, match="adds nothing"):
        Run.new(small_config(**{"reward.anneal": 2, "run.out": str(tmp_path / "none")}))
