"""`servegym export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from servegym.commands.console import make_console
from servegym.commands.train import exported, require_torch
from servegym.commands.train_ordering import exported_order
from servegym.commands.train_workflow import export_trained
from servegym.errors import ExportError

if TYPE_CHECKING:
    from servegym.train.run_folder import StoredRun


@dataclass(frozen=True)
class Export:
    """Export the best of a training run, finished or not, with its manifest."""

    run_folder: Path
    """Folder that `servegym train --out` has written."""
    out: Path | None = None
    """Where to; by default `policy/` in the run's folder, for an order the run's folder."""

    def run(self) -> None:
        """Export."""
        require_torch()
        from servegym.train.run_folder import CHECKPOINT, CONFIG, StoredRun

        if not all((self.run_folder / name).is_file() for name in (CONFIG, CHECKPOINT)):
            raise ExportError(
                f"{self.run_folder} is no training run: it needs {CHECKPOINT} and {CONFIG}"
            )
        stored = StoredRun.read(self.run_folder)
        export = {"dispatcher": _dispatcher, "order": _order, "scheduler": _scheduler}[stored.kind]
        make_console().print(f"policy: {export(stored, self.out)}")


def _dispatcher(stored: StoredRun, out: Path | None) -> Path:
    from servegym.agents.network import DispatchNetwork
    from servegym.train.ppo import PPOConfig
    from servegym.train.run_folder import read_checkpoint, restoring

    config = stored.rebuild(PPOConfig)
    content = read_checkpoint(stored.path, stored.configuration)
    network = DispatchNetwork(config.network)
    with restoring(stored.path):
        network.load_state_dict(content["best"])
        update, last = int(content["update"]), dict(content["last"])
    return exported(network, config, out or stored.path / "policy", update, last)


def _order(stored: StoredRun, out: Path | None) -> Path:
    from servegym.train.ordering import OrderingTrainer, OrderingTraining

    trainer = OrderingTrainer(stored.rebuild(OrderingTraining), stored.path)
    trainer.prepare()
    return exported_order(trainer.found(), trainer.config, out or stored.path)


def _scheduler(stored: StoredRun, out: Path | None) -> Path:
    from servegym.train.workflow import WorkflowTrainer
    from servegym.train.workflow_settings import WorkflowTraining

    trainer = WorkflowTrainer(stored.rebuild(WorkflowTraining), stored.path)
    trainer.prepare()
    return export_trained(trainer, out or stored.path / "policy")
