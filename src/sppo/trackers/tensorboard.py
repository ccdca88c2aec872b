"""TensorBoard: event files in the run directory.

`tensorboard`, `tensorboard:folder=logs`; look: tensorboard --logdir RUN/tensorboard.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import TrackedRun


def build(run: TrackedRun, folder: str = "") -> TensorBoard:
    """Raises ImportError without the package."""
    return TensorBoard(Path(folder) / run.name if folder else run.folder / "tensorboard", run)


class TensorBoard:
    """A summary writer; a resumed run's steps hide those that were lost."""

    def __init__(self, folder: Path, run: TrackedRun) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter
        self.id = str(folder)
        self.writer = SummaryWriter(str(folder), purge_step=run.step if run.previous else None)
        self.writer.add_text("recipe", "\n".join(f"    {k} = {v}" for k, v in run.recipe.items()), run.step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, summary: Mapping[str, Any]) -> None:
        """Close the file."""
        self.writer.close()
