"""MLflow (https://mlflow.org), a server at MLFLOW_TRACKING_URI; MLFLOW_EXPERIMENT_NAME and its other variables are its
own. The client alone is enough: `mlflow-skinny`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from src.common.runtime.tracker import RUNS, Tracker

BATCH = 100  # parameters of one request
LONGEST = 500  # characters of a parameter's value


class MLflow(Tracker):
    """A run of MLflow with the config as parameters, curves, images and texts."""

    NAME: ClassVar[str] = "mlflow"
    PACKAGE: ClassVar[str] = "mlflow"

    @classmethod
    def check(cls) -> None:
        """Raises ValueError, in one sentence, when the package or the server's address is missing."""
        super().check()
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError(
                "log.trackers has 'mlflow', but MLFLOW_TRACKING_URI is not set: set it to the address of a server, such"
                " as http://localhost:5000"
            )

    def open(self, run: str | None) -> tuple[Any, str]:
        """(client, id of the run): that run, or a new one. Options that changed since it began become tags, since
        MLflow does not let a parameter change."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient()
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", RUNS)
            found = client.get_experiment_by_name(name)
            experiment = client.create_experiment(name) if found is None else found.experiment_id
            run = client.create_run(experiment, run_name=self.workdir.name).info.run_id
        else:
            client.update_run(run, status="RUNNING")
        known = client.get_run(run).data.params
        values = {name: str(value)[:LONGEST] for name, value in self.config.items()}
        fresh = [Param(name, value) for name, value in values.items() if name not in known]
        for i in range(0, len(fresh), BATCH):
            client.log_batch(run, params=fresh[i : i + BATCH])
        for name, value in values.items():
            if known.get(name, value) != value:
                client.set_tag(run, f"now.{name}", value)
        return (client, run), run

    def send(self, handle: Any, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One request for the scalars, one for each image and text."""
        from mlflow.entities import Metric

        client, run = handle
        if kind == "scalars":
            now = int(time.time() * 1000)
            client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in values.items()])
        for name, value in values.items() if kind != "scalars" else ():
            if kind == "images":
                client.log_image(run, np.asarray(value), key=name, step=step)
            else:
                client.log_text(run, value, f"texts/{name}-{step}.txt")

    def end(self, handle: Any) -> None:
        """Marks the run as finished; a run that goes on is marked as running again."""
        client, run = handle
        client.set_terminated(run)
