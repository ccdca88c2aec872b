"""MLflow.

`mlflow`, `mlflow:uri=http://host:5000,experiment=mine`; without uri: MLFLOW_TRACKING_URI, else a database file in the
run directory.
"""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Mapping
from typing import Any

from .base import TrackedRun

LONGEST = 6000
"""MLflow's limit on the characters of a parameter."""
REFUSED = re.compile(r"[^\w./ -]")
"""Characters that its names may not hold."""


def build(run: TrackedRun, uri: str = "", experiment: str = "sppo") -> MLflow:
    """Raises what MLflow raises."""
    where = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
    return MLflow(run, where, experiment)


class MLflow:
    """One run there, through the client, which keeps no global state."""

    def __init__(self, run: TrackedRun, uri: str, experiment: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that it imports
            from mlflow.tracking import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table that it makes
            logging.getLogger("alembic").setLevel(logging.WARNING)

            self.client: Any = MlflowClient(tracking_uri=uri)
            found = self.client.get_experiment_by_name(experiment)
            place = found.experiment_id if found else self.client.create_experiment(experiment)
            if run.previous:
                self.id = run.previous
                self.client.update_run(self.id, status="RUNNING")
                return
            self.id = str(self.client.create_run(place, run_name=run.name).info.run_id)
            for key, value in run.recipe.items():
                self.client.log_param(self.id, key, str(value)[:LONGEST])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One batch.

        Signs that MLflow refuses in names (as in pass@4) become underscores; one would lose the whole batch.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self.client.log_batch(
                self.id, metrics=[Metric(REFUSED.sub("_", name), value, now, step) for name, value in metrics.items()]
            )

    def close(self, summary: Mapping[str, Any]) -> None:
        """Tags, and the end."""
        for key, value in summary.items():
            self.client.set_tag(self.id, key, str(value)[:LONGEST])
        self.client.set_terminated(self.id, "FINISHED" if summary else "FAILED")
