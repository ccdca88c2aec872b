"""Learning curves into numbers: costs to a target, equal budgets, intervals, pairs; by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sppo.cli.main import main
from sppo.evaluation.compare import (  # fmt: skip
    Curve,
    area_under,
    collapsed,
    compare,
    cost_to,
    mean_interval,
    median_interval,
    ratio_interval,
    students_t,
    value_at,
)
from sppo.report.curves import table


def test_cost_to_a_target_is_read_between_evaluations():
    cost, accuracy = [0.0, 10.0, 20.0], [0.4, 0.6, 0.5]
    assert cost_to(cost, accuracy, 0.5) == pytest.approx(5.0)
    assert cost_to(cost, accuracy, 0.4) == 0.0
    assert cost_to(cost, accuracy, 0.61) == math.inf


def test_values_and_areas_by_hand():
    cost, accuracy = [0.0, 10.0, 20.0], [0.4, 0.6, 1.0]
    assert value_at(cost, accuracy, 15.0) == pytest.approx(0.8)
    # 10 at a mean of 0.5, 5 at a mean of 0.7
    assert area_under(cost, accuracy, 15.0) == pytest.approx((5.0 + 3.5) / 15)
    assert area_under([0.0], [0.4], 0.0) == pytest.approx(0.4)


def test_collapse():
    assert collapsed([0.4, 0.9, 0.3])
    assert collapsed([0.1, 0.9, 0.4])
    assert not collapsed([0.4, 0.9, 0.5])
    assert not collapsed([0.4, 0.38])
    assert not collapsed([0.4])


@pytest.mark.parametrize("seeds", [2, 5, 30])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds):
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(4000, seeds))
    found = [mean_interval(list(x)) for x in drawn]
    hits = sum(f["low"] <= 0 <= f["high"] for f in found) / len(drawn)
    assert 0.938 <= hits <= 0.962  # three standard errors around 95%
    found = [median_interval(list(x)) for x in drawn]
    hits = sum(f["low"] <= 0 <= f["high"] for f in found) / len(drawn)
    assert hits >= {2: 0.47, 5: 0.925, 30: 0.94}[seeds]


def test_intervals_by_hand():
    assert mean_interval([3.0]) == {"value": 3.0, "low": None, "high": None}
    assert mean_interval([1.0, 3.0])["low"] == pytest.approx(2 - 12.706)
    assert ratio_interval([1.0, 4.0])["value"] == pytest.approx(2.0)
    assert median_interval([1.0, 2.0, math.inf]) == {"value": 2.0, "low": 1.0, "high": None}
    assert median_interval([3.0]) == {"value": 3.0, "low": None, "high": None}
    assert median_interval(range(9)) == {"value": 4, "low": 1, "high": 7}  # 96%; the inner ones hold it in 82%
    assert students_t(21) == pytest.approx(2.080, abs=0.01)
    assert students_t(60) == pytest.approx(2.000, abs=0.002)


def test_a_failed_run_never_reached_the_target_and_the_first_one_named_stays_first():
    found = compare({"a": {1: None, 2: a_curve(0.4, 0.8)}, "b": {1: a_curve(0.4, 0.8), 2: a_curve(0.4, 0.5)}}, 0.6)
    a, b = found["algorithms"]["a"], found["algorithms"]["b"]
    assert (a["failed"], a["reached"], a["seeds"]) == (1, 1, [2])
    assert a["tokens_to_target"]["value"] is None
    assert b["against"]["a"]["tokens_ratio_missed"] == [1, 0]
    found_none = compare(
        {"a": {1: a_curve(0.4, 0.8)}, "b": {1: None}}, 0.6
    )  # one that always fails is in the table too
    assert ["b", "0 of 1", "–", "–", "0", "1"] in cells(table(found_none))
    assert ["b", "–", "–", "–"] in cells(table(found_none))
    shown = cells(table(found))
    assert ["a", "1 of 2", "– [0.05k, –]", "– [5, –]", "0", "1"] in shown
    assert ["b", "–", "–", "0 of 1", "1–0", "-0.300"] in shown


def a_curve(*accuracy, tokens=100.0, seconds=10.0, **ends):
    n = range(len(accuracy))
    return Curve([tokens * i for i in n], [seconds * i for i in n], accuracy, {"ess": 0.5}, ends)


def cells(text):
    """The rows of Markdown tables, without what makes their columns line up."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line]


def test_what_is_reported_beside_accuracy_is_in_the_table_where_it_is_known():
    curves = {
        "a": {1: a_curve(0.4, 0.8, **{"entropy": 0.2, "pass@2": 0.8, "pass@4": 0.9}), 2: a_curve(0.4, 0.8, **{"entropy": 0.4, "pass@4": None})},
        "b": {1: a_curve(0.4, 0.6, **{"entropy": None, "pass@4": 0.7})},
    }  # fmt: skip
    curves["a"][1].means["mean_advantage"] = 0.125
    found = compare(curves, 0.6)
    assert found["algorithms"]["a"]["entropy"]["value"] == pytest.approx(0.3)
    assert found["algorithms"]["a"]["entropy"]["low"] == pytest.approx(0.3 - 12.706 * 0.1)
    assert found["algorithms"]["a"]["mean_advantage"] == 0.125
    assert found["algorithms"]["b"]["pass@4"] == {"value": 0.7, "low": None, "high": None}
    assert "entropy" not in found["algorithms"]["b"]
    shown = cells(table(found))
    assert ["algorithm", "accuracy at 0.10k tokens", "mean on the way", "mean Â", "entropy", "pass@4"] in shown
    assert [row[3:] for row in shown if len(row) == 6 and row[0] in "ab" and row[3] in ("+0.125", "–")] == [
        ["+0.125", "0.300", "0.900"], ["–", "–", "0.700"]]  # fmt: skip
    json.dumps(found, allow_nan=False)
    assert len(cells(table(compare({"a": {1: a_curve(0.4, 0.8)}}, 0.6)))[3]) == 4  # nothing beside is known


def test_a_comparison_by_hand():
    curves = {
        "a": {1: a_curve(0.4, 0.6, 0.8), 2: a_curve(0.4, 0.8, 0.9)},
        "b": {1: a_curve(0.4, 0.5, 0.6), 2: a_curve(0.4, 0.5, 0.5)},
    }
    found = compare(curves, 0.6)
    a, b = found["algorithms"]["a"], found["algorithms"]["b"]
    assert found["equal_tokens"] == 200.0
    assert (a["reached"], b["reached"]) == (2, 1)
    assert a["tokens_to_target"]["value"] == pytest.approx(100.0)  # 100 and 50: the upper of the middle two
    assert b["tokens_to_target"]["value"] is None  # 200 and never
    assert a["final_accuracy"]["value"] == pytest.approx(0.85)
    assert b["ess"] == 0.5
    against = b["against"]["a"]
    assert against["tokens_ratio"]["value"] == pytest.approx(2.0)  # seed 1 alone: 200 against 100
    assert against["tokens_ratio_pairs"] == 1
    assert against["accuracy_difference"]["value"] == pytest.approx(-0.3)
    assert b["per_seed"]["2"]["tokens_to_target"] is None


SMALL = [
    "recipes/quickstart.toml", "--policy.model", "tiny:hidden=32,layers=1,heads=2", "--critic.model", "tiny:hidden=32,layers=1,heads=2",
    "--steps", "2", "--bootstrap.steps", "5", "--evaluation.n", "16", "--evaluation.every", "1", "--rollout.prompts", "16",
    "--training.lr", "1e-3", "--seeds", "2",
]  # fmt: skip


def test_the_command_pairs_seeds_resumes_and_refuses_other_recipes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = [
        "compare",
        *SMALL,
        "--algorithms",
        "sppo,grpo:rollout.samples=4,training.lr=2e-3",
        "--out",
        str(tmp_path / "c"),
        "--json",
    ]
    assert main(command) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.strip().splitlines()[-1])
    assert list(result["algorithms"]) == ["sppo", "grpo:rollout.samples=4,training.lr=2e-3"]
    for numbers in result["algorithms"].values():
        assert numbers["seeds"] == [1, 2]
        for key in ("time_to_target", "tokens_to_target", "final_accuracy"):
            assert {"value", "low", "high"} <= numbers[key].keys()
        assert numbers["gradient_variance"] is not None
    starts = {
        json.loads((tmp_path / "c" / folder / "seed-1" / "summary.json").read_text())["accuracy_before"]
        for folder in ("sppo", "grpo-rollout.samples=4-training.lr=2e-3")
    }
    assert len(starts) == 1  # the same start
    assert "<svg" in (tmp_path / "c" / "curves.svg").read_text()
    shown = cells((tmp_path / "c" / "comparison.md").read_text())
    assert next(row for row in shown if "mean Â" in row)[3:] == ["mean Â", "entropy"]
    ends = next(row for row in shown if row[0] == "sppo" and len(row) == 5)
    assert -1 < float(ends[3]) < 1
    assert float(ends[4]) > 0
    recipe = (tmp_path / "c" / "grpo-rollout.samples=4-training.lr=2e-3" / "seed-2" / "recipe.toml").read_text()
    assert "samples = 4" in recipe
    assert "prompts = 4" in recipe  # as many responses a step

    stamp = (tmp_path / "c" / "sppo" / "seed-1" / "summary.json").stat().st_mtime_ns
    assert main([*command, "--target", "0.01"]) == 0  # nothing is run again
    assert (tmp_path / "c" / "sppo" / "seed-1" / "summary.json").stat().st_mtime_ns == stamp
    again = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert again["target"] == 0.01
    assert again["target_was"] == "given when there were results already"
    assert main([*command, "--training.critic_lr", "1e-2"]) == 2
    assert "training.critic_lr is 0.001 there and 0.01 now" in capsys.readouterr().err
    assert main([*command, "--bootstrap.steps", "3"]) == 2  # another start is another comparison
    assert "bootstrap.steps is 5 there and 3 now" in capsys.readouterr().err


def test_a_run_or_what_cannot_be_made_is_no_place_for_a_comparison(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text("")
    for out, sentence in ((str(tmp_path), "is a run or a file"), ("/proc/x", "cannot be written")):
        assert main(["compare", "recipes/quickstart.toml", "--out", out]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["train", "recipes/quickstart.toml", "--out", "/proc/x"]) == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["recipes/quickstart.toml", "--algorithms", "gppo"], "'gppo' is unknown: did you mean"),
        (["recipes/quickstart.toml", "--algorithms", "grpo:rollout.sample=3"], "did you mean 'samples'"),
        (["recipes/quickstart.toml", "--seeds", "0"], "--seeds and --jobs must be 1 or more"),
        (["recipes/quickstart.toml", "--target", "85"], "--target must lie between 0 and 1"),
        (["recipes/quickstart.toml", "--run.threads", "1"], "--jobs decides it"),
        (["recipes/quickstart.toml", "--algorithms", ""], "--algorithms names none"),
        (["recipes/quickstart.toml", "--algorithms", "sppo,sppo:seed=7"], "seed is the same for all runs of a comparison"),
        (["recipes/quickstart.toml", "--algorithms", "sppo:policy.model=x"], "policy.model is the same for all runs"),
        (["recipes/quickstart.toml", "--algorithms", "sppo:foo"], "'foo' is not key=value"),
        (["recipes/quickstart.toml", "--algorithms", "sppo:training.lr=1e-3,sppo:training.lr=0.001"], "is there twice"),
        ([], "give a recipe"),
        (["recipes/nothing.toml"], "no recipe at"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, sentence, capsys, tmp_path):
    assert main(["compare", *arguments, "--out", str(tmp_path / "c")]) == 2
    assert sentence in capsys.readouterr().err
