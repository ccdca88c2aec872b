"""The optimal baseline: of all that do not know the response, the one with which the gradient varies least.

That is b(x) = E[w·R | x] / E[w | x], w = |∇ log π|² the squared score of a response (Weaver & Tao, UAI 2001; Greensmith, Bartlett & Baxter,
JMLR 5, 2004; for language models OPO, arXiv 2505.23585), not the mean E[R | x]: what is sure has a short score and hardly needs a baseline. With
V the chance of success, and w₁, w₀ the mean w of right and of wrong responses to x, the weight of the right ones is

    p = V·w₁ / (V·w₁ + (1 − V)·w₀):    logit p = logit V + log(w₁/w₀),    b = p·R₁ + (1 − p)·R₀

with R₁ and R₀ what a right and a wrong response earn, w by w: 1 and 0, unless the reward is shaped (earned.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...models.policy import Policy
from ...objective.advantage import shifted
from ...objective.ratio import wide
from ...recipe.objective import ObjectiveSection
from ..batch import Batch
from ..earned import MEMORY, Earned

DOUBT = 8.0
"""Every running mean is as if so many responses without any effect had been seen besides."""


def squared_scores(policy: Policy, batch: Batch) -> Tensor:
    """Of each token when it was sampled, [B, T]; 0 beyond a response."""
    return torch.where(batch.mask_BT, policy.squared_score(batch.behaviour_logp_BT + batch.kept_BT), 0.0)


class OptimalBaseline:
    """log(w₁/w₀), R₁ and R₀ of earlier batches.

    Hard problems have other responses than easy ones, and more wrong ones; w₁ and w₀ must be of the *same* problems. So there a right
    response counts 1 − V, and a wrong one V: of each problem, V·(1 − V) of either kind then.
    """

    def __init__(self, policy: Policy, objective: ObjectiveSection) -> None:
        self.policy = policy
        # a response's score is divided by its length, to this power
        by_token = float(objective.average == "responses")
        powers = {
            "sequence": 0.0,
            "geometric": 1.0,
            "family": objective.kappa,
            "token": by_token,
            "geometric-token": by_token,
        }
        self.power = powers[objective.ratio]  # not `auto`: Config.settled
        # running sums of the squared scores of wrong and of right responses to the same problems
        self.paired = [0.0, 0.0]
        self.earned = Earned()  # each response with its squared score
        self.number = 0.0

    @property
    def _doubt(self) -> float:
        """The squared scores of DOUBT responses."""
        return DOUBT * self.earned.sums[0] / self.number if self.number > 0 else 0.0

    @property
    def shift(self) -> float:
        """log(w₁/w₀), what to add to the logit of a chance; 0 where nothing is known."""
        wrong, right = (square + self._doubt / 2 for square in self.paired)
        return math.log(right / wrong) if wrong > 0 else 0.0

    def baseline(self, chance_B: Tensor) -> Tensor:
        """Of least variance, from the chance of success. [B] → [B]."""
        doubt = self._doubt
        if doubt <= 0:
            return wide(chance_B)
        right_B = shifted(chance_B, self.shift)
        return right_B + self.earned.beyond(right_B, doubt)

    def learn(self, batch: Batch, chance_B: Tensor, reward_B: Tensor) -> None:
        """Take in a batch's responses, each as right as it was found to be, and the chances that they were given before. [B] × 2."""
        length_B = batch.response_len_B.clamp(min=1)
        square_B = squared_scores(self.policy, batch).double().sum(1) / length_B ** (2 * self.power)
        if batch.weight_B is not None:
            square_B = square_B * batch.weight_B.square()  # the curriculum's factor of the advantage scales the score
        known_B = batch.graded_B & square_B.isfinite() & reward_B.isfinite()
        square_B, reward_B = square_B[known_B], reward_B.double()[known_B]
        right_B, chance_B = batch.correct_B.double()[known_B], chance_B.double()[known_B].clamp(0, 1)
        for k, (is_B, other_B) in enumerate(((1 - right_B, chance_B), (right_B, 1 - chance_B))):
            self.paired[k] = MEMORY * self.paired[k] + float((is_B * square_B * other_B).sum())
        self.earned.learn(right_B, reward_B, square_B)
        self.number = MEMORY * self.number + len(square_B)

    def state_dict(self) -> dict[str, Any]:
        """The running sums."""
        return {"number": self.number, "paired": list(self.paired), "earned": list(self.earned.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        self.number, self.paired, self.earned.sums = state["number"], list(state["paired"]), list(state["earned"])
        if "stake" in state:  # of a version that summed what wrong and right responses earned
            (wrong, right), (squares, of_right) = self.earned.sums, state["stake"]
            self.earned.sums = [squares + of_right, of_right, of_right, wrong + right - of_right, right - of_right]
