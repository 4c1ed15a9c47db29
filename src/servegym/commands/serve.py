"""The command `servegym serve`."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from servegym.commands.console import make_console
from servegym.commands.serve_check import conclude_check
from servegym.commands.serve_engine import ServeEngine
from servegym.commands.serve_picker import ServePicker
from servegym.errors import ConfigError

if TYPE_CHECKING:
    from servegym.serve.router.app import Router
    from servegym.serve.router.config import RouterConfig

_log = logging.getLogger(__name__)


def require_extra() -> None:
    """Say what to install if the serving extra is missing."""
    for name in ("aiohttp", "httptools", "prometheus_client"):
        if find_spec(name) is None:
            package = name.replace("_", "-")
            raise ConfigError(f"serving needs {package}: pip install {package}")


@dataclass(frozen=True)
class ServeRouter:
    """Route OpenAI requests to replicas by a policy; see docs/live.md for the file."""

    config: Path
    """YAML file of the router."""
    check: bool = False
    """Only check the file, the policy it names, and whether its replicas are there."""
    offline: bool = False
    """Leave the replicas out of the check."""
    workers: int | None = None
    """Processes that carry requests, in place of the file's `listen.workers`."""

    def run(self) -> None:
        """Route requests until the program is stopped."""
        require_extra()
        from servegym.serve.router.app import Router, serve
        from servegym.serve.router.config import read_config, with_workers
        from servegym.serve.router.logs import set_up
        from servegym.serve.router.workers.supervisor import supervise

        config = read_config(self.config)
        if self.workers is not None:
            config = with_workers(config, self.workers)
        set_up(config.log)
        console = make_console()
        if self.check:
            problems = _problems(config, Router(config), ask=not self.offline)
            conclude_check(console, self.config, problems, offline=self.offline)
            return

        def say(sentence: str) -> None:
            if config.log.format == "json":  # whoever reads the log reads nothing else
                _log.info(sentence)
            else:
                console.print(sentence, markup=False)

        def ready(router: Router) -> None:
            listen = config.listen
            runtime = router.dispatcher.runtime
            policy = runtime.loaded.text if runtime.loaded else runtime.config.fallback
            say(
                f"{policy} ({runtime.mode}) decides for {len(router.fleet)} replicas: "
                f"http://{listen.host}:{router.port}/v1, "
                f"operators: http://{listen.admin_host}:{router.admin_port}"
            )
            state = router.dispatcher.state
            for member in router.fleet:
                replica = member.replica
                if not state.is_up(member.slot):
                    say(
                        f"{replica.name} is down: {replica.shown_url}{config.health.path} has not "
                        "answered well yet; it gets requests once it does"
                    )
            if listen.workers > 1:
                say(f"{listen.workers} workers carry the requests")
            if config.auth is None:
                say("no API keys are configured: everyone who can reach it is served")

        (serve if config.listen.workers == 1 else supervise)(config, ready)


def _problems(config: RouterConfig, router: Router, *, ask: bool) -> list[str]:
    """Say, a sentence each, what a file that can be read is wrong about."""
    from servegym.serve.router.auth import read_keys
    from servegym.serve.router.probe import probe

    router.dispatcher.close()
    found = []
    if reason := router.dispatcher.runtime.never_decides():
        found.append(reason)
    if config.auth is not None:
        without = sorted(config.tenants.keys() - read_keys(config.auth).tenants)
        found += [f"tenant {name} has limits but no key: give it one" for name in without]
    return found + (asyncio.run(probe(config)) if ask else [])


What = Annotated[
    Annotated[ServeRouter, tyro.conf.subcommand("router")]
    | Annotated[ServePicker, tyro.conf.subcommand("picker")]
    | Annotated[ServeEngine, tyro.conf.subcommand("engine")],
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.arg(name=""),
]


@dataclass(frozen=True)
class Serve:
    """Serve live: a router in front of replicas, an endpoint picker, or an emulated engine."""

    what: What
    """What to serve."""

    def run(self) -> None:
        """Serve what was chosen."""
        self.what.run()
