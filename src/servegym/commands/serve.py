"""`servegym serve`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from servegym.commands.console import make_console
from servegym.commands.serve_engine import ServeEngine
from servegym.errors import ConfigError

if TYPE_CHECKING:
    from servegym.serve.router.app import Router


def require_aiohttp() -> None:
    """Say what to install if the serving extra is missing."""
    if find_spec("aiohttp") is None:
        raise ConfigError("serving needs aiohttp: pip install 'servegym[serve]'")


@dataclass(frozen=True)
class ServeRouter:
    """Route OpenAI requests to replicas by a policy; see docs/live.md for the file."""

    config: Path
    """YAML file of the router."""
    check: bool = False
    """Only check the file and the policy it names."""

    def run(self) -> None:
        """Serve until stopped."""
        require_aiohttp()
        from servegym.serve.router.app import Router, serve
        from servegym.serve.router.config import read_config

        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
        config = read_config(self.config)
        console = make_console()
        if self.check:
            Router(config).dispatcher.close()
            console.print(f"{self.config} is good")
            return

        def ready(router: Router) -> None:
            listen = config.listen
            runtime = router.dispatcher.runtime
            policy = runtime.loaded.text if runtime.loaded else runtime.config.fallback
            console.print(
                f"{policy} ({runtime.mode}) decides for {len(config.replicas)} replicas: "
                f"http://{listen.host}:{router.port}/v1, "
                f"operators: http://{listen.admin_host}:{router.admin_port}"
            )
            if config.auth is None:
                console.print("no API keys are configured: everyone who can reach it is served")

        serve(config, ready)


What = Annotated[
    Annotated[ServeRouter, tyro.conf.subcommand("router")]
    | Annotated[ServeEngine, tyro.conf.subcommand("engine")],
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.arg(name=""),
]


@dataclass(frozen=True)
class Serve:
    """Serve live: a router in front of replicas, or an emulated engine."""

    what: What
    """What to serve."""

    def run(self) -> None:
        """Do it."""
        self.what.run()
