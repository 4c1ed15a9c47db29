"""`servegym train` for a scenario of one engine: the order of its requests."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from servegym.commands.sitting import sitting
from servegym.export.ordering import save_ordering

if TYPE_CHECKING:
    from servegym.train.ordering import OrderingTraining, Trained

#: Where a run stops that was given no time.
DEFAULT_MINUTES = 10.0


def train_order(out: Path, *, minutes: float, **settings: Any) -> Path:
    """Train as `OrderingTraining` says and write `out/ordering.npz` with its manifest."""
    from servegym.train.ordering import OrderingTrainer, OrderingTraining

    config = OrderingTraining(
        max_minutes=DEFAULT_MINUTES if minutes == float("inf") else minutes, **settings
    )
    trainer = OrderingTrainer(config, out)
    logging.getLogger("servegym.train.ordering").setLevel(logging.INFO)
    columns = (TextColumn("[bold]{task.description}"), BarColumn())
    with sitting(trainer):
        with Progress(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task("training", total=1.0)
            found = trainer.run(
                lambda text, share: bar.update(task, description=text, completed=share)
            )
        return exported_order(found, config, out)


def exported_order(found: Trained, config: OrderingTraining, folder: Path) -> Path:
    """Write what a run has found as a file for the plug-in."""
    return save_ordering(
        found.weights,
        folder,
        found.samples,
        training={
            "algorithm": "cross-entropy search",
            "scenario": config.scenario,
            "generations": found.generations,
            "minutes": round(found.spent_s / 60.0, 2),
            "seed": config.seed,
            "validation_loss": round(found.loss, 5),
            "validation_loss_srpt": round(found.base_loss, 5),
        },
    )
