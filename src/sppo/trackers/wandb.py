"""Weights & Biases.

`wandb`, `wandb:project=mine,entity=us,mode=offline`; offline runs go up later with `wandb sync`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import TrackedRun


def build(run: TrackedRun, project: str = "sppo", entity: str = "", mode: str = "", name: str = "") -> WandB:
    """Raises what wandb raises: no key, no network (`mode=offline` needs neither)."""
    return WandB(run, project, entity or None, mode or None, name or run.name)


class WandB:
    """One run there; resumed under the same id."""

    def __init__(self, run: TrackedRun, project: str, entity: str | None, mode: Any, name: str) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        self.run = wandb.init(
            project=project, entity=entity, mode=mode, name=name, id=run.previous, resume="allow" if run.previous else None,
            dir=str(run.folder), config=dict(run.recipe), settings=settings, reinit="create_new",
        )  # fmt: skip
        self.id = str(self.run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row."""
        self.run.log(dict(metrics), step=step)

    def close(self, summary: Mapping[str, Any]) -> None:
        """The summary, and the end."""
        for key, value in summary.items():
            self.run.summary[key] = value
        self.run.finish(exit_code=0 if summary else 1)
