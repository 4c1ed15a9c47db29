"""Trackers get what TensorBoard gets, and a run that goes on goes on there."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.commands import sitting
from servegym.errors import ConfigError
from servegym.train import tracking
from servegym.train.counterfactual import CounterfactualTrainer
from servegym.train.counterfactual_settings import CounterfactualTraining
from servegym.train.tracking import MlflowTracker, Tracker, WandbTracker


class Kept(Tracker):
    """Keeps what it gets."""

    def __init__(self, folder) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished: bool | None = None

    def log(self, stats, step) -> None:
        self.rows.append((step, dict(stats)))

    def close(self, *, finished) -> None:
        self.finished = finished


@pytest.fixture
def trainer(write_scenario, tmp_path) -> CounterfactualTrainer:
    config = CounterfactualTraining(
        scenario=write_scenario(),
        total_labels=32,
        num_envs=4,
        num_steps=16,
        num_samples=2,
        num_requests=40,
        memory=48,
        num_batches=1,
        batch=8,
        validate_every=1,
        validation_episodes=1,
        validation_requests=20,
    )
    return CounterfactualTrainer(config, tmp_path / "run")


def test_a_tracker_gets_what_tensorboard_gets(trainer, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Kept)
    sitting.trained(trainer, ["mlflow"])
    (kept,) = trainer.trackers
    assert kept.finished
    log = EventAccumulator(str(trainer.folder.path / "tensorboard"))
    log.Reload()
    names = {name for _, stats in kept.rows for name in stats}
    assert names == set(log.Tags()["scalars"])
    for name in names:
        rows = [(step, stats[name]) for step, stats in kept.rows if name in stats]
        assert [event.step for event in log.Scalars(name)] == [step for step, _ in rows]
        values = [event.value for event in log.Scalars(name)]
        assert values == pytest.approx([value for _, value in rows], rel=1e-5)


def test_one_that_is_not_there_is_named(trainer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"--track wandb needs wandb: pip install -e '.\[wandb\]'"
    ):
        WandbTracker(trainer.folder)


@pytest.mark.filterwarnings("ignore")  # of MLflow's own making
def test_mlflow_goes_on_with_the_run_of_the_folder(trainer, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow")
    pytest.importorskip("sqlalchemy", reason="what MLflow keeps files with")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    first = MlflowTracker(trainer.folder)
    first.log({"validation/gain": 0.25}, 8)
    first.close(finished=False)
    again = MlflowTracker(trainer.folder)
    assert again.run_id == first.run_id
    again.log({"validation/gain": 0.5}, 16)
    again.close(finished=True)
    client = mlflow.MlflowClient()
    found = client.get_metric_history(first.run_id, "validation/gain")
    assert [(m.step, m.value) for m in found] == [(8, 0.25), (16, 0.5)]
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["num_envs"] == "4"
    assert run.data.params["network.base"] == "added-delay"


@pytest.mark.filterwarnings("ignore")  # of W&B's own making
def test_wandb_writes_a_run_without_a_network(trainer, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WandbTracker(trainer.folder)
    tracker.log({"validation/gain": 0.25}, 8)
    tracker.close(finished=True)
    wandb.teardown()  # its own process writes
    (file,) = (trainer.folder.path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"validation/gain" in file.read_bytes()
