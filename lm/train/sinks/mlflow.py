"""MLflow: a run on the tracking server, or in the files or the database, that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from lm.train.sinks.sink import PROJECT, Numbers, Sink, Target

MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 500  # of one request


class TrackedRun:
    """A run of MLflow; each number has its step in the stage."""

    def __init__(self, target: Target):
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.client = MlflowClient()
        if target.known:
            self.run = target.known
            self.client.update_run(self.run, status="RUNNING")
        else:
            self.run = self._create(target)
        self.where = f"run {self.run} at {self.client.tracking_uri}"
        self._add_params(target)

    def _create(self, target: Target) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        return self.client.create_run(experiment, run_name=target.experiment.name).info.run_id

    def _add_params(self, target: Target) -> None:
        """Set the experiment's fields as parameters, which cannot change once they are set."""
        known = self.client.get_run(self.run).data.params
        new = [
            Param(_key(name), str(value)[:LONGEST_PARAM])
            for name, value in target.config.items()
            if _key(name) not in known
        ]
        for start in range(0, len(new), MOST_PARAMS):
            self.client.log_batch(self.run, params=new[start : start + MOST_PARAMS])

    def send(self, lines: Sequence[Numbers]) -> None:
        now = int(time.time() * 1000)
        found = [Metric(_key(name), value, now, line.step) for line in lines for name, value in line.named.items()]
        for start in range(0, len(found), MOST_METRICS):
            self.client.log_batch(self.run, metrics=found[start : start + MOST_METRICS])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _key(name: str) -> str:
    """The name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def open_sink(target: Target) -> Sink:
    return TrackedRun(target)
