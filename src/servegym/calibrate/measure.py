"""Measure a plan of kernels into a calibration file, which can be interrupted and resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from servegym.assets.specs import model as model_of
from servegym.calibrate.bench import KernelTimer, Timing
from servegym.calibrate.calibration import Calibration, read_calibration
from servegym.calibrate.kernels import KernelTime, KernelTimes, reached_peaks
from servegym.calibrate.plan import Kernel
from servegym.errors import ConfigError

#: Name of a device without data sheet; its peaks are what its kernels reach.
CPU = "cpu"
_SAVE_EVERY_S = 2.0

#: Times all-reduces of the given sizes in bytes.
ReduceTimer = Callable[[list[int]], list[Timing]]


def begin(path: Path, empty: Calibration) -> Calibration:
    """Go on with the file that is there, or begin with `empty`.

    Raises:
        ConfigError: If the file was begun on another machine or with other settings.
    """
    if not path.exists():
        return empty
    found = read_calibration(path)
    if not isinstance(found.content, KernelTimes):
        raise ConfigError(f"{path} holds no kernel times: give another file with --out")
    assert isinstance(empty.content, KernelTimes)
    assert empty.machine is not None
    if found.machine is None or found.machine.device != empty.machine.device:
        device = found.machine.device if found.machine else "nothing"
        raise ConfigError(
            f"{path} was begun on {device}, this is {empty.machine.device}: "
            "give another file with --out"
        )
    before = (found.gpu, found.model, found.tp, found.content.grid)
    if before != (empty.gpu, empty.model, empty.tp, empty.content.grid):
        raise ConfigError(f"{path} was begun with other settings: give another file with --out")
    return found


def measure(
    path: Path,
    calibration: Calibration,
    timer: KernelTimer,
    reduce_timer: ReduceTimer,
    memory_bytes: float,
    advance: Callable[[Kernel], None] = lambda kernel: None,
) -> Calibration:
    """Measure what is missing and keep the file up to date; stopped, it goes on where it was.

    Args:
        path: The file.
        calibration: What is known so far.
        timer: Times a GEMM or an attention kernel.
        reduce_timer: Times all-reduces, all sizes at once.
        memory_bytes: Of the device, for one without data sheet.
        advance: Called after each kernel.

    Returns:
        The finished calibration.
    """
    content = calibration.content
    assert isinstance(content, KernelTimes)
    times = list(content.times)

    def save(**more: object) -> Calibration:
        whole = content.model_copy(update={"times": tuple(times)})
        found = calibration.model_copy(update={"content": whole, **more})
        found.write(path)
        return found

    saved_s = time.monotonic()
    missing = content.missing(model_of(calibration.model), calibration.tp)
    try:
        for operator, group in groupby(missing, key=lambda kernel: kernel.operator):
            kernels = list(group)
            if operator == "all_reduce":
                timings = iter(reduce_timer([kernel.shape[0] for kernel in kernels]))
            else:
                timings = map(timer, kernels)
            for kernel, timing in zip(kernels, timings, strict=True):
                times.append(_row(kernel, timing))
                if time.monotonic() - saved_s > _SAVE_EVERY_S:
                    save()
                    saved_s = time.monotonic()
                advance(kernel)
    finally:
        save()
    if calibration.gpu != CPU:
        return save()
    model = model_of(calibration.model)
    return save(datasheet=reached_peaks(times, model, calibration.tp, CPU, memory_bytes))


def _row(kernel: Kernel, timing: Timing) -> KernelTime:
    return KernelTime(
        operator=kernel.operator,
        shape=kernel.shape,
        median_s=float(f"{timing.median_s:.4g}"),
        spread=round(timing.spread, 4),
        samples=timing.samples,
    )
