"""`servegym export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from servegym.commands.console import make_console
from servegym.commands.train import require_torch
from servegym.errors import ExportError
from servegym.train.registry import trainer_of


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
        trainer = trainer_of(StoredRun.read(self.run_folder)).trainer.stored(self.run_folder)
        make_console().print(f"policy: {trainer.export(self.out)}")
