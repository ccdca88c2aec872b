"""What was seen of each prompt before: the part of the evidence that a critic forgets (objective.baseline = "beta").

A past reward counts half once the policy has moved by `half_life` nats (KL of a whole response, summed over steps). How far the critic
itself is to be trusted, as a number of pseudo-samples, comes from pairs of rewards of one prompt: n0 = E[V(1−V)]/τ² − 1 with
τ² = E[(r_a − V)(r_b − V)], the spread of the true success rates about V. Everything that a baseline reads is of *earlier* steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNKNOWN, MOST = 10.0, 1000.0
"""Pseudo-samples that V(x) is worth before anything is known of it, and at most."""
MEMORY = 0.95
"""Decay of the running means, a step."""


class History:
    """Discounted counts and sums of rewards by prompt, and the critic's worth."""

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self.clock = 0.0  # nats moved since the start
        self.seen: dict[str, tuple[float, float, float]] = {}  # prompt: number, sum, clock of the last visit
        self.pair_sum = self.pair_count = self.noise_sum = self.noise_count = 0.0

    def past(self, prompt: str) -> tuple[float, float]:
        """How many rewards of a prompt are known, discounted to now, and their sum."""
        if prompt not in self.seen:
            return 0.0, 0.0
        number, total, clock = self.seen[prompt]
        worth = 2.0 ** (-(self.clock - clock) / self.half_life)
        return worth * number, worth * total

    @property
    def strength(self) -> float:
        """n0, the pseudo-samples that V(x) is worth."""
        if self.pair_count < 1.0 or self.noise_count < 1.0:
            return UNKNOWN
        spread, noise = self.pair_sum / self.pair_count, self.noise_sum / self.noise_count
        return MOST if spread <= noise / (MOST + 1) else max(noise / spread - 1.0, 0.0)

    def observe(self, prompts: Sequence[str], rewards: Sequence[Sequence[float]], values: Sequence[float]) -> None:
        """A step's prompts with the rewards of all their graded samples and V(x): read from the next step on."""
        self.pair_sum, self.pair_count = MEMORY * self.pair_sum, MEMORY * self.pair_count
        self.noise_sum, self.noise_count = MEMORY * self.noise_sum, MEMORY * self.noise_count
        for prompt, own, value in zip(prompts, rewards, values, strict=True):
            if not own:
                continue
            number, total = self.past(prompt)
            rest = sum(own) - len(own) * value
            # every unordered pair of samples once, and each sample with the mean of what was known
            inner = (rest**2 - sum((r - value) ** 2 for r in own)) / 2
            self.pair_sum += inner + (number and rest * (total - number * value))
            self.pair_count += len(own) * (len(own) - 1) / 2 + number * len(own)
            self.noise_sum += value * (1 - value)
            self.noise_count += 1
            self.seen[prompt] = (number + len(own), total + sum(own), self.clock)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(self.__dict__, seen=dict(self.seen))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        self.__dict__.update(state)
