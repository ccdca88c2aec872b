"""Runs on learner ranks and rollout workers: the bits of one process, the same bits again, and exact resumption."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sppo import SPPOConfig, SPPOTrainer
from sppo.models.weights import sha256, weights_of
from sppo.recipe.config import Config
from sppo.run.loop import train
from sppo.run.run import Run

BASE: dict[str, Any] = {
    "seed": 3, "policy.model": "tiny:hidden=32,layers=2,heads=2", "critic.model": "tiny:hidden=16,layers=1,heads=2",
    "task.train": "chain:steps=1-2", "bootstrap.steps": 3, "bootstrap.batch": 8, "rollout.prompts": 12, "rollout.max_tokens": 12,
    "training.steps": 3, "evaluation.n": 8, "evaluation.every": 0, "run.threads": 1, "run.checkpoint_every": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _ray_warns() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own files and sockets
        yield


def done(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A whole run's summary."""
    run = Run.new(Config.load(None, BASE | {"run.out": str(folder)} | changes))
    return finished(run)


def finished(run: Run) -> dict[str, Any]:
    try:
        return dict(train(run))
    finally:
        run.close()


def on(address: str, learners: int, rollouts: int, **more: Any) -> dict[str, Any]:
    keys = {"address": address, "learners": learners, "rollouts": rollouts, "timeout": 60, "backoff": 0.1} | more
    return {f"cluster.{key}": value for key, value in keys.items()}


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return done(tmp_path_factory.mktemp("inline") / "run", {})


def test_one_rank_and_one_worker_give_the_bits_of_one_process_though_each_is_killed(
    inline: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    import ray

    run = Run.new(Config.load(None, BASE | {"run.out": str(tmp_path / "run")} | on(ray_address, 1, 1)))
    models: Any = run.components.models
    write, struck = run.record, []

    def striking(step: int, *rest: Any) -> None:
        write(step, *rest)
        if (
            step < 2 and step not in struck
        ):  # its rank in the second step, which is lost with it; its worker in the first
            struck.append(step)
            handle = models.ranks.ranks[0] if step else next(iter(models.workers.states))
            os.kill(ray.get(handle.actor.pid.remote()), signal.SIGKILL)

    run.record = striking  # type: ignore[method-assign]
    found = finished(run)
    assert struck == [0, 1]
    assert found["policy_sha256"] == inline["policy_sha256"]
    assert found["accuracy_after"] == inline["accuracy_after"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["cluster/healthy"]) for line in lines] == [(0, 1), (1, 1), (2, 1)]
    assert lines[-1]["cluster/lost"] == 2
    assert not (tmp_path / "run" / "journal").exists()  # a finished run needs it no more


@pytest.mark.parametrize("shards", [1, 2])
def test_two_ranks_give_the_same_bits_twice_and_resume_on_one(
    shards: int, inline: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    changes = on(ray_address, 2, 2, shards=shards, chunk=6)
    found = done(tmp_path / "a", changes)
    run = Run.new(Config.load(None, BASE | {"run.out": str(tmp_path / "b")} | changes | {"training.steps": 2}))
    finished(run)
    resumed = Run.resume(tmp_path / "b", steps=3)
    assert finished(resumed)["policy_sha256"] == found["policy_sha256"]
    again = Run.resume(
        tmp_path / "b", steps=4, memory={"cluster.learners": 1, "cluster.rollouts": 1, "cluster.shards": 0}
    )
    finished(again)
    whole = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoints/step-000003/policy") for name in "ab"]
    for name, p in whole[0].state_dict().items():
        assert p.dtype == torch.float32
        assert torch.equal(p, whole[1].state_dict()[name])


def test_sampling_ahead_gives_the_same_bits_twice_and_resumes_exactly(ray_address: str, tmp_path: Path) -> None:
    changes = on(ray_address, 1, 1, lag=1) | {"training.steps": 4}
    found = done(tmp_path / "a", changes)
    run = Run.new(Config.load(None, BASE | {"run.out": str(tmp_path / "b")} | changes))
    stop = run.record

    def stopping(step: int, *rest: Any) -> None:
        if step == 1:
            run.interrupt()
        stop(step, *rest)

    run.record = stopping  # type: ignore[method-assign]
    assert finished(run)["stopped"] == "interrupted"
    ahead = tmp_path / "b" / "checkpoints" / "step-000002" / "ahead"
    assert list(ahead.rglob("*.json")), "what was sampled ahead is in the checkpoint"
    assert finished(Run.resume(tmp_path / "b"))["policy_sha256"] == found["policy_sha256"]
    lags = [json.loads(line)["rollout/lag"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lags == [0, 1, 1, 1]


def test_a_trainer_has_the_models_that_a_cluster_trained(ray_address: str, tmp_path: Path) -> None:
    recipe = {k: v for k, v in BASE.items() if k not in ("policy.model", "task.train", "training.steps", "seed")}
    recipe |= on(ray_address, 1, 1)
    args = SPPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, recipe=recipe, disable_progress=True)
    trainer = SPPOTrainer(model=BASE["policy.model"], train_dataset=BASE["task.train"], args=args)
    summary = trainer.train()
    own = {name: p.detach() for name, p in trainer.policy.named_parameters()}
    assert sha256(weights_of(own)) == summary["policy_sha256"]
    assert 0 < trainer.predicted_chance(["3+4?"])[0] < 1
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").num_parameters() == sum(
        p.numel() for p in own.values()
    )
