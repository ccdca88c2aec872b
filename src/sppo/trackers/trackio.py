"""Trackio, Hugging Face's local tracker.

`trackio`, `trackio:project=mine,space=me/board`; look: trackio show --project sppo.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from .base import TrackedRun


def build(run: TrackedRun, project: str = "sppo", space: str = "", name: str = "") -> Trackio:
    """Raises what trackio raises."""
    return Trackio(run, project, space or None, run.previous or name or run.name)


class Trackio:
    """One run there; resumed under the same name."""

    def __init__(self, run: TrackedRun, project: str, space: str | None, name: str) -> None:
        import trackio

        self.library = trackio
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a greeting on stdout
            self.run = trackio.init(
                project=project, name=name, space_id=space, config=dict(run.recipe), resume="allow", embed=False, auto_log_cpu=False,
                auto_log_gpu=False,
            )  # fmt: skip
        self.id = name

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row."""
        self.run.log(dict(metrics), step=step)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Finish the run; Trackio has no place for a summary."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.library.finish()  # not the run's own, which would be done again at exit, on stdout
