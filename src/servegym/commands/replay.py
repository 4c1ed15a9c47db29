"""The command `servegym replay`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import Progress

from servegym.commands.console import make_console, require_writable
from servegym.errors import ConfigError
from servegym.replay.counterfactual import Loop
from servegym.replay.document import write_json
from servegym.replay.drift import TOLERANCE
from servegym.replay.fleet import Fleet, router_fleet, scenario_fleet
from servegym.replay.log import read_log
from servegym.replay.refit import write_refit
from servegym.replay.result import Replayed, replay
from servegym.replay.sentences import sentence
from servegym.replay.tables import replay_tables
from servegym.scenario import load_scenario
from servegym.serve.router.config import read_config
from servegym.workloads.readers import OnBadRow


@dataclass(frozen=True)
class Replay:
    """Replay a live router's decision log: how well was it predicted, and what has drifted."""

    log: tyro.conf.Positional[tuple[Path, ...]]
    """Files of the log, or its folder."""
    config: Path | None = None
    """Configuration of the router that wrote it; gives the fleet."""
    scenario: str | None = None
    """Instead, a scenario with the replicas in the router's order."""
    policies: tuple[str, ...] | None = None
    """Also simulate these policies; by default those that decided, where they can be found."""
    loop: Loop | None = None
    """Whether requests under policies wait for the answers they followed (`closed`) or come as
    recorded (`open`); by default closed if the log says what followed what."""
    refit: Path | None = None
    """Write corrected costs into this folder, tested on the later part of the log."""
    tolerance: Annotated[float, tyro.conf.arg(metavar="SHARE")] = TOLERANCE
    """Costs nearer to the model than this have not drifted."""
    on_bad_row: OnBadRow = "error"
    """`skip` leaves malformed rows out and says how many; `error` refuses the log."""
    json: Path | None = None
    """Write all numbers here; see docs/replay.md."""
    report: Path | None = None
    """Write a self-contained HTML page here."""

    def run(self) -> None:
        """Replay, print and write."""
        require_writable(self.json, self.report)
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance must be between 0 and 1, got {self.tolerance}")
        log = read_log(self.log, self._fleet(), on_bad_row=self.on_bad_row)
        with Progress(transient=True) as bar:
            task = bar.add_task("replay", total=1.0)
            result = replay(
                log,
                self.policies,
                loop=self.loop,
                tolerance=self.tolerance,
                test=self.refit is not None,
                progress=lambda text, share: bar.update(task, description=text, completed=share),
            )
        console = make_console()
        for table in replay_tables(result):
            console.print(table.rich())
        for replica in result.drift.replicas:
            console.print(sentence(replica), markup=False, highlight=False, soft_wrap=True)
        self._write(result)

    def _fleet(self) -> Fleet:
        if (self.config is None) == (self.scenario is None):
            raise ConfigError(
                "what ran must be known: give the router's --config FILE, or a --scenario with "
                "the replicas in its order"
            )
        if self.config is not None:
            return router_fleet(read_config(self.config))
        assert self.scenario is not None
        return scenario_fleet(load_scenario(self.scenario))

    def _write(self, result: Replayed) -> None:
        console = make_console()
        if self.refit:
            if any(r.now is not None and r.now.drifted for r in result.drift.replicas):
                files = write_refit(result.log, result.drift, self.refit)
                console.print("refitted: " + ", ".join(map(str, files)), soft_wrap=True)
            else:
                console.print("nothing has drifted: no costs were written")
        if self.json:
            write_json(result, self.json)
            console.print(f"numbers: {self.json}")
        if self.report:
            from servegym.replay.report import write_report

            write_report(result, self.report)
            console.print(f"report: {self.report}")
