"""Whether engine and learner agree about what was sampled; where they do not, the run stops."""

from __future__ import annotations

import torch

from ..errors import EngineMismatch
from ..recipe.objective import ObjectiveSection
from ..rollout.canary import SAMPLED
from .update_stats import Tally

DRIFT = 1.0
"""Nats per token, on average, that no updates within one step move a policy by."""


def check_gap(tally: Tally, measured: float | None, objective: ObjectiveSection, dtype: torch.dtype) -> None:
    """Raises EngineMismatch when the engine's log-probabilities are too far from the learner's.

    The limit is `objective.engine_gap_limit`, else what the run has `measured` in its first step, else what rounding in `dtype` can explain.
    """
    gap, given = tally.engine_gap(), objective.engine_gap_limit
    limit, kind = (given, "objective.engine_gap_limit") if given else (measured, "measured in the first step")
    if limit is None:
        limit, kind = SAMPLED[dtype], f"what {str(dtype).removeprefix('torch.')} can explain"
    if gap is not None and not gap <= limit:
        raise EngineMismatch(
            f"engine and learner disagree by {gap:.3g} nats per token on average (limit {limit:.2g}: {kind}): the engine holds other weights, "
            "or computes in another precision or at another temperature. Where it is known to be right, set objective.engine_gap_limit above "
            "that"
        )
    drift = tally.mesh.max(tally.drift)
    if drift > DRIFT:
        raise EngineMismatch(
            f"a minibatch whose `old` log-probabilities are the engine's is {drift:.2f} nats per token away from the learner: the "
            "engine did not sample all responses from the same weights, or training.lr is far too high"
        )
