"""The command `servegym validate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from servegym.commands.console import make_console
from servegym.errors import ConfigError
from servegym.validate.constants import PROPOSED, fit_families, sample
from servegym.validate.coverage import banded_rows, coverage, family_spreads
from servegym.validate.document import write_json, write_markdown
from servegym.validate.published import Row, read_published
from servegym.validate.score import Constants, Validation, score_published, score_runs
from servegym.validate.tables import (
    TextTable,
    coverage_table,
    fit_table,
    proposed_table,
    published_tables,
    reach_table,
    run_tables,
    skipped_files_table,
    spread_table,
)


@dataclass(frozen=True)
class Validate:
    """Score the simulator against runs and published measurements of real engines."""

    e2e: Path | None = None
    """Folder of real runs to replay: <run>_meta.json, <run>_requests.csv.gz, ..."""
    published: Path | None = None
    """Table of published measurements to replay (CSV)."""
    proposed: bool = False
    """Apply the proposed constants of engine families; see docs/fidelity.md."""
    refit: bool = False
    """Instead fit those constants on the published rows, with each source and GPU left out."""
    sample: int | None = None
    """With --refit or --coverage: draw about so many rows, by source and GPU in proportion, instead
    of all."""
    coverage: bool = False
    """Instead ask how many published rows lie in the bands of their predictions, with each source
    left out of what its band is made of; see docs/fidelity.md."""
    json: Path | None = None
    """Write every run and row, measured, simulated and error, here."""
    report: Path | None = None
    """Write a self-contained HTML page here."""
    markdown: Path | None = None
    """Write the tables into this document, between marks of their own."""

    def run(self) -> None:
        """Score, print and write."""
        if self.e2e is None and self.published is None:
            raise ConfigError("nothing to validate against: give --e2e DIR or --published FILE")
        if self.refit and self.coverage:
            raise ConfigError("--refit and --coverage are two questions: give one of them")
        if self.refit:
            self._refit()
            return
        if self.coverage:
            self._cover()
            return
        if self.sample is not None:
            raise ConfigError(
                "--sample draws some of the rows: give --refit or --coverage with it, or leave it "
                "out"
            )
        result = self._score()
        runs, published = run_tables(result), published_tables(result)
        console = make_console()
        left_out = [skipped_files_table(result)] if result.skipped_files else []
        for table in (*runs, *left_out, *published):
            console.print(table.rich())
        self._write_markdown("runs", runs)
        self._write_markdown("published", published)
        if self.json:
            write_json(result, self.json)
            console.print(f"numbers: {self.json}")
        if self.report:
            from servegym.validate.report import write_report

            write_report(result, self.report)
            console.print(f"report: {self.report}")

    def _score(self) -> Validation:
        constants: Constants = PROPOSED if self.proposed else {}
        runs, files = score_runs(self.e2e, constants) if self.e2e else ([], [])
        if self.published is None:
            return Validation(runs, skipped_files=files, constants=constants)
        with Progress(transient=True) as bar:
            task = bar.add_task("published rows", total=1.0)
            rows, skipped = score_published(
                self.published, constants, lambda share: bar.update(task, completed=share)
            )
        return Validation(runs, rows, files, skipped, constants)

    def _refit(self) -> None:
        rows = self._drawn("--refit fits on published rows")
        with Progress(transient=True) as bar:
            task = bar.add_task("constants of engine families", total=1.0)
            fits, variants = fit_families(rows, lambda share: bar.update(task, completed=share))
        tables = [reach_table(variants), fit_table(fits), proposed_table()]
        for table in tables:
            make_console().print(table.rich())
        self._write_markdown("constants", tables)

    def _cover(self) -> None:
        rows = self._drawn("--coverage asks about published rows")
        with Progress(transient=True) as bar:
            task = bar.add_task("bands of published rows", total=1.0)
            found = banded_rows(rows, progress=lambda share: bar.update(task, completed=share))
        tables = [coverage_table(coverage(found)), spread_table(family_spreads(found))]
        for table in tables:
            make_console().print(table.rich())
        self._write_markdown("coverage", tables)

    def _drawn(self, why: str) -> list[Row]:
        """Read the published rows, or draw some of them."""
        if self.published is None:
            raise ConfigError(f"{why}: give --published FILE")
        if self.sample is not None and self.sample < 1:
            raise ConfigError(f"--sample is a number of rows, got {self.sample}: give 1 or more")
        rows = read_published(self.published)
        return rows if self.sample is None else sample(rows, self.sample)

    def _write_markdown(self, name: str, tables: list[TextTable]) -> None:
        if self.markdown and tables:
            suffix = " with constants" if self.proposed else ""
            write_markdown(name + suffix, tables, self.markdown)
