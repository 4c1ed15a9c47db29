"""All trainers, by the problem that they learn."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

from servegym.errors import ConfigError
from servegym.scenario import Scenario

if TYPE_CHECKING:
    from servegym.train.run_folder import StoredRun
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


#: All trainers of a problem by what `--learner` calls them; the first is used unless one is named,
#: but for fleets in which two kinds of decisions are taken.
LEARNERS = {
    "dispatch": {
        "ppo": Entry("ppo", "servegym.train.ppo_settings:PPOConfig", "servegym.train.ppo:Trainer"),
        "counterfactual": Entry(
            "counterfactual",
            "servegym.train.counterfactual_settings:CounterfactualTraining",
            "servegym.train.counterfactual:CounterfactualTrainer",
        ),
        "cross-entropy": Entry(
            "cross-entropy",
            "servegym.train.cross_entropy_settings:CrossEntropyTraining",
            "servegym.train.cross_entropy:CrossEntropyTrainer",
        ),
        "search": Entry(
            "search",
            "servegym.train.fleet_search_settings:FleetSearchTraining",
            "servegym.train.fleet_search:FleetSearchTrainer",
        ),
        "evolve": Entry(
            "evolve",
            "servegym.train.evolve_settings:EvolveTraining",
            "servegym.train.evolve:EvolveTrainer",
        ),
        "joint": Entry(
            "joint",
            "servegym.train.joint_settings:JointTraining",
            "servegym.train.joint:JointTrainer",
        ),
        "mappo": Entry(
            "mappo",
            "servegym.train.mappo_settings:MappoTraining",
            "servegym.train.mappo:MappoTrainer",
        ),
        "offline": Entry(
            "offline",
            "servegym.train.offline_settings:OfflineTraining",
            "servegym.train.offline:OfflineTrainer",
        ),
        "rllib": Entry(
            "rllib",
            "servegym.train.rllib_settings:RllibTraining",
            "servegym.train.rllib:RllibTrainer",
        ),
    },
    "order": {
        "search": Entry(
            "order",
            "servegym.train.ordering_settings:OrderingTraining",
            "servegym.train.ordering:OrderingTrainer",
        ),
        "ppo": Entry(
            "order-ppo",
            "servegym.train.order_ppo_settings:OrderPPOTraining",
            "servegym.train.order_ppo:OrderPPOTrainer",
        ),
    },
    "workflow": {
        "search-ppo": Entry(
            "jobs",
            "servegym.train.workflow_settings:WorkflowTraining",
            "servegym.train.workflow:WorkflowTrainer",
        ),
    },
}

#: The first trainer of each problem.
TRAINERS = {problem: next(iter(entries.values())) for problem, entries in LEARNERS.items()}


def find_trainer(problem: str, learner: str | None = None, scenario: Any = None) -> Entry:
    """Return a problem's trainer.

    Args:
        problem: Its name.
        learner: What `--learner` calls it. Otherwise it is the problem's first, and for a fleet
            whose engines take orders, or in which KV moves, the one that trains both decisions.
        scenario: What is trained on, if it matters.

    Raises:
        ConfigError: If the problem has no such learner.
    """
    entries = LEARNERS[problem]
    if learner is None and isinstance(scenario, Scenario):
        if scenario.orders_fleet:
            return entries["joint"]
        if scenario.spec.moves_kv or scenario.spec.tiered:
            return entries["search"]
    if learner is None:
        return TRAINERS[problem]
    if learner not in entries:
        raise ConfigError(
            f"problem {problem} has no learner {learner}: choose {' or '.join(entries)}"
        )
    return entries[learner]


def trainer_of(run: StoredRun) -> Entry:
    """Return the trainer that made a run; those that do not name their learner are the first's."""
    return find_trainer(run.problem, run.settings.get("learner"))
