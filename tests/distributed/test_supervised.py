"""Supervised training and reward models on several ranks: the gradients of one process, and an end that all reach together."""

from __future__ import annotations

import functools

import pytest
import torch

from sppo.learning import reward_model, sft
from sppo.learning.optimizer import MasterAdamW
from sppo.learning.reward_model import Example
from sppo.models import tiny
from sppo.models.reward_model import RewardModel
from sppo.models.sharding import shard, shard_reward_model
from sppo.recipe.sections import BootstrapSection
from sppo.tasks.loading import load_tasks

from .cases import Case, flat, models, watched
from .group import alone, on_ranks


def watching(seen, module):
    """A module's optimisers note their gradients."""

    def made(*args, **kwargs):
        optimiser = MasterAdamW(*args, **kwargs)
        watched(optimiser, seen)
        return optimiser

    module.MasterAdamW = made


def learns_solutions(mesh, case: Case, stops_at: int):
    """Supervised updates until the last rank says that it is enough."""
    policy, _ = models(case)
    shard(policy, None, None, mesh, gather=case.gather)
    seen, steps = [], []
    watching(seen, sft)
    section = BootstrapSection(steps=4, batch=5, lr=1e-2)

    def on_step(done, metrics):
        steps.append(metrics["loss"])
        return not (mesh.rank == mesh.size - 1 and done == stops_at)

    try:
        sft.supervised(
            policy,
            sft.Imitation(policy, 60),
            load_tasks("chain:steps=1-2"),
            section,
            seed=0,
            on_step=on_step,
        )
    finally:
        sft.MasterAdamW = MasterAdamW
    return seen, steps, policy.sha256(), flat(x for _, x in policy.weights())


def learns_preferences(mesh, pairs: bool, dtype=torch.float64):
    """A reward model's updates on sequences of very different lengths."""
    backbone, tokenizer = tiny.build(seed=0, head=False, hidden=32, layers=2, heads=2)
    model = RewardModel(tiny.classifier(backbone, 0).to(dtype), tokenizer)
    shard_reward_model(model, mesh)
    generator = torch.Generator().manual_seed(3)

    def ids():
        return torch.randint(3, 60, (int(torch.randint(1, 20, (), generator=generator)),), generator=generator).tolist()

    examples = [Example(ids(), ids() if pairs else None, float(i % 2)) for i in range(9)]
    seen = []
    watching(seen, reward_model)
    try:
        metrics = reward_model.train_reward_model(
            model, examples, epochs=2, batch=4, lr=1e-2, micro_tokens=40, seed=0, on_step=lambda *_: True, mesh=mesh
        )
    finally:
        reward_model.MasterAdamW = MasterAdamW
    return seen, metrics, reward_model.judge(model, examples, 40), model.center


CASES = {"all": Case(), "checkpointed": Case(checkpointed=True, gather="layer"), "adapter": Case(adapter=True)}


@functools.cache
def of_one(name: str):
    return learns_solutions(alone(), CASES[name], 3)


@pytest.mark.parametrize(
    ("ranks", "shards", "name"), [(2, 2, "all"), (3, 1, "all"), (2, 2, "checkpointed"), (2, 2, "adapter")]
)
def test_supervised_updates_are_those_of_one_process_and_end_together(ranks, shards, name):
    one, found = of_one(name), on_ranks(ranks, learns_solutions, CASES[name], 3, shards=shards)
    assert len({sha for _, _, sha, _ in found}) == 1
    for gradients, losses, _, weights in found:
        assert len(gradients) == len(losses) == 3  # one rank had enough
        assert losses == pytest.approx(one[1], rel=1e-9)
        for mine, theirs in zip(gradients, one[0], strict=True):
            assert (mine - theirs).norm() <= 1e-10 * theirs.norm()
        assert (weights - one[3]).norm() <= 1e-9 * one[3].norm()


@pytest.mark.parametrize(("ranks", "shards", "pairs"), [(2, 2, True), (3, 1, True), (2, 2, False)])
def test_a_reward_models_updates_and_verdicts_are_those_of_one_process(ranks, shards, pairs):
    one, found = learns_preferences(alone(), pairs), on_ranks(ranks, learns_preferences, pairs, shards=shards)
    for gradients, metrics, (loss, right), center in found:
        assert metrics == pytest.approx(one[1], rel=1e-9)
        assert loss == pytest.approx(one[2][0], rel=1e-6)
        assert right == one[2][1]
        assert center == pytest.approx(one[3], abs=1e-6)
        for mine, theirs in zip(gradients, one[0], strict=True):
            assert (mine - theirs).norm() <= 1e-10 * theirs.norm()
