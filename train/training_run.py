"""A training run: stages of updates, what is validated, kept, saved and gone on with.

Every trainer is such a run, and says only what differs: how it begins, what one update does, how
the present policy does on validation episodes, what the rest of the run depends on, and what is
exported. TensorBoard has the same names for all: docs/training.md.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from servegym.errors import ConfigError
from servegym.train.budget import Budget
from servegym.train.run_folder import RunFolder, StoredRun, restoring
from servegym.train.tracking import Tracker
from servegym.train.validation import Validated

_log = logging.getLogger(__name__)


class Settings(Protocol):
    """What all trainers' settings have."""

    @property
    def scenario(self) -> str:
        """Name or path of what is played."""
        ...

    @property
    def max_minutes(self) -> float:
        """Wall-clock minutes after which training ends."""
        ...


C = TypeVar("C", bound=Settings)
S = TypeVar("S")
Found = TypeVar("Found")

#: Called with what is done and the share of the run that is over.
Progress = Callable[[str, float], None]


class Stage(NamedTuple):
    """A part of a run."""

    name: str
    unit: str  # what its updates are called, in the plural


class TrainingRun(ABC, Generic[C, S, Found]):
    """A run in a folder: configuration, checkpoint, TensorBoard log.

    Args:
        config: Settings.
        folder: Where the run is; or a run that was stored, to export what it has found.

    Raises:
        ConfigError: If the folder holds a run with another configuration.
        OutputError: If it cannot be written.

    Attributes:
        config: Settings.
        scenario: What is trained on.
        folder: The run's folder.
        stage: Number of the stage that is played; that of all at the end.
        updates: How many there have been of each stage.
        best: What did best on validation episodes.
        history: What was logged in this sitting, an entry an update.
        last: What was logged last under each name.
        trackers: Who else takes what is logged.
        finished: Whether nothing is left to do.
    """

    problem: ClassVar[str]
    settings: ClassVar[type[Any]]
    stages: ClassVar[tuple[Stage, ...]]
    #: Of TensorBoard, in an update.
    steps_per_update = 1

    def __init__(self, config: C, folder: Path | StoredRun) -> None:
        self._created_s = time.monotonic()
        if isinstance(folder, StoredRun):
            self.scenario = self.stored_scenario(folder.configuration["scenario"])
            self.config = config
            self.folder = RunFolder.stored(folder)
        else:
            self.scenario = self.load_scenario(config.scenario)
            self.config = self.completed(config, self.scenario)
            contents = self.scenario_contents(self.scenario)
            self.folder = RunFolder(folder, self.problem, self.config, contents)
        self.budget = Budget(config.max_minutes)
        self.spent_s = self.update_s = self.validate_s = 0.0
        self.stage, self.updates = 0, [0] * len(self.stages)
        self.best: Any = None
        self.first_scores = self.best_scores = np.empty(0)
        self.lines: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.last: dict[str, float] = {}
        self.trackers: list[Tracker] = []
        self.finished = self._prepared = False

    @classmethod
    def stored(cls, folder: Path) -> Self:
        """Open a run to export what it has found, whatever has changed since.

        Raises:
            ConfigError: If there is none, or it is broken.
        """
        stored = StoredRun.read(folder)
        run = cls(stored.rebuild(cls.settings), stored)
        content = run.folder.begin()
        if content is None:
            raise ConfigError(f"{folder} has no checkpoint yet: train first")
        if "first_scores" not in content:
            run.first_scores = run.validate().scores
        run._restore(content)
        return run

    @staticmethod
    @abstractmethod
    def load_scenario(name_or_path: str) -> S:
        """Load what is trained on."""

    @classmethod
    @abstractmethod
    def stored_scenario(cls, contents: Mapping[str, Any]) -> S:
        """Make a scenario again from what a run's configuration holds of it."""

    @staticmethod
    def scenario_contents(scenario: Any) -> dict[str, Any]:
        """Return what a scenario says, as the configuration of a run holds it."""
        contents: dict[str, Any] = scenario.model_dump(mode="json")
        return contents

    @staticmethod
    def completed(config: C, scenario: S) -> C:
        """Return settings with what follows from the scenario; as given unless overridden."""
        return config

    @abstractmethod
    def warm_up(self) -> None:
        """Compile, and do what must be done before a sitting of a run that is not finished."""

    @abstractmethod
    def goes_on(self) -> bool:
        """Whether the present stage has another update, and what must follow it has time."""

    def open_stage(self) -> None:
        """Begin the present stage; nothing unless overridden."""

    @abstractmethod
    def improve(self) -> dict[str, float]:
        """Make one update of the present stage; return what is logged of it."""

    def close_stage(self) -> None:
        """End the present stage; nothing unless overridden."""

    @property
    @abstractmethod
    def references(self) -> tuple[str, ...]:
        """Rules whose objective on the validation episodes is drawn beside the run's."""

    @property
    @abstractmethod
    def validate_every(self) -> int:
        """Updates of the present stage between validations."""

    @property
    def save_every(self) -> int:
        """Updates of the present stage between checkpoints."""
        return self.validate_every

    @abstractmethod
    def validate(self) -> Validated:
        """Play the validation episodes under the present policy."""

    @abstractmethod
    def validate_rule(self, name: str) -> Validated:
        """Play them under a rule."""

    @abstractmethod
    def parameters(self) -> Any:
        """Return a copy of the present policy, as a checkpoint can hold it."""

    @abstractmethod
    def take_best(self) -> None:
        """Make the best policy the present one; fails if it does not fit."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return all else that the rest of the run depends on, as a checkpoint can hold it."""

    @abstractmethod
    def restore(self, content: Mapping[str, Any]) -> None:
        """Take up what `state` has returned."""

    @abstractmethod
    def share_of_updates(self) -> float:
        """Share of the run that is over, by the number of updates alone."""

    @abstractmethod
    def found(self) -> Found:
        """Return the best up to now."""

    @abstractmethod
    def export(self, folder: Path | None = None) -> Path:
        """Write the best as a policy; return its file.

        Args:
            folder: Where to, instead of the usual place in the run's folder.
        """

    @property
    def gain(self) -> float:
        """How much better the best is than the first: 0.05 means a mean lower by about 5 %."""
        return float((self.first_scores - self.best_scores).mean())

    @property
    def since_best(self) -> float:
        """Validations in a row that found nothing better."""
        return self.last.get("validation/since_best", 0.0)

    @property
    def num_updates_made(self) -> int:
        """Updates of all stages."""
        return sum(self.updates)

    def share(self) -> float:
        """Share of the run that is over, by updates or by the clock."""
        return min(1.0, max(self.share_of_updates(), self.budget.share()))

    def prepare(self) -> float:
        """Compile, and go on from the checkpoint if there is one.

        Returns:
            Seconds since the trainer was made; the budget begins to count now.

        Raises:
            ConfigError: If the checkpoint is broken.
            OutputError: If the folder cannot be written.
        """
        content = self.folder.begin()
        if content is None or "first_scores" not in content:
            self.first_scores = self._validated().scores
        if content is None:
            self.best, self.best_scores = self.parameters(), self.first_scores
        else:
            self._restore(content)
        if not self.finished:
            self.warm_up()
            if not self.lines:
                rules = self.references
                self.lines = {name: self.validate_rule(name).objective for name in rules}
        self.budget.start(self.spent_s)
        self._prepared = True
        return time.monotonic() - self._created_s

    def run(self, progress: Progress = lambda text, share: None) -> Found:
        """Train to the end or the time limit, going on from a checkpoint if there is one."""
        if not self._prepared:
            self.prepare()
        if not self.finished:
            with self.folder.tensorboard(self._step + 1) as writer:
                _add_layout(writer, self.lines)
                while self.stage < len(self.stages):
                    self._play_stage(writer, progress)
        self.take_best()
        return self.found()

    @property
    def _step(self) -> int:
        """What TensorBoard counts."""
        return self.num_updates_made * self.steps_per_update

    def _play_stage(self, writer: SummaryWriter, progress: Progress) -> None:
        """Play the present stage to its end, and go on to the next."""
        stage, begin_s, first_step = self.stage, time.perf_counter(), self._step
        over = not self.goes_on()
        if not over and self.updates[stage] == 0:
            self.open_stage()
        while not over:
            update_begin_s = time.monotonic()
            stats = self.improve()
            self.update_s = time.monotonic() - update_begin_s
            self.updates[stage] += 1
            over = not self.goes_on()
            if over or self.updates[stage] % self.validate_every == 0:
                stats |= self.keep_the_better()
            stats["time/fps"] = (self._step - first_step) / (time.perf_counter() - begin_s)
            for key, value in stats.items():
                writer.add_scalar(key, value, self._step)
            for tracker in self.trackers:
                tracker.log(stats, self._step)
            self.history.append(stats)
            self.last |= stats
            _log.info("%s, update %d: %s", self.stages[stage].name, self.updates[stage], stats)
            if not over and self.updates[stage] % self.save_every == 0:
                self.save()
            progress(self._described(), self.share())
        self.close_stage()
        self.stage += 1
        self.finished = self.stage == len(self.stages)
        self.save()

    def _described(self) -> str:
        """Say how it goes."""
        text = f"{self.stages[self.stage].name}: {self.last['time/fps']:,.3g} steps/s"
        if "validation/objective" in self.last:
            text += f", {self.last['validation/objective']:.4g} on validation episodes"
        return f"{text}, gain {self.gain:+.4f}"

    def keep_the_better(self) -> dict[str, float]:
        """Validate, and keep the present policy if it is the best; return what is logged."""
        found = self._validated()
        better = self.is_better(found)
        if better:
            self.best, self.best_scores = self.parameters(), found.scores
        return {
            "validation/since_best": 0.0 if better else self.since_best + 1.0,
            "validation/objective": found.objective,
            "validation/p99_s": found.p99_s,
            "validation/gain": float((self.first_scores - found.scores).mean()),
            "validation/best_gain": self.gain,
            **{f"reference/{name}": value for name, value in self.lines.items()},
        }

    def is_better(self, found: Validated) -> bool:
        """Whether a policy that was validated is to be kept, instead of the best up to now."""
        return bool(found.scores.mean() < self.best_scores.mean())

    def _validated(self) -> Validated:
        begin_s = time.monotonic()
        found = self.validate()
        self.validate_s = time.monotonic() - begin_s
        return found

    def save(self) -> None:
        """Write all that the rest of the run depends on."""
        self.spent_s = self.budget.spent_s
        made: Counter[str] = Counter()
        for (_, unit), count in zip(self.stages, self.updates, strict=True):
            made[unit] += count
        self.folder.save(
            " and ".join(f"{count} {unit}" for unit, count in made.items()),
            {
                "stage": self.stage,
                "updates": self.updates,
                "best": self.best,
                "best_scores": torch.from_numpy(self.best_scores),
                "first_scores": torch.from_numpy(self.first_scores),
                "lines": self.lines,
                "last": self.last,
                "spent_s": self.spent_s,
                "finished": self.finished,
                **self.state(),
            },
        )

    def _restore(self, content: Mapping[str, Any]) -> None:
        with restoring(self.folder.path):
            self.stage, self.updates = int(content["stage"]), [int(n) for n in content["updates"]]
            self.best, self.best_scores = content["best"], content["best_scores"].numpy()
            if "first_scores" in content:
                self.first_scores = content["first_scores"].numpy()
            self.lines, self.last = dict(content["lines"]), dict(content["last"])
            self.spent_s, self.finished = float(content["spent_s"]), bool(content["finished"])
            self.restore(content)


def copied(network: nn.Module) -> dict[str, Tensor]:
    """Copy the weights of a network."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _add_layout(writer: SummaryWriter, lines: Mapping[str, float]) -> None:
    """Draw the rules' objectives into the chart of the run's own."""
    shown = ["validation/objective", *(f"reference/{name}" for name in lines)]
    writer.add_custom_scalars({"validation": {"objective": ["Multiline", shown]}})
