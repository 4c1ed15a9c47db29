"""Experiment trackers beside TensorBoard: what a run logs, in MLflow or Weights & Biases.

Where they send it is said to them in their own ways: MLFLOW_TRACKING_URI, WANDB_MODE=offline and so
on. A run that goes on goes on there, too.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from servegym.errors import ConfigError
from servegym.train.run_folder import RunFolder, digest

TrackerName = Literal["mlflow", "wandb"]
PROJECT = "servegym"
#: Tag of MLflow's runs by which one that goes on is found.
_TAG = "servegym.run"


class Tracker(ABC):
    """Takes what a run logs."""

    @abstractmethod
    def log(self, stats: Mapping[str, float], step: int) -> None:
        """Take the numbers of an update; `step` is TensorBoard's."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """End the sitting; whether the run is finished."""


class MlflowTracker(Tracker):
    """A run of experiment `servegym`."""

    def __init__(self, folder: RunFolder) -> None:
        mlflow = _library("mlflow")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        mine = f"tags.`{_TAG}` = '{_name(folder)}'"
        runs = self._client.search_runs([experiment], mine)
        if runs:
            self.run_id = runs[0].info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        tags = {_TAG: _name(folder)}
        made = self._client.create_run(experiment, run_name=folder.path.name, tags=tags)
        self.run_id = made.info.run_id
        params = [
            self._entities.Param(name, str(value)) for name, value in _settings(folder).items()
        ]
        self._client.log_batch(self.run_id, params=params)

    @override
    def log(self, stats: Mapping[str, float], step: int) -> None:
        now_ms = int(1000 * time.time())
        metrics = [self._entities.Metric(k, float(v), now_ms, step) for k, v in stats.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    @override
    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


class WandbTracker(Tracker):
    """A run of project `servegym`; its files are in the run's folder."""

    def __init__(self, folder: RunFolder) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        self._run = _library("wandb").init(
            project=PROJECT,
            dir=str(folder.path),
            id=_name(folder),
            name=folder.path.name,
            config=_settings(folder),
            resume="allow",
        )

    @override
    def log(self, stats: Mapping[str, float], step: int) -> None:
        self._run.log(dict(stats), step=step)

    @override
    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: dict[TrackerName, Callable[[RunFolder], Tracker]] = {
    "mlflow": MlflowTracker,
    "wandb": WandbTracker,
}


def _name(folder: RunFolder) -> str:
    """Name a run: the same whenever it goes on, another in another folder."""
    place: Path = folder.path.absolute()
    return hashlib.sha256(f"{digest(folder.configuration)} {place}".encode()).hexdigest()[:12]


def _settings(folder: RunFolder) -> dict[str, Any]:
    """Return all settings by name, those of the network as `network.NAME`."""
    flat: dict[str, Any] = {}
    for name, value in folder.configuration["settings"].items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{key}".rstrip("."): x for key, x in inner}
    return flat


def _library(name: TrackerName) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ConfigError(
            f"--track {name} needs {error.name}: pip install -e '.[{name}]' in a checkout of"
            " servegym"
        ) from error
