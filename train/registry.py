"""All trainers, by the problem that they learn."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from servegym.train.training_run import TrainingRun


class Entry(NamedTuple):
    """Where a trainer is; it is imported when it is needed, and PyTorch with it."""

    folder: str  # what runs' folders begin with
    settings_place: str
    trainer_place: str

    @property
    def settings(self) -> type[Any]:
        """Its settings, without PyTorch."""
        found: type[Any] = resolve_name(self.settings_place)
        return found

    @property
    def trainer(self) -> type[TrainingRun[Any, Any, Any]]:
        """Itself."""
        found: type[TrainingRun[Any, Any, Any]] = resolve_name(self.trainer_place)
        return found


TRAINERS = {
    "dispatch": Entry("ppo", "servegym.train.ppo_settings:PPOConfig", "servegym.train.ppo:Trainer"),
    "order": Entry(
        "order",
        "servegym.train.ordering_settings:OrderingTraining",
        "servegym.train.ordering:OrderingTrainer",
    ),
    "workflow": Entry(
        "jobs",
        "servegym.train.workflow_settings:WorkflowTraining",
        "servegym.train.workflow:WorkflowTrainer",
    ),
}
