"""The gradient of several ranks is that of one, whether each holds all weights or a part of them, for everything that is trained."""

from __future__ import annotations

import functools

import pytest
import torch

from .cases import Case, flat, updates
from .group import alone, on_ranks

CASES = {
    "sppo": Case(),
    "updates-of-few-rows": Case({"training__minibatches": 7, "objective__ratio": "token"}),
    "sppo-optimal": Case({"objective__algorithm": "sppo-optimal"}, steps=3),
    "hybrid": Case({"objective__algorithm": "sppo-hybrid"}),
    "ppo-epochs": Case({"objective__algorithm": "ppo", "training__epochs": 2}),
    "remax-kl-reward": Case({"objective__algorithm": "remax", "objective__kl": 0.1, "objective__kl_form": "reward"}),
    "grpo-kl-loss": Case({"objective__algorithm": "grpo", "rollout__samples": 3, "objective__kl": 0.1}),
    "gspo": Case({"objective__algorithm": "gspo", "rollout__samples": 3}),
    "lessons-and-noise": Case({"training__measure_noise": True}, lessons=True),
    "checkpointed": Case(checkpointed=True),
    "untied-by-layer": Case(tied=False, checkpointed=True, gather="layer"),
    "ppo-by-layer": Case({"objective__algorithm": "ppo", "objective__kl": 0.1}, gather="layer"),
    "adapters": Case({"objective__kl": 0.1, "critic__model": "policy"}, adapter=True),
    "adapters-of-tokens": Case(
        {"objective__algorithm": "ppo", "critic__model": "policy"}, adapter=True, checkpointed=True, gather="layer"
    ),
    "offloaded": Case({"training__offload": True}),
    "float32": Case(dtype=torch.float32),
}
ONLY_WHOLE = ("sppo-optimal", "hybrid", "remax-kl-reward", "gspo")
GROUPS = [
    *((2, 1, name) for name in ONLY_WHOLE),
    *((2, 2, name) for name in CASES if name not in ONLY_WHOLE),
    *((3, 1, name) for name in ("ppo-epochs", "updates-of-few-rows", "adapters", "lessons-and-noise")),
    *((3, 3, name) for name in ("sppo", "updates-of-few-rows")),
    (4, 2, "grpo-kl-loss"),
]
"""Ranks, and how many of them hold one copy of the weights between them."""


@functools.cache
def of_one(name: str):
    return updates(alone(), CASES[name])


def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest relative distance of a gradient."""
    return max((float((x - y).norm() / x.norm()) for x, y in zip(a, b, strict=True)), default=0.0)


def measured(metrics: dict) -> dict:
    """What is neither a time nor missing."""
    return {key: value for key, value in metrics.items() if value is not None and "seconds" not in key}


@pytest.mark.parametrize(("ranks", "shards", "name"), GROUPS)
def test_ranks_have_the_gradients_the_metrics_and_the_weights_of_one_process(ranks, shards, name):
    """Two steps of several updates: stale weights, or a gradient counted twice, would show in the second."""
    one, found = of_one(name), on_ranks(ranks, updates, CASES[name], shards=shards)
    most = 1e-5 if CASES[name].dtype == torch.float32 else 1e-10
    assert len({rank["sha256"] for rank in found}) == 1
    for rank in found:
        assert apart(one["policy"], rank["policy"]) <= most
        assert apart(one["critic"], rank["critic"]) <= most
        assert apart([flat(one["weights"].values())], [flat(rank["weights"].values())]) <= most
        assert rank["logps"][0] == pytest.approx(one["logps"][0], rel=1e-4)
        for mine, theirs in zip(one["metrics"], rank["metrics"], strict=True):
            assert mine.keys() == theirs.keys()
            assert measured(theirs) == pytest.approx(measured(mine), rel=1e-4, abs=1e-6)
            assert {k for k, v in mine.items() if v is None} == {k for k, v in theirs.items() if v is None}
        assert torch.allclose(rank["trace"].log_ratio_BT, one["trace"].log_ratio_BT, atol=1e-5)
        assert torch.equal(rank["trace"].clipped_B, one["trace"].clipped_B)


@pytest.mark.parametrize("shards", [1, 3])
def test_three_ranks_decide_alike_and_repeat_their_own_bits(shards):
    first, again = (on_ranks(3, updates, Case(dtype=torch.float32), shards=shards) for _ in range(2))
    assert {rank["sha256"] for rank in (*first, *again)} == {first[0]["sha256"]}
    for rank in (*first, *again):
        assert list(map(measured, rank["metrics"])) == list(map(measured, first[0]["metrics"]))


def test_divided_weights_in_bfloat16_have_the_gradient_of_whole_ones():
    """The parts are float32 masters; a pass rounds them as an undivided model's weights are rounded."""
    case = Case({"objective__algorithm": "grpo", "rollout__samples": 3, "objective__kl": 0.1}, dtype=torch.bfloat16)
    whole, parts = (on_ranks(2, updates, case, shards=shards)[0] for shards in (1, 2))
    assert apart(whole["policy"], parts["policy"]) < 1e-5
    assert {x.dtype for x in parts["weights"].values()} == {torch.bfloat16}
    assert apart([flat(whole["weights"].values())], [flat(parts["weights"].values())]) < 1e-4
