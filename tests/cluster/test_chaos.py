"""A run on a cluster ends as an undisturbed one does, whichever of its processes is killed or stopped (benchmarks/chaos.py does it ten times each)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")


def loaded() -> Any:
    """The module of the benchmark, which is no package."""
    place = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
    spec = importlib.util.spec_from_file_location("chaos", place)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["chaos"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = loaded()
LESS = {
    "steps": 3,
    "bootstrap.steps": 2,
    "evaluation.n": 8,
    "run.checkpoint_every": 1,
    "cluster.rollouts": 1,
    "cluster.timeout": 8,
}


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An undisturbed run, which all others are compared with."""
    return benchmark.Chaos(tmp_path_factory.mktemp("chaos"), LESS, seed=3)


@pytest.mark.parametrize("kinds", [("worker", "rank", "verifier"), ("stop-worker", "driver")], ids=" ".join)
def test_whatever_is_struck_the_run_ends_the_same(chaos: Any, kinds: tuple[str, ...]) -> None:
    """Of each kind one, at a random moment: SIGKILL; SIGSTOP of a worker; what was begun by a killed driver is resumed. Nothing is left running."""
    _, ends, wrong = chaos.round(*kinds)
    assert not wrong, ends[-1].said
    assert ends[0].struck, "nothing was struck in time"


def test_a_difference_is_seen() -> None:
    row = {"task_id": "a", "sample": 0, "response_ids": [1, 2]}
    one = {"policy": "x", "steps": {"step-000000": [row], "step-000001": [row]}}
    assert benchmark.differences(one, one) == []
    assert benchmark.differences(one, {"policy": "y", "steps": {"step-000000": [row, row]}}) == [
        "another policy_sha256", "other rollouts in step-000000", "other rollouts in step-000001",
    ]  # fmt: skip
