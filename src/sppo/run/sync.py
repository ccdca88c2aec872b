"""The engine gets the learner's weights, and is verified to sample from them."""

from __future__ import annotations

from ..models.policy import Policy
from ..rollout.canary import Canary
from ..rollout.engine import Engine


class WeightSync:
    """Call it after every change of the policy's weights. `fingerprint` and `gap` are of the last call.

    Raises StaleWeights where the engine does not hold or use the policy's weights, NonFinite where these are broken.
    """

    def __init__(self, engine: Engine, policy: Policy, gap_limit: float | None) -> None:
        """`gap_limit` is `objective.engine_gap_limit`."""
        self.engine, self.policy = engine, policy
        self.canary = Canary(policy, gap_limit)
        self.fingerprint = ""
        self.gap = 0.0  # in nats per token of the canary's probe

    def __call__(self, version: int) -> None:
        """The weights are those after `version` steps."""
        self.engine.load(self.policy.weights(), version)
        self.fingerprint = self.policy.fingerprint()
        self.gap = self.canary.check(self.engine, self.policy, self.fingerprint)
