"""Stakes: how hard a response pulls at the policy, and the baseline that makes the gradient vary least for it.

Of all baselines that do not know the response, b(x) = E[R |∇ log π|²] / E[|∇ log π|²] leaves the gradient the least variance (Greensmith,
Bartlett & Baxter, JMLR 5, 2004), not the mean E[R]: what is sure has a short score and hardly needs a baseline. With V the chance of success, and
w₁, w₀ the mean squared score of right and of wrong responses, it is V·w₁ / (V·w₁ + (1 − V)·w₀): V with its odds times w₁/w₀.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..models.policy import Policy
from ..sections import ObjectiveSection
from .batch import Batch

MEMORY = 0.9
"""Decay of running sums, a step."""
DOUBT = 8.0
"""Every running mean is as if so many responses without any effect had been seen besides."""


def stakes(policy: Policy, batch: Batch) -> Tensor:
    """Of each token when it was sampled, [B, T]; 0 beyond a response."""
    return torch.where(batch.mask_BT, policy.stakes(batch.behaviour_logp_BT + batch.kept_BT), 0.0)


class Odds:
    """log(w₁/w₀) of earlier batches."""

    def __init__(self, policy: Policy, objective: ObjectiveSection) -> None:
        self.policy = policy
        # a response's score is divided by its length, to this power
        by_token = float(objective.average == "responses")
        self.power = {"geometric": 1.0, "family": objective.kappa, "token": by_token}.get(objective.ratio, 0.0)
        self.stake, self.number = [0.0, 0.0], [0.0, 0.0]  # of wrong responses, of right ones

    @property
    def shift(self) -> float:
        """What to add to the logit of V; 0 where nothing is known."""
        if sum(self.stake) <= 0:
            return 0.0
        doubt = DOUBT * sum(self.stake) / sum(self.number)  # so many of either kind, with the mean stake
        wrong, right = ((w + doubt) / (n + DOUBT) for w, n in zip(self.stake, self.number, strict=True))
        return math.log(right / wrong)

    def learn(self, batch: Batch) -> None:
        """Take in a batch's responses, each as right as it was found to be."""
        stake_B = stakes(self.policy, batch).double().sum(1) / batch.response_len_B.clamp(min=1) ** (2 * self.power)
        if batch.weight_B is not None:
            stake_B = stake_B * batch.weight_B.square()  # the curriculum's factor of the advantage scales the score
        count_B = (batch.share_B * batch.keep_B).double()
        for k, is_B in enumerate((1 - batch.correct_B.double(), batch.correct_B.double())):
            self.stake[k] = MEMORY * self.stake[k] + float((count_B * is_B * stake_B).sum())
            self.number[k] = MEMORY * self.number[k] + float((count_B * is_B).sum())

    def state_dict(self) -> dict[str, Any]:
        """The running sums."""
        return {"stake": self.stake, "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        self.stake, self.number = list(state["stake"]), list(state["number"])
