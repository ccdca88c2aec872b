"""The plan of a recipe with tools counts what they may say."""

from __future__ import annotations

import torch

from sppo.recipe.config import Config
from sppo.run.footprint import Model
from sppo.run.planning import plan

from ..conftest import small_policy


def test_rows_are_as_long_as_a_trajectory_may_get():
    policy = small_policy()

    def micro_batch(**keys):
        config = Config.load(None, {"rollout.max_tokens": 100, "training.micro_tokens": 256} | keys)
        return plan(config, Model.of(policy), None, torch.device("cpu"), 28).phases["update"]["one micro-batch"]

    alone = micro_batch()
    assert micro_batch(**{"environment.tools": ["calculator"], "environment.tokens": 128}) == alone
    told = {"environment.tools": ["calculator"], "environment.turns": 5, "environment.output": 400}
    assert micro_batch(**told) == micro_batch(**told, **{"environment.tokens": 28 + 100 + 4 * 100}) > alone
