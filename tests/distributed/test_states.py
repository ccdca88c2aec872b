"""What ranks leave behind is what one process would: model folders, optimiser states, other models' weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sppo.errors import ModelError, RecipeError
from sppo.learning.learner import Learner
from sppo.learning.optimizer import MasterAdamW
from sppo.models.critic import Critic
from sppo.models.mlp import ControlCritic
from sppo.models.policy import Policy
from sppo.models.sharding import shard

from ..conftest import small_config, small_policy
from .cases import Case, digest, judged_batch, models
from .group import alone, on_ranks

CPU = torch.device("cpu")
BFLOAT16 = Case({"objective__algorithm": "ppo", "objective__kl": 0.1}, dtype=torch.bfloat16)
ADAPTERS = Case({"critic__model": "policy"}, adapter=True, dtype=torch.bfloat16)


def go_on(mesh, case: Case, folder: Path, saved: dict | None, steps: range, out: Path | None = None):
    """Some steps from a state, then everything that a checkpoint holds."""
    config = small_config(
        **{"training__micro_tokens": 48, "training__minibatches": 2, "objective__engine_gap_limit": 5.0} | case.recipe
    ).with_rates(1, 1, adapted=case.adapter)
    policy, critic = models(case)
    batch = judged_batch(policy, config)
    reference = policy.copied() if case.recipe.get("objective__kl") else None
    if saved is not None and not case.adapter:
        policy, _ = Policy.load(str(folder / "policy"), dtype="bfloat16", device=CPU, seed=0)
        critic, _ = Critic.load(str(folder / "critic"), dtype="bfloat16", device=CPU, seed=0)
    shard(policy, critic, reference, mesh)
    learner = Learner(policy, critic, reference, config, mesh)
    if saved is not None:
        learner.load_state_dict(saved["learner"])
    for step in steps:
        learner.update(batch, learner.advantage(batch)[0], step)
    if out is not None:
        policy.save(out / "policy")
        critic.save(out / "critic")
    return {"learner": learner.state_dict(), "sha256": policy.sha256(), "fingerprint": policy.fingerprint()}


def test_a_checkpoint_of_two_ranks_loads_on_one_and_back_with_the_same_digest(tmp_path):
    none = range(0)
    first = on_ranks(2, go_on, BFLOAT16, tmp_path, None, range(2), tmp_path, shards=2)[0]
    assert any(x.dtype == torch.float32 for x in first["learner"]["policy_optimiser"]["masters"])
    one = go_on(alone(), BFLOAT16, tmp_path, first, none, tmp_path / "one")
    again = on_ranks(2, go_on, BFLOAT16, tmp_path / "one", one, none, tmp_path / "two", shards=2)
    for found in (one, again[0]):
        assert (found["sha256"], found["fingerprint"]) == (first["sha256"], first["fingerprint"])
        assert digest(found["learner"]) == digest(first["learner"])
    assert again[1]["sha256"] == first["sha256"]
    for part in ("policy", "critic"):
        folders = [tmp_path / part, tmp_path / "one" / part, tmp_path / "two" / part]
        assert [json.loads((f / "config.json").read_text())["dtype"] for f in folders] == ["bfloat16"] * 3
        assert len({(f / "config.json").read_text() for f in folders}) == 1
        assert len({tuple(sorted(p.name for p in f.iterdir())) for f in folders}) == 1
        for file in ("model.safetensors", *(["value_head.safetensors"] if part == "critic" else [])):
            assert len({digest(load_file(f / file)) for f in folders}) == 1


def test_ranks_that_stop_and_go_on_end_at_the_bits_of_those_that_did_not(tmp_path):
    whole = on_ranks(2, go_on, BFLOAT16, tmp_path, None, range(2), shards=2)[0]
    half = on_ranks(2, go_on, BFLOAT16, tmp_path, None, range(1), tmp_path, shards=2)[0]
    rest = on_ranks(2, go_on, BFLOAT16, tmp_path, half, range(1, 2), shards=2)[0]
    assert rest["sha256"] == whole["sha256"] != half["sha256"]
    assert digest(rest["learner"]) == digest(whole["learner"])


def test_adapters_over_a_divided_base_are_saved_as_of_one_process(tmp_path):
    mine = on_ranks(2, go_on, ADAPTERS, tmp_path, None, range(0), tmp_path / "two", shards=2)
    one = go_on(alone(), ADAPTERS, tmp_path, None, range(0), tmp_path / "one")
    assert {x["fingerprint"] for x in mine} == {one["fingerprint"]}  # of the base too
    for part in ("policy", "critic"):
        files = [tmp_path / n / part / "adapter_model.safetensors" for n in ("one", "two")]
        assert len({digest(load_file(f)) for f in files}) == 1


def exchanges(mesh):
    """Weights go from one model into another, whole or divided."""
    (giver, _), (taker, _), undivided = models(Case(tied=False)), models(Case(tied=False)), small_policy(seed=5)
    with torch.no_grad():
        for p in taker.trained.values():
            p.zero_()
    shard(giver, None, taker, mesh)
    before = giver.sha256()
    taker.logps(torch.tensor([[3, 4, 5]]), torch.tensor([[False, True, True]]), 1.0)  # its weights are together now
    taker.take(giver.weights())
    same = taker.given_logps([[3]], [[4, 5]]), giver.given_logps([[3]], [[4, 5]])
    reference = giver.as_reference()
    copied = reference.sha256()
    with torch.no_grad():
        giver.take((name, x + 0.01) for name, x in list(reference.weights()))
    with pytest.raises(ValueError, match="lm_head"):
        giver.take(undivided.weights())
    return before, copied, taker.sha256(), reference.sha256(), giver.sha256(), same


def test_divided_weights_are_taken_and_copied_part_by_part():
    two, one = on_ranks(2, exchanges, shards=2), exchanges(alone())
    for before, copied, taken, reference, changed, (mine, theirs) in (*two, one):
        assert before == copied == taken == reference == one[0]
        assert changed == one[4] != before
        assert mine == theirs


def refused(mesh):
    policy, _ = models(Case())
    mixed, _ = models(Case())
    mixed.model.model.norm.bfloat16()
    control, _ = ControlCritic.load("mlp:pendulum", dtype="auto", device=CPU, seed=0)
    shard(policy, None, None, mesh)
    out = []
    for error, attempt in (
        (
            RecipeError,
            lambda: MasterAdamW(policy.trained.values(), betas=(0.9, 0.9), weight_decay=0.0, kind="adamw-8bit"),
        ),
        (ModelError, lambda: shard(mixed, None, None, mesh)),
        (RecipeError, lambda: shard(None, control, None, mesh)),
    ):
        with pytest.raises(error) as found:
            attempt()
        out.append(str(found.value))
    return out


def test_what_cannot_be_divided_is_refused_in_one_sentence():
    eight, mixed, control = on_ranks(2, refused, shards=2)[0]
    assert "adamw-8bit" in eight
    assert "cluster.shards = 1" in eight
    assert "bfloat16 and float64" in mixed
    assert "control tasks" in control
