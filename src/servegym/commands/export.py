"""`servegym export`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from servegym.commands.console import make_console
from servegym.commands.train import exported, require_torch
from servegym.commands.train_workflow import export_run, is_scheduler_run
from servegym.errors import ExportError


@dataclass(frozen=True)
class Export:
    """Export the checkpoint of a training run to policy.onnx and manifest.json."""

    run_folder: Path
    """Folder that `servegym train --out` has written."""
    out: Path | None = None
    """Where to; by default `policy/` in the run's folder."""

    def run(self) -> None:
        """Export."""
        require_torch()
        from servegym.agents.network import DispatchNetwork, NetworkConfig
        from servegym.train.ppo import PPOConfig, read_checkpoint

        checkpoint, settings = self.run_folder / "checkpoint.pt", self.run_folder / "config.json"
        if not (checkpoint.is_file() and settings.is_file()):
            raise ExportError(
                f"{self.run_folder} is no training run: it needs checkpoint.pt and config.json"
            )
        folder = self.out or self.run_folder / "policy"
        scheduler = is_scheduler_run(settings)
        if scheduler is not None:
            path = export_run(self.run_folder, scheduler, folder)
            make_console().print(f"policy: {path}")
            return
        content = read_checkpoint(checkpoint)
        try:
            raw = json.loads(settings.read_text())
            network_config = NetworkConfig.model_validate(raw["network"])
        except (KeyError, ValueError) as error:
            raise ExportError(f"{settings} does not describe a training run") from error
        network = DispatchNetwork(network_config)
        network.load_state_dict(content["best"])
        config = PPOConfig(
            scenario=raw["scenario"],
            num_envs=raw["num_envs"],
            num_steps=raw["num_steps"],
            load=tuple(raw["load"]),
            seed=raw["seed"],
            network=network_config,
        )
        path = exported(network, config, folder, int(content["update"]), {})
        make_console().print(f"policy: {path}")
