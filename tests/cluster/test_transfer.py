"""Weights on their way to rollout workers: what was spoiled is refused by the worker's name, and vLLM's engines hold what was sent."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from sppo.distributed.transfer import Meeting
from sppo.errors import StaleWeights
from sppo.models import tiny
from sppo.recipe.config import Config
from sppo.run.loop import train
from sppo.run.on_cluster import OnCluster
from sppo.run.rank import Sampler
from sppo.run.run import Run

from .test_runs import BASE, finished, on

vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="make test-vllm runs these")
VLLM = "vllm:eager=true,memory=0.1,context=128"
WHOLE = {"policy.model": "tiny:hidden=64,layers=2,heads=2"}
KINDS = {
    "all weights, head tied": WHOLE,
    "all weights, head apart": {},
    "an adapter": WHOLE | {"adapter.rank": 4, "critic.model": "policy"},
    "an adapter that is merged": WHOLE | {"adapter.rank": 4, "adapter.dora": True},
}


class Spoiled(Sampler):
    """A worker of which one number is not what the learner sent, from its second sync on."""

    syncs = 0

    def receive(self, meeting: Meeting, place: int, version: int) -> None:
        super().receive(meeting, place, version)
        self.syncs += 1
        if self.syncs > 1:
            if hasattr(self.engine, "llm"):
                self.engine.llm.apply_model(spoil)
            else:
                spoil(self.policy.model)


@torch.no_grad()
def spoil(model: Any) -> None:
    """Change one number of one weight."""
    list(model.parameters())[-2].view(-1)[3] += 0.001


@pytest.mark.parametrize("engine", ["local", pytest.param(VLLM, marks=vllm)])
def test_a_spoiled_transfer_is_refused_by_the_workers_name(
    engine: str, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["*"]))
    changes = (
        on(ray_address, 1, 2)
        | WHOLE
        | {"rollout.engine": engine, "bootstrap.steps": 1, "run.out": str(tmp_path / "run")}
    )

    def sampler(models: OnCluster, place: int, again: bool) -> Any:
        return partial(Spoiled if place else Sampler, models.config, models.parts, None, models._threads, place, again)

    monkeypatch.setattr(OnCluster, "_sampler", sampler)
    run = Run.new(Config.load(None, BASE | changes))
    with pytest.raises(StaleWeights, match="rollout worker 2 does not hold the learner's weights"):
        finished(run)


def untied(folder: Path) -> str:
    """A folder with a model whose head is a matrix of its own."""
    model, tokenizer = tiny.build(hidden=64, layers=2, heads=2)
    model.config.tie_word_embeddings = False
    apart = type(model)(model.config)
    apart.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@vllm
@pytest.mark.parametrize("kind", KINDS)
def test_vllms_engines_hold_what_was_sent_over_ten_syncs(kind: str, ray_address: str, tmp_path: Path) -> None:
    changes = on(ray_address, 1, 2) | {
        "rollout.engine": VLLM, "training.steps": 10, "bootstrap.steps": 1, "run.out": str(tmp_path / "run"), "cluster.timeout": 300,
    }  # fmt: skip
    run = Run.new(Config.load(None, BASE | (KINDS[kind] or {"policy.model": untied(tmp_path / "model")}) | changes))
    try:
        summary = train(run)
    finally:
        run.close()
    assert summary["steps"] == 10
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({line["update/grad_norm"] for line in lines}) == 10
    assert all(line["cluster/healthy"] == 2 and line["cluster/lost"] == 0 for line in lines)
    assert all(line["engine/gap_mean"] < 1e-4 and line["engine/canary_gap"] < 1e-4 for line in lines)
