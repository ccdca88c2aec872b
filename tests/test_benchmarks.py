"""What the evidence's scripts compute, on numbers whose answer is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_critic_that_knows_the_rates_reaches_its_ceiling():
    generator = torch.Generator().manual_seed(0)
    rate_B = torch.rand(400, generator=generator)
    reward_BN = (torch.rand(400, 64, generator=generator) < rate_B[:, None]).float()
    found = script("critic_quality").figures(reward_BN, rate_B)
    assert found["share_of_ceiling"] == pytest.approx(1.0, abs=0.02)
    assert found["brier"] == pytest.approx(found["brier_unavoidable"], rel=0.02)
    assert found["pearson_without_noise"] == pytest.approx(1.0, abs=0.01)
    assert found["auc"] == pytest.approx(found["auc_ceiling"], abs=0.02)
    assert found["ece"] < 0.02


def test_a_critic_that_knows_nothing_and_one_that_is_too_sure():
    generator = torch.Generator().manual_seed(0)
    rate_B = torch.rand(400, generator=generator) * 0.5 + 0.25
    reward_BN = (torch.rand(400, 64, generator=generator) < rate_B[:, None]).float()
    quality = script("critic_quality")
    constant = quality.figures(reward_BN, torch.full((400,), 0.5))
    assert constant["explained_variance"] == pytest.approx(0.0)
    assert constant["pearson"] is None
    sure = quality.figures(reward_BN, ((rate_B - 0.5) * 3 + 0.5).clamp(0, 1))
    assert sure["ece"] > 0.1
    assert sure["auc"] == pytest.approx(sure["auc_ceiling"], abs=0.02)  # it ranks as well as can be
    intervals = quality.intervals(reward_BN[:50], rate_B[:50], quality.figures)
    assert all(
        x["low"] <= x["value"] <= x["high"] for x in (intervals["brier"], intervals["auc"], intervals["mean_reward"])
    )


def test_a_stall_of_the_machine_is_not_the_runs_pace():
    curve = {"seconds": [0.0, 2.0, 4.0, 44.0, 46.0], "tokens": [0.0, 10.0, 20.0, 30.0, 40.0], "accuracy": [0.1] * 5}
    assert script("grpo_trainer").pace(curve) == pytest.approx(0.2)
