"""The command `servegym calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.progress import Progress
from rich.table import Table

from servegym.assets.specs import GpuSpec, gpu, model
from servegym.calibrate.adaptation import MAX_SAMPLES, Adaptation, adapt
from servegym.calibrate.bench import Bench
from servegym.calibrate.calibration import Calibration
from servegym.calibrate.collective import time_all_reduces
from servegym.calibrate.datasheet import DataSheet, measured_gpus, prior_spec, read_datasheet
from servegym.calibrate.engine import EngineFit, fit_engine
from servegym.calibrate.kernels import KernelTimes
from servegym.calibrate.leave_out import LeftOut, leave_out, tested_gpus
from servegym.calibrate.machine import Device, describe, known_gpu
from servegym.calibrate.measure import CPU, begin, measure
from servegym.calibrate.plan import GridSize, Kernel, shapes_of
from servegym.calibrate.steps import read_steps
from servegym.commands.console import make_console, require_writable
from servegym.costs.explain import costs_table, evidence_table
from servegym.errors import ConfigError
from servegym.whole_files import write_whole

#: A CPU's last cache is not asked for: more than most have.
_CPU_CACHE_BYTES = 64e6
#: KV caches that are measured take at most this share of the memory.
_KV_SHARE = 0.25
#: Spread of a kernel's samples beyond which its median is doubtful.
_NOISY = 0.2


@dataclass(frozen=True)
class Kernels:
    """Measure the kernels of a model on this machine; stopped, the same command goes on."""

    device: Device
    """Where to measure."""
    model: str
    """Model whose shapes are measured."""
    tp: int = 1
    """Tensor-parallel degree; from 2 on all-reduces are measured over as many devices."""
    out: Path = Path("calibration.json")
    """File to write, or to go on with."""
    gpu: str | None = None
    """GPU type; by default what the driver says."""
    datasheet: Path | None = None
    """YAML file with the peaks of a GPU that is not among the known ones."""
    max_tokens: int = 8192
    """Largest step."""
    max_context: int = 32768
    """Longest context of a prefill."""
    max_batch: int = 256
    """Most decoding sequences."""

    def run(self) -> None:
        """Measure, with progress; write; show what a step costs."""
        require_writable(self.out)
        shapes = shapes_of(model(self.model), self.tp)
        machine = describe(self.device)
        sheet, name = self._sheet(machine.device)
        spec = prior_spec(sheet) if sheet else gpu(name) if name != CPU else None
        memory = spec.memory_bytes if spec else _ram_bytes()
        kv_bytes = 4.0 * shapes.kv_heads * shapes.head_dim
        grid = GridSize(
            max_tokens=_at_least("max-tokens", self.max_tokens, 32),
            max_context=_at_least("max-context", self.max_context, 1024),
            max_batch=_at_least("max-batch", self.max_batch, 4),
            max_kv_tokens=max(512, int(min(128 * self.max_context, _KV_SHARE * memory / kv_bytes))),
        )
        empty = Calibration(
            gpu=name,
            datasheet=sheet,
            model=self.model,
            tp=self.tp,
            machine=machine,
            content=KernelTimes(grid=grid),
        )
        known = begin(self.out, empty)
        assert isinstance(known.content, KernelTimes)
        bench = Bench(self.device, shapes, spec.l2_bytes if spec else _CPU_CACHE_BYTES)
        missing = known.content.missing(model(self.model), self.tp)
        console = make_console()
        try:
            with Progress(console=console, transient=True) as bar:
                task = bar.add_task("kernels", total=len(missing))

                def advance(kernel: Kernel) -> None:
                    shape = " x ".join(str(size) for size in kernel.shape)
                    bar.update(task, advance=1, description=f"{kernel.operator} {shape}")

                reduce_timer = partial(time_all_reduces, self.device, self.tp)
                done = measure(self.out, known, bench, reduce_timer, memory, advance)
        except KeyboardInterrupt:
            raise ConfigError(f"stopped; the same command goes on with {self.out}") from None
        assert isinstance(done.content, KernelTimes)
        spread = np.array([time.spread for time in done.content.times])
        console.print(
            f"{len(spread)} kernels on {machine.device}: the quartiles of a kernel's samples are "
            f"{np.median(spread):.1%} apart (median), {spread.max():.0%} (worst)"
        )
        noisy = np.count_nonzero(spread > _NOISY)
        if noisy:
            console.print(
                f"{noisy} kernels scatter by more than {_NOISY:.0%}: something else was running, "
                "or the clock changed; measure again on an idle machine"
            )
        _show(done, self.out)

    def _sheet(self, device: str) -> tuple[DataSheet | None, str]:
        """Data sheet, if one is needed, and name of the device."""
        if self.device == "cpu":
            if self.gpu or self.datasheet:
                raise ConfigError("--gpu and --datasheet go with --device cuda")
            return None, CPU
        if self.datasheet:
            sheet = read_datasheet(self.datasheet)
            return sheet, sheet.name
        return None, known_gpu(device, self.gpu)


@dataclass(frozen=True)
class _FromLog:
    """What calibrations from a log of steps take."""

    log: Path
    model: str
    """Model that the engine served."""
    gpu: str | None = None
    """GPU type it ran on."""
    datasheet: Path | None = None
    """YAML file with the peaks of a GPU that is not among the known ones."""
    tp: int = 1
    """Tensor-parallel degree."""
    out: Path = Path("calibration.json")
    """File to write."""

    def _write(
        self, name: str, sheet: DataSheet | None, content: EngineFit | Adaptation, table: Table
    ) -> None:
        """Write the calibration and show its terms."""
        done = Calibration(gpu=name, datasheet=sheet, model=self.model, tp=self.tp, content=content)
        done.source()
        done.write(self.out)
        make_console().print(table)
        _show(done, self.out)


@dataclass(frozen=True)
class Engine(_FromLog):
    """Fit a replica's costs to the log of an engine's steps."""

    log: Path
    """CSV file with prefill_tokens, decode_sequences, kv_tokens, duration_s[, prefill_pairs]."""

    def run(self) -> None:
        """Fit, write and show the terms."""
        require_writable(self.out)
        name, sheet, spec = _target(self.gpu, self.datasheet)
        fit = fit_engine(read_steps(self.log), spec, model(self.model), self.tp)
        self._write(name, sheet, fit, _terms_table(fit))


@dataclass(frozen=True)
class Adapt(_FromLog):
    """Adapt the prior of a GPU that nobody measured to at most ten steps of an engine on it."""

    log: Path
    """CSV file as for `engine`; ten steps are taken, the others tell the error."""

    def run(self) -> None:
        """Adapt, write and show the factors."""
        require_writable(self.out)
        name, sheet, spec = _target(self.gpu, self.datasheet)
        if name in measured_gpus():
            raise ConfigError(
                f"the kernels of {name} were measured: its fits, or servegym calibrate engine, "
                "are better than a prior"
            )
        found = adapt(prior_spec(spec), model(self.model), self.tp, read_steps(self.log))
        self._write(name, sheet, found, _factors_table(found))


@dataclass(frozen=True)
class Plugin:
    """Write the scheduler class with which vLLM logs its steps."""

    out: Path = Path("vllm_step_log.py")
    """File to write, for a folder on vLLM's path."""

    def run(self) -> None:
        """Write it; say how it is used."""
        require_writable(self.out)
        source = resources.files("servegym.calibrate").joinpath("vllm_step_log.py")
        write_whole({self.out: source.read_bytes()})
        print(f"vLLM's part: {self.out}; its first lines say how to use it")


@dataclass(frozen=True)
class LeaveOut:
    """Tell the error of `adapt` by the number of steps, leaving out each measured GPU in turn."""

    model: str = "Llama-3.1-8B"
    """Model whose steps are predicted."""
    draws: int = 20
    """Random choices of the measured steps."""

    def run(self) -> None:
        """Print the table as Markdown."""
        samples = (0, 1, 2, 3, 5, MAX_SAMPLES)
        draws = _at_least("draws", self.draws, 1)
        with Progress(transient=True) as bar:
            task = bar.add_task("GPUs", total=len(tested_gpus()))
            rows = leave_out(
                model(self.model), samples, draws, advance=lambda: bar.update(task, advance=1)
            )
        print(_markdown(rows, samples))


Task = Annotated[
    Annotated[Kernels, tyro.conf.subcommand("kernels")]
    | Annotated[Engine, tyro.conf.subcommand("engine")]
    | Annotated[Plugin, tyro.conf.subcommand("plugin")]
    | Annotated[Adapt, tyro.conf.subcommand("adapt")]
    | Annotated[LeaveOut, tyro.conf.subcommand("leave-out")],
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.arg(name=""),
]


@dataclass(frozen=True)
class Calibrate:
    """Make costs of your own hardware: from kernels, an engine's log, or a few of its steps."""

    task: Task
    """What to calibrate from."""

    def run(self) -> None:
        """Do the task that was chosen."""
        self.task.run()


def _target(name: str | None, path: Path | None) -> tuple[str, DataSheet | None, GpuSpec]:
    if (name is None) == (path is None):
        raise ConfigError("name the GPU with --gpu NAME, or give its peaks with --datasheet FILE")
    if path is None:
        assert name is not None
        return name, None, gpu(name)
    sheet = read_datasheet(path)
    return sheet.name, sheet, prior_spec(sheet)


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    return value


def _ram_bytes() -> float:
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _show(done: Calibration, path: Path) -> None:
    console = make_console()
    cost = done.cost()
    title = f"{done.model} on {done.tp} x {done.gpu} ({cost.operators.name}, {cost.status})"
    console.print(costs_table(title, cost))
    console.print(evidence_table(cost))
    console.print(f"calibration: {path}")


def _terms_table(fit: EngineFit) -> Table:
    title = (
        f"{fit.num_steps} steps; error on the half not fitted on: "
        f"{fit.error[0]:g} % (median), {fit.error[1]:g} % (95th percentile)"
    )
    table = Table(title=title)
    table.add_column("term")
    table.add_column("seconds", justify="right")
    table.add_column("largest in the log", justify="right")
    table.add_row("every step", f"{fit.overhead_s:.3g}", "")
    for name, seconds, largest in (
        ("a prompt token", fit.s_per_prefill_token, f"{fit.max_prefill_tokens} a step"),
        ("a decoding sequence", fit.s_per_sequence, f"{fit.max_sequences} a step"),
        ("a KV token read", fit.s_per_kv_token, f"{fit.max_kv_tokens} a step"),
        ("a pair of prompt tokens", fit.s_per_prefill_pair, ""),
    ):
        table.add_row(name, f"{seconds:.3g}", largest)
    return table


def _factors_table(found: Adaptation) -> Table:
    error = found.error
    rest = f"; error on the other steps {error[0]:g} / {error[1]:g} %" if error else ""
    table = Table(title=f"adapted to {found.num_samples} steps{rest}")
    table.add_column("part")
    table.add_column("time over the prior's", justify="right")
    for name, value in found.factors.model_dump().items():
        table.add_row(name, f"{value:.2f}")
    return table


def _markdown(rows: list[LeftOut], samples: tuple[int, ...]) -> str:
    lines = [
        "| GPU left out | data sheet | " + " | ".join(f"{n} steps" for n in samples) + " |",
        "|---|" + "---|" * (1 + len(samples)),
    ]
    for row in rows:
        errors = [row.prior, *(row.adapted[n] for n in samples)]
        lines.append(f"| {row.gpu} | " + " | ".join(f"{a:.1f} / {b:.1f}" for a, b in errors) + " |")
    for name in ("adapted", "scaled"):
        every = [[row.prior, *(getattr(row, name)[n] for n in samples)] for row in rows]
        mean = np.mean(every, axis=0)
        label = {"adapted": "**mean**", "scaled": "one factor for the whole step, mean"}[name]
        lines.append(f"| {label} | " + " | ".join(f"{a:.1f} / {b:.1f}" for a, b in mean) + " |")
    return "\n".join(lines)
