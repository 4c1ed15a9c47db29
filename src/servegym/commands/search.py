"""`servegym search`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.progress import Progress

from servegym.commands.console import make_console
from servegym.commands.train import Train
from servegym.train.hyperparameters import search


@dataclass(frozen=True)
class Search(Train):
    """Search a learner's settings with Optuna: each trial is a training run in the folder.

    Options are those of `servegym train`; those that are searched are chosen by the trials. A trial
    that does worse on validation episodes than the median of the others at the same update is
    stopped. A search that was killed goes on with the same command. `servegym train --settings
    FILE` trains with what was found.
    """

    trials: int = 20
    """Trials in all; `--minutes` and `--updates` are those of each."""

    def run(self) -> None:
        """Search, and say what was found."""
        entry, settings, out = self.asked("search-")
        learner = self.learner or entry.folder
        with Progress(transient=True) as bar:
            task = bar.add_task("search", total=1.0)
            found = search(
                learner,
                entry,
                settings,
                out,
                num_trials=self.trials,
                progress=lambda text, share: bar.update(task, description=text, completed=share),
            )
        make_console().print(
            f"{found.num_trials} trials to the end, {found.num_pruned} stopped early; best score"
            f" {found.score:.4f}\nrun: {found.run_folder}\n"
            f"servegym train --scenario {self.scenario} --settings {found.settings}",
            soft_wrap=True,
            highlight=False,
        )
