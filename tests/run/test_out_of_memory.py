"""When memory runs out during a run: one sentence that says what to turn, and a run that goes on from there."""

from __future__ import annotations

import json

import pytest
import torch

from sppo.cli.main import main
from sppo.memory import ran_out
from sppo.recipe.config import Config
from sppo.rollout.local import LocalEngine

from ..conftest import SMALL

RECIPE = [
    "--policy.model", SMALL, "--critic.model", "tiny:hidden=32,layers=1,heads=2", "--task.train", "chain:steps=1-2",
    "--rollout.prompts", "8", "--rollout.max_tokens", "8", "--training.steps", "3", "--evaluation.n", "8", "--evaluation.every", "0",
    "--monitors.action", "off", "--rollout.engine", "tests.run.test_out_of_memory:Starved", "--quiet", "--json",
]  # fmt: skip


class Starved(LocalEngine):
    """An engine for which the GPU's memory does after some calls."""

    left = 10**9
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def generate(self, *args, **kwargs):
        if Starved.left == 0:
            raise Starved.error
        Starved.left -= 1
        return super().generate(*args, **kwargs)


def run(capsys, *arguments):
    """The exit code, the last line of stdout as JSON, and stderr."""
    code = main([*map(str, arguments)])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]), said.err


@pytest.fixture
def starved(monkeypatch):
    """After what is measured before the first step, and one step's rollouts."""
    monkeypatch.setattr(Starved, "left", 3)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()],
    ids=["GPU", "machine"],
)
def test_a_run_that_ran_out_of_memory_says_what_to_turn_and_goes_on_to_the_same_bits(
    tmp_path, capsys, starved, monkeypatch, error
):
    monkeypatch.setattr(Starved, "error", error)
    code, told, err = run(capsys, "train", *RECIPE, "--out", tmp_path / "run")
    assert code == 1
    sentence = told["failed"]
    assert err.splitlines()[-1] == f"failed: {sentence}"
    assert "out of memory in step 2: the most goes into" in sentence
    assert "step 1 is saved" in sentence
    assert f"sppo train --resume {tmp_path / 'run'} --" in sentence
    assert "Traceback" not in err

    monkeypatch.setattr(Starved, "left", 10**9)
    code, resumed, _ = run(capsys, "train", "--resume", tmp_path / "run", "--quiet", "--json")
    assert code == 0
    code, whole, _ = run(capsys, "train", *RECIPE, "--out", tmp_path / "whole")
    assert (resumed["steps"], resumed["policy_sha256"]) == (3, whole["policy_sha256"])


def test_a_resumed_run_may_need_less_memory(tmp_path, capsys, starved, monkeypatch):
    code, told, _ = run(capsys, "train", *RECIPE, "--out", tmp_path / "run")
    command = told["failed"].rpartition("sppo ")[2].split()
    assert code == 1
    assert command[3] in ("--training.micro_tokens", "--rollout.batch")
    monkeypatch.setattr(Starved, "left", 10**9)
    code, resumed, _ = run(capsys, *command, "--training.checkpoint_activations", "true", "--quiet", "--json")
    assert (code, resumed["steps"]) == (0, 3)
    recipe = Config.load(tmp_path / "run" / "recipe.toml")
    section, _, key = command[3].removeprefix("--").partition(".")
    assert getattr(getattr(recipe, section), key) == int(command[4])
    assert recipe.training.checkpoint_activations
    code, told, _ = run(capsys, "train", "--resume", tmp_path / "run", "--training.lr", "1e-3", "--json")
    assert code == 2
    assert "leave --training.lr out" in told["error"]


def test_before_the_first_step_nothing_is_saved_and_the_run_begins_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Starved, "left", 0)
    code, told, _ = run(capsys, "train", *RECIPE, "--out", tmp_path / "run")
    assert code == 1
    assert "out of memory before the first step" in told["failed"]
    monkeypatch.setattr(Starved, "left", 10**9)
    assert run(capsys, "train", "--resume", tmp_path / "run", "--quiet", "--json")[1]["steps"] == 3


def test_what_counts_as_running_out():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert ran_out(refused.value)
    assert ran_out(MemoryError())
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out(ValueError("out of memory"))
