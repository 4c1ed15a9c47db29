"""The command `servegym serve picker`."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from servegym.commands.console import make_console
from servegym.commands.serve_check import conclude_check
from servegym.errors import ConfigError

if TYPE_CHECKING:
    from servegym.serve.picker.app import Picker
    from servegym.serve.picker.config import PickerConfig


def require_picker_extra() -> None:
    """Say what to install if the extra for endpoint pickers is missing."""
    for module, package in (
        ("aiohttp", "aiohttp"),
        ("httptools", "httptools"),
        ("grpc", "grpcio"),
        ("grpc_health", "grpcio-health-checking"),
    ):
        if find_spec(module) is None:
            raise ConfigError(f"an endpoint picker needs {package}: pip install {package}")


@dataclass(frozen=True)
class ServePicker:
    """Tell a gateway (Envoy's external processing) where requests go; see docs/picker.md."""

    config: Path
    """YAML file of the picker."""
    check: bool = False
    """Only check the file, the policy it names, and whether its replicas are there."""
    offline: bool = False
    """Leave the replicas out of the check."""

    def run(self) -> None:
        """Pick endpoints until the program is stopped."""
        require_picker_extra()
        from servegym.serve.picker.app import serve
        from servegym.serve.picker.config import read_picker_config

        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
        config = read_picker_config(self.config)
        console = make_console()
        if self.check:
            problems = _problems(config, ask=not self.offline)
            conclude_check(console, self.config, problems, offline=self.offline)
            return

        def ready(picker: Picker) -> None:
            runtime, listen = picker.dispatcher.runtime, config.listen
            policy = runtime.loaded.text if runtime.loaded else runtime.config.fallback
            console.print(
                f"{policy} ({runtime.mode}) picks of {len(picker.fleet)} replicas: "
                f"grpc://{listen.host}:{picker.port}, "
                f"operators: http://127.0.0.1:{picker.admin_port}"
            )
            state = picker.dispatcher.state
            for member in picker.fleet:
                replica = member.replica
                if not state.is_up(member.slot):
                    console.print(
                        f"{replica.name} is down: {replica.url}{config.health.path} has not "
                        "answered well yet; it is picked once it does",
                        markup=False,
                    )

        serve(config, ready)


def _problems(config: PickerConfig, *, ask: bool) -> list[str]:
    """Say, a sentence each, what a file that can be read is wrong about."""
    from servegym.serve.picker.app import Picker
    from servegym.serve.router.probe import probe

    dispatcher = Picker(config).dispatcher
    dispatcher.close()
    reason = dispatcher.runtime.never_decides()
    found = [reason] if reason else []
    if ask:
        found += asyncio.run(probe(config.as_router()))
    return found
