"""The socket: what the loop asks of anything that samples. An engine is a file here with `build(policy, **options)`.

Token ids go in and token ids come out, never text: what is trained on is exactly what was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..models.policy import Policy


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    batch: int = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One response: its ids (EOS included if the model chose it), their log-probabilities as sampled, why it ended."""

    ids: list[int]
    logps: list[float]
    finish: Literal["stop", "length"]


class Engine(Protocol):
    """Samples responses from the weights it was last synced to."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """One sample for each prompt, in order. A sample depends on its prompt, its seed and the weights alone: not on its
        neighbours, the batch size or the order. `progress` hears how many sequences are finished."""

    def sync(self, policy: Policy) -> None:
        """Take over the policy's weights."""

    def fingerprint(self) -> str:
        """`Policy.fingerprint` of the weights that the engine would sample from now."""
