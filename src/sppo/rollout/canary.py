"""The canary: after every sync the engine must find a fixed probe exactly as likely as the learner does.

Engines that went on sampling from old weights, unnoticed, have cost other projects months. Two tests, both of the engine as it would
sample next: a fingerprint of the weights where they are, which any changed bit alters, and the log-probabilities of a probe, which
also notice weights that are right and not used.
"""

from __future__ import annotations

import math

import torch

from ..errors import NonFinite, StaleWeights
from ..models.policy import Policy
from .engine import Engine

PROMPT, RESPONSE = 12, 6
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Nats a token, on average: several times what two ways of computing in a dtype differ by on such unlikely tokens."""


class Canary:
    """Holds a probe: the same ids in every run and step."""

    def __init__(self, policy: Policy) -> None:
        self.prompt, self.response = policy.probe(PROMPT, RESPONSE)

    def check(self, engine: Engine, policy: Policy) -> float:
        """The mean gap in nats a token. Raises StaleWeights when the engine does not hold, or does not use, the policy's weights, and
        NonFinite when these are broken."""
        if not engine.holds(policy):
            raise StaleWeights("after a sync the engine's weights are not the learner's (their fingerprints differ)")
        theirs = engine.score([self.prompt], [self.response])[0]
        mine = policy.given_logps([self.prompt], [self.response])[0]
        if not all(map(math.isfinite, mine)):
            raise NonFinite(
                "the policy's log-probabilities are not finite after the update: lower training.lr and resume from the last checkpoint"
            )
        gap = sum(abs(a - b) for a, b in zip(theirs, mine, strict=True)) / len(mine)
        limit = TOLERANCE[policy.dtype]
        if not gap <= limit:
            raise StaleWeights(
                f"after a sync the engine finds a fixed probe {gap:.3g} nats a token more or less likely than the learner does (limit "
                f"{limit:g} in {str(policy.dtype).removeprefix('torch.')}): it samples from other weights, or computes something else"
            )
        return gap
