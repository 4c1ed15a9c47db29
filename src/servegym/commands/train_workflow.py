"""`servegym train` and `servegym export` for a scenario of jobs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from servegym.errors import ExportError

if TYPE_CHECKING:
    from servegym.train.workflow import WorkflowTrainer, WorkflowTraining

#: Random job shops, in place of a scenario.
JOB_SHOP = "job-shop"
#: Where a run of `servegym train` stops that was given no time.
DEFAULT_MINUTES = 10.0


def train_scheduler(out: Path, *, base: str, minutes: float, **settings: Any) -> Path:
    """Train as `WorkflowTraining` says and export to `out/policy`; return the ONNX file."""
    from servegym.agents.workflow_network import WorkflowNetworkConfig
    from servegym.agents.workflow_policy import BASES
    from servegym.errors import ConfigError
    from servegym.train.workflow import WorkflowTrainer, WorkflowTraining

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


def export_run(run_folder: Path, raw: dict[str, Any], folder: Path) -> Path:
    """Export the best network of a training run, as its `config.json` describes it."""
    from servegym.agents.workflow_network import WorkflowNetworkConfig
    from servegym.train.workflow import WorkflowTrainer

    try:
        config = _config(raw, WorkflowNetworkConfig.model_validate(raw["network"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{run_folder / 'config.json'} does not describe a training run"
        ) from error
    trainer = WorkflowTrainer(config, run_folder)
    trainer.resume()
    return export_trained(trainer, folder)


def _config(raw: dict[str, Any], network: Any) -> WorkflowTraining:
    from dataclasses import fields

    from servegym.train.workflow import WorkflowTraining

    values = {f.name: raw[f.name] for f in fields(WorkflowTraining) if f.name != "network"}
    values |= {name: tuple(raw[name]) for name in ("load", "num_jobs")}
    return WorkflowTraining(**values, network=network)


def is_scheduler_run(settings: Path) -> dict[str, Any] | None:
    """Return the settings of a run that trained a scheduler of jobs; None if it did not."""
    try:
        raw = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) and raw.get("kind") == "workflow" else None
