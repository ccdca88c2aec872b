"""What responses earn by how right they are: a critic predicts correctness c, and the policy is paid R (a mixture of rewards, a KL to the start).

A baseline must be of what it is subtracted from. With V = E[c | x] and R ≈ c + α + β·c, fitted to the responses of *earlier* batches,

    b(x) = V + α + β·V:    where c is 0 or 1,  b = V·R₁ + (1 − V)·R₀,  R₁ = 1 + α + β and R₀ = α the mean rewards of right and wrong responses.

What is fitted is R − c, by least squares over running sums: where nothing shapes the reward that is 0 and b is V, to the bit. Partly right
responses lie on the same line: with R = c the slope is 1 for them too, which means of R weighted by c and 1 − c would not give.
"""

from __future__ import annotations

from torch import Tensor

MEMORY = 0.9
"""Decay of running sums, a step."""
DOUBT = 1.0
"""So many responses that were right, and so many that were wrong, are taken to have earned 1 and 0 besides."""


class Earned:
    """The line through R − c over c, of earlier batches, each response with a weight."""

    def __init__(self) -> None:
        self.sums = [0.0] * 5  # of w, w·c, w·c², w·(R − c), w·c·(R − c)

    def line(self, doubt: float = DOUBT) -> tuple[float, float]:
        """α and β; `doubt` is the weight of what is taken to be seen besides of either kind, above 0."""
        w, c, cc, d, cd = self.sums
        w, c, cc = w + 2 * doubt, c + doubt, cc + doubt
        spread = w * cc - c * c
        return (cc * d - c * cd) / spread, (w * cd - c * d) / spread

    def beyond(self, chance: Tensor, doubt: float = DOUBT) -> Tensor:
        """α + β·V: what is earned on average beyond a chance of success. Any shape; 0 where nothing shapes the reward."""
        alpha, beta = self.line(doubt)
        return alpha + beta * chance

    def learn(self, correct_B: Tensor, reward_B: Tensor, weight_B: Tensor) -> None:
        """Take in a batch's responses: how right each is, what it earned, how much it counts. [B] × 3."""
        c_B, w_B = correct_B.double(), weight_B.double()
        d_B = reward_B.double() - c_B
        new = (w_B, w_B * c_B, w_B * c_B * c_B, w_B * d_B, w_B * c_B * d_B)
        self.sums = [MEMORY * past + float(x_B.sum()) for past, x_B in zip(self.sums, new, strict=True)]
