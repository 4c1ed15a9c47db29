"""`servegym plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from servegym.commands.console import make_console, print_remarks, require_writable
from servegym.costs.formats import ScenarioFormat
from servegym.documents import checked
from servegym.drawing import PLOT_SUFFIXES, save_figure
from servegym.errors import ConfigError
from servegym.plan.answer import Answer, answer
from servegym.plan.document import write_json
from servegym.plan.prices import Price, read_prices
from servegym.plan.question import DEFAULT_RULES, Question, read_limits
from servegym.plan.tables import effort, fleets_table, reasons, remarks, safety, verdict
from servegym.workloads.config import TraceConfig
from servegym.workloads.dialect import TimeUnit
from servegym.workloads.readers import OnBadRow
from servegym.workloads.table import RequestTable


@dataclass(frozen=True)
class Plan:
    """Find the cheapest fleet that serves a trace within limits; see docs/plan.md."""

    trace: str
    """The requests, in any format that `--trace` of `servegym simulate` reads."""
    gpus: str = "H100-SXM-80GB,L40S,A100-SXM-80GB"
    """GPUs to choose from, with commas; `assets/gpus.yaml` has all."""
    slo: str = "ttft=0.5,tpot=0.04"
    """Limits in seconds."""
    attainment: float = 0.99
    """Share of the requests that must keep both limits."""
    model: str = "Llama-3.1-8B"
    """Model, of `assets/models.yaml`."""
    precision: ScenarioFormat = "bf16"
    """Of weights and GEMMs."""
    degrees: tuple[int, ...] = (1, 2, 4, 8)
    """Tensor-parallel degrees to try."""
    stages: tuple[int, ...] = (1,)
    """Pipeline-parallel degrees to try: stages of as many GPUs each, on one node."""
    drafts: tuple[int, ...] = (0,)
    """Numbers of tokens to draft for what decodes, by a layer of the model's own; 0: none."""
    acceptance: float | None = None
    """How often a draft is accepted where the one before it is; where any are drafted."""
    rules: tuple[str, ...] = DEFAULT_RULES
    """Dispatch rules to try (see `servegym policies`), the simplest first."""
    budget: float | None = None
    """Most that a fleet may cost, dollars an hour."""
    max_replicas: int = 64
    """Largest number of replicas."""
    mixed: bool = True
    """Also try fleets of two kinds of replicas."""
    uncertainty: int = 20
    """Worlds with other kernels and engines in which answers are asked again; 0: none."""
    prices: Path | None = None
    """YAML file with a line `GPU: {usd_per_h: 2.49, source: where and when}` for each; by default
    the prices of `assets/gpus.yaml`."""
    rate_rps: float | None = None
    """Rate at which the trace is played; by default as recorded."""
    max_num_batched_tokens: int | None = None
    """Token budget of an engine step; by default vLLM's."""
    max_num_seqs: int = 256
    """Running requests of a replica at most."""
    on_bad_row: OnBadRow = "error"
    """`skip` leaves malformed rows of the trace out; `error` refuses the file."""
    time_unit: TimeUnit | None = None
    """What the trace's column of times counts, where its columns do not say."""
    hash_block_tokens: int | None = None
    """Tokens of a prefix hash of the trace, where its columns do not say."""
    json: Path | None = None
    """Write all numbers here; see docs/plan.md."""
    report: Path | None = None
    """Write a self-contained HTML page here."""
    plot: Path | None = None
    """Draw rent against the share of requests that are late (png, pdf or svg)."""

    def run(self) -> None:
        """Search, print and write."""
        require_writable(self.json, self.report, self.plot)
        if self.plot and self.plot.suffix not in PLOT_SUFFIXES:
            raise ConfigError(f"{self.plot} must end in {', '.join(PLOT_SUFFIXES)}")
        question = self._question()
        prices = read_prices(question.gpus, self.prices)
        table = self._table()
        result = _answered(question, prices, table)
        console = make_console()
        console.print(fleets_table(result).rich())
        print_remarks(console, [*reasons(result), *remarks(result), ""])
        print_remarks(console, [verdict(result), *safety(result), effort(result)])
        if self.json:
            write_json(result, self.json)
            console.print(f"numbers: {self.json}")
        if self.report:
            from servegym.plan.report import write_report

            write_report(result, self.report)
            console.print(f"report: {self.report}")
        if self.plot:
            from servegym.plan.report import frontier_figure

            save_figure(frontier_figure(result), self.plot)
            console.print(f"chart: {self.plot}")

    def _question(self) -> Question:
        ttft_s, tpot_s = read_limits(self.slo)
        asked = {
            "model": self.model,
            "precision": self.precision,
            "engine": {
                "max_num_batched_tokens": self.max_num_batched_tokens,
                "max_num_seqs": self.max_num_seqs,
            },
            "ttft_s": ttft_s,
            "tpot_s": tpot_s,
            "attainment": self.attainment,
            "gpus": tuple(name.strip() for name in self.gpus.split(",")),
            "degrees": self.degrees,
            "stages": self.stages,
            "drafts": self.drafts,
            "acceptance": self.acceptance,
            "rules": self.rules,
            "max_usd_per_h": self.budget,
            "max_replicas": self.max_replicas,
            "mixed": self.mixed,
            "num_worlds": self.uncertainty,
        }
        return checked(asked, "servegym plan", Question)

    def _table(self) -> RequestTable:
        """Read the trace, and say what was done to it."""
        if self.rate_rps is not None and not 0 < self.rate_rps < float("inf"):
            raise ConfigError(f"rate_rps must be above 0 and finite, got {self.rate_rps:g}")
        trace = TraceConfig(
            path=self.trace,
            on_bad_row=self.on_bad_row,
            time_unit=self.time_unit,
            hash_block_tokens=self.hash_block_tokens,
        )
        read = trace.read()
        print_remarks(make_console(), [read.headline(), *read.remarks()])
        if read.sessions is not None:
            raise ConfigError(
                f"{self.trace} holds sessions without a common time, so that nobody knows when how "
                "much is to be served: give a trace with times"
            )
        if self.rate_rps is None:
            return read.table
        if trace.is_batch:
            raise ConfigError(
                f"all requests of {self.trace} arrive at one time, there is no rate: leave "
                "--rate-rps out"
            )
        return read.table.scaled(self.rate_rps / read.table.rate_rps)


def _answered(question: Question, prices: dict[str, Price], table: RequestTable) -> Answer:
    """Answer with a line that says what is searched."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("plan", total=None)
        return answer(
            question,
            prices,
            table,
            lambda text, trials: bar.update(task, description=f"{text}: {trials:,} simulations"),
        )
