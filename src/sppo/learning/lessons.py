"""Verified solutions that are learnt by supervision beside a step's update. They are no samples of the policy: the critic never sees them."""

from __future__ import annotations

from dataclasses import dataclass

from .batch import Batch


@dataclass(frozen=True, slots=True)
class Lessons:
    """Solutions, and how much each of them counts in the loss."""

    batch: Batch
    weights: list[float]
    """One per row of the batch."""
    most: int
    """How many there could have been: the loss is divided by this, so that a single lesson does not get the weight of all."""
