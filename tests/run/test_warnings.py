"""What a user is told of a step: responses that were cut, rewards without contrast."""

from __future__ import annotations

import json

import pytest

from sppo.recipe.config import Config
from sppo.report.progress import ProgressDisplay, print_summary
from sppo.rollout.collect import truncation_rule
from sppo.run.build import Parts
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.tasks.base import ListSource
from sppo.tasks.loading import load_tasks
from sppo.types import Rollout, Task, Verdict

from ..conftest import SMALL, small_config


class Paid:
    """Pays every response the same."""

    def __init__(self, score: float = 1.0) -> None:
        self.score = score

    def judge(self, rollouts):
        return [Verdict(self.score, "correct" if self.score >= 0.5 else "wrong") for _ in rollouts]

    def check(self, task):
        return None

    def close(self):
        pass


def trained(tmp_path, capsys, reward, **changes):
    """What was said on the way, the summary, and the metrics of each step."""
    source = load_tasks("chain:steps=1")
    problems = ListSource([source[i] for i in range(32)])
    config = small_config(
        run__out=str(tmp_path / "run"), rollout__max_tokens=2, training__steps=2, monitors__action="off", policy__model=SMALL, **changes
    )  # fmt: skip
    job = Run.new(config, ProgressDisplay(), Parts(reward=reward, train=problems, evaluation=problems))
    try:
        summary = train(job)
    finally:
        job.close()
    print_summary(summary, config.run.out)
    said = capsys.readouterr()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return " ".join((said.err + said.out).split()), summary, [json.loads(line) for line in lines]


def test_the_rules_for_a_response_that_was_cut():
    cut = Rollout.answer(Task("t", "q"), [1], [2], [0.0], "length", "x")
    paid = Verdict(0.75, "correct")
    assert truncation_rule(cut, paid, "keep") is paid
    assert truncation_rule(cut, paid, "mask").masked
    ruled = truncation_rule(cut, paid, "penalise")
    assert (ruled.score, ruled.outcome, ruled.evidence["paid_before_cut"]) == (0.0, "wrong", 0.75)
    assert "paid_before_cut" not in truncation_rule(cut, Verdict(0.0, "wrong"), "penalise").evidence


@pytest.mark.parametrize(("rule", "fate"), [("penalise", "count as wrong"), ("mask", "count as wrong")])
def test_a_cut_that_overrules_the_reward_is_said_before_anything_is_trained(tmp_path, capsys, rule, fate):
    said, summary, metrics = trained(tmp_path, capsys, Paid(), rollout__truncated=rule)
    warning = f"of the held-out responses were cut at rollout.max_tokens = 2 and {fate}"
    assert warning in said
    assert said.index(warning) < said.index("train 1/2")
    assert "although the reward would have paid them" in said
    assert "cut at rollout.max_tokens" in said[said.index("train 1/2") :]
    assert "cut off" in said[said.index("steps 2 in") :]
    assert summary["overruled"] == pytest.approx(sum(m["rollout/overruled"] for m in metrics) / 2)
    assert summary["overruled"] > 0.5


def test_kept_verdicts_stand_in_training_and_evaluation(tmp_path, capsys):
    said, summary, metrics = trained(tmp_path, capsys, Paid(), rollout__truncated="keep")
    assert summary["accuracy_before"] == 1.0
    assert summary["overruled"] == 0.0
    assert metrics[0]["reward/mean"] == 1.0
    assert metrics[0]["rollout/truncated"] > 0.5
    assert "were cut at" not in said


def test_rewards_without_contrast_are_told_by_what_the_baseline_makes_of_them(tmp_path, capsys):
    said, _, metrics = trained(tmp_path, capsys, Paid(0.0))
    assert metrics[0]["advantage/size"] > 0
    assert "every reward of this step is 0.00" in said
    assert "move the policy at random" in said
    assert metrics[0]["policy/kl_step"] > 0


def test_without_a_critic_equal_rewards_leave_no_gradient(tmp_path, capsys):
    said, _, metrics = trained(tmp_path, capsys, Paid(0.0), objective__algorithm="rloo")
    assert metrics[0]["advantage/size"] == 0.0
    assert "all advantages are 0, and the policy gets no gradient from them" in said
    assert (metrics[0]["policy/kl_step"] or 0.0) < 1e-9


def test_a_token_critic_says_that_its_own_values_are_all_that_is_left(tmp_path, capsys):
    same = {"critic__model": SMALL}
    said, _, _ = trained(tmp_path, capsys, Paid(0.0), objective__algorithm="ppo", **same)
    assert "follow the critic's values of tokens alone" in said


def test_keep_is_a_key_of_a_recipe():
    assert Config.load(None, {"rollout.truncated": "keep"}).rollout.truncated == "keep"
