"""`servegym train` for a scenario of jobs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from servegym.commands.sitting import sitting

if TYPE_CHECKING:
    from servegym.train.workflow import WorkflowTrainer

#: Random job shops, in place of a scenario.
JOB_SHOP = "job-shop"
#: Where a run of `servegym train` stops that was given no time.
DEFAULT_MINUTES = 10.0


def train_scheduler(out: Path, *, base: str, minutes: float, **settings: Any) -> Path:
    """Train as `WorkflowTraining` says and export to `out/policy`; return the ONNX file."""
    from servegym.agents.workflow_network import WorkflowNetworkConfig
    from servegym.agents.workflow_policy import BASES
    from servegym.errors import ConfigError
    from servegym.train.workflow import WorkflowTrainer
    from servegym.train.workflow_settings import WorkflowTraining

    if base not in BASES:
        raise ConfigError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    config = WorkflowTraining(
        max_minutes=DEFAULT_MINUTES if minutes == float("inf") else minutes,
        network=WorkflowNetworkConfig(base=base),
        **settings,
    )
    trainer = WorkflowTrainer(config, out)
    logging.getLogger("servegym.train.workflow").setLevel(logging.INFO)
    columns = (TextColumn("[bold]{task.description}"), BarColumn())
    with sitting(trainer):
        with Progress(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task("training", total=1.0)
            trainer.run(lambda text, share: bar.update(task, description=text, completed=share))
        return export_trained(trainer, out / "policy")


def export_trained(trainer: WorkflowTrainer, folder: Path) -> Path:
    """Export a trained network with decisions from its scenario to check against."""
    from servegym.export.workflow import export_scheduler

    config = trainer.config
    return export_scheduler(
        trainer.network,
        folder,
        trainer.samples(),
        scenario=config.scenario,
        objective=trainer.objective,
        training={
            "algorithm": "cross-entropy search and ppo",
            "generations": trainer.search.generation,
            "updates": trainer.update,
            "minutes": round(trainer.spent_s / 60.0, 2),
            "seed": config.seed,
            "gain": round(trainer.gain, 4),
        },
    )
