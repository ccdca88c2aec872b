"""A learner's part of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..models.policy import Policy

STATE_FILE = "learner.pt"
"""In a checkpoint: everything but the models' weights."""


class Saved:
    """What a learner writes to a checkpoint's folder, and takes back from there. On several ranks all must ask for it; rank 0 writes."""

    policy: Policy
    credit: Any

    def state_dict(self) -> dict[str, Any]:
        """See `Learner`."""
        raise TypeError(f"{type(self).__name__} has no state")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        raise TypeError(f"{type(self).__name__} has no state")

    def save(self, folder: Path) -> None:
        """Write models and state."""
        self.policy.save(folder / "policy")
        if self.credit.critic is not None:
            self.credit.critic.save(folder / "critic")
        state = self.state_dict()
        if self.policy.mesh.rank == 0:
            with (folder / STATE_FILE).open(
                "wb"
            ) as file:  # a file object keeps the system's own error: "no space left"
                torch.save(state, file)

    def load(self, folder: Path) -> None:
        """Take the state back; the models were loaded from the folder already."""
        self.load_state_dict(torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu"))
