"""Every recipe is valid, and those of exploration and credit train: two steps each, with smaller models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sppo.cli.main import main
from sppo.recipe.config import Config

SMALLER = [
    "--policy.model", "tiny:hidden=32,layers=1,heads=2", "--critic.model", "tiny:hidden=32,layers=1,heads=2", "--bootstrap.steps", "30",
    "--bootstrap.until", "0.9", "--rollout.prompts", "12", "--training.steps", "2", "--evaluation.n", "64", "--quiet",
]  # fmt: skip


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid(recipe):
    Config.load(recipe)


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("staged", "curriculum/stage"), ("predicted", "curriculum/weight_max"), ("search", "search/tokens"),
        ("hybrid", "hybrid/eta"), ("steps", "reward/step_mean"),
    ],
)  # fmt: skip
def test_what_explores_trains(name, metric, tmp_path):
    assert main(["train", f"recipes/{name}.toml", "--out", str(tmp_path / "run"), *SMALLER]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(metric in line for line in lines)
