"""The canary: after every sync the engine must find a fixed probe as likely as the learner does.

Engines that went on sampling from old weights, unnoticed, have cost other projects months. Two tests, both of the
engine as it would sample next: a fingerprint of the weights where they are, which any changed bit alters, and the
log-probabilities of a probe, which also notice weights that are right and not used.

How far two right ways of computing the same log-probabilities may differ depends on the dtype, the model and the
machine, so it is measured: by the first look at a probe and at a step's own responses. That look is judged by what a
dtype's rounding can explain at most, all later ones by a multiple of it, which a checkpoint keeps.
"""

from __future__ import annotations

import math

import torch

from ..errors import NonFinite, StaleWeights
from ..models.policy import Policy
from .engine import Engine

PROMPT, RESPONSE = 12, 6
TIMES = 4.0
"""A limit is this multiple of what was measured, and at least half of the dtype's own below: in bfloat16 a probe's
gap is between .03 and .12 for one and the same model, by its ids."""
PROBED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
SAMPLED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Nats per token, on average, that rounding in a dtype can explain: of the canary's ids, which no model finds likely,
and of sampled responses."""


def noise_limit(measured: float, explained: dict[torch.dtype, float], dtype: torch.dtype) -> float:
    """The limit of later gaps, from the first one."""
    return max(TIMES * measured, explained[dtype] / 2)


class Canary:
    """Holds a probe: the same ids in every run and step. `limit` is None until the first check."""

    def __init__(self, policy: Policy, allowed: float | None = None) -> None:
        """`allowed` is a recipe's own limit of gaps (objective.engine_gap_limit): what is below it passes here too."""
        self.limit: float | None = None
        self.allowed = allowed or 0.0
        self.prompt, self.response = policy.probe(PROMPT, RESPONSE)

    def check(self, engine: Engine, policy: Policy, fingerprint: str) -> float:
        """The mean gap in nats per token; `fingerprint` is the policy's.

        Raises StaleWeights when the engine does not hold, or does not use, the policy's weights, NonFinite when these
        are broken.
        """
        if not engine.holds(fingerprint):
            raise StaleWeights("after a sync the engine's weights are not the learner's (their fingerprints differ)")
        ask = getattr(engine, "scores", None)  # of a cluster: every worker is asked
        probe = [self.prompt], [self.response]
        theirs = {"the engine": engine.score(*probe)} if ask is None else ask(*probe)
        mine = policy.given_logps([self.prompt], [self.response])[0]
        if not all(map(math.isfinite, mine)):
            raise NonFinite(
                "the policy's log-probabilities are not finite after the update: lower training.lr and resume from "
                "the last checkpoint"
            )
        gaps = {
            who: sum(abs(a - b) for a, b in zip(said[0], mine, strict=True)) / len(mine) for who, said in theirs.items()
        }
        who = max(gaps, key=gaps.__getitem__)
        gap = next((g for g in gaps.values() if math.isnan(g)), gaps[who])
        limit = max(self.allowed, PROBED[policy.dtype] if self.limit is None else self.limit)
        if not gap <= limit:
            dtype = str(policy.dtype).removeprefix("torch.")
            kind = "measured at the start" if self.limit is not None else f"what {dtype} can explain"
            raise StaleWeights(
                f"after a sync {who} finds a fixed probe {gap:.3g} nats per token more or less likely than the "
                "learner does (limit "
                f"{limit:.2g}, {kind}): it samples from other weights, or computes something else. Where it is known "
                "to be right, set "
                "objective.engine_gap_limit above that"
            )
        if self.limit is None:
            self.limit = noise_limit(gap, PROBED, policy.dtype)
        return gap
