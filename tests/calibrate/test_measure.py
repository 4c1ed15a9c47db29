"""Measuring: interrupted, it goes on where it was; another machine or setting is refused."""

from __future__ import annotations

import pytest

from servegym.calibrate.bench import Bench, Timing
from servegym.calibrate.calibration import Calibration, read_calibration
from servegym.calibrate.kernels import KernelTimes
from servegym.calibrate.machine import Machine, known_gpu
from servegym.calibrate.measure import begin, measure
from servegym.calibrate.plan import GridSize, Kernel, Shapes
from servegym.errors import ConfigError

GRID = GridSize(max_tokens=32, max_context=1024, max_batch=4, max_kv_tokens=512)


def empty(device="A CPU", grid=GRID):
    machine = Machine(device=device, time="2026-01-01T00:00:00+00:00")
    return Calibration(
        gpu="cpu", model="Llama-3.1-8B", tp=2, machine=machine, content=KernelTimes(grid=grid)
    )


class Timer:
    """One second each, and a user who presses Ctrl-C after some."""

    def __init__(self, patience=10**6):
        self.seen = []
        self.patience = patience

    def __call__(self, kernel):
        if len(self.seen) == self.patience:
            raise KeyboardInterrupt
        self.seen.append(kernel)
        return Timing(1.0, 0.01, 5)


def reduce_timer(sizes):
    return [Timing(2.0, 0.01, 5) for _ in sizes]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "c.json"
    first, second = Timer(patience=7), Timer()
    with pytest.raises(KeyboardInterrupt):
        measure(path, begin(path, empty()), first, reduce_timer, 1e9)
    assert len(read_calibration(path).content.times) == 7
    done = measure(path, begin(path, empty()), second, reduce_timer, 1e9)
    assert not set(first.seen) & set(second.seen)
    times = read_calibration(path).content.times
    assert [t.kernel for t in times if t.operator != "all_reduce"] == first.seen + second.seen
    assert {t.median_s for t in times if t.operator == "all_reduce"} == {2.0}
    assert done.cost().operators.name == "measured kernels"


def test_a_file_begun_elsewhere_is_refused(tmp_path):
    path = tmp_path / "c.json"
    empty().write(path)
    with pytest.raises(ConfigError, match="was begun on A CPU, this is Another"):
        begin(path, empty("Another"))
    with pytest.raises(ConfigError, match="begun with other settings"):
        begin(path, empty(grid=GridSize()))


def test_a_kernel_is_timed_on_the_cpu():
    pytest.importorskip("torch")
    bench = Bench("cpu", Shapes(((64, 32),), 4, 2, 16, 32), cache_bytes=1e4)
    for kernel in (
        Kernel("gemm", (8, 64, 32)),
        Kernel("prefill", (16, 0)),
        Kernel("prefill", (16, 1024)),
        Kernel("decode", (4, 512)),
    ):
        timing = bench(kernel)
        assert timing.median_s > 0
        assert timing.spread >= 0
        assert 5 <= timing.samples <= 50


def test_copies_fill_the_cache_twice():
    bench = Bench("cpu", Shapes(((64, 32),), 4, 2, 16, 32), cache_bytes=1e4)
    assert bench._copies(1e3) == 20
    assert bench._copies(1e5) == 1


def test_the_name_of_a_driver_is_translated():
    assert known_gpu("NVIDIA H100 80GB HBM3") == "H100-SXM-80GB"
    assert known_gpu("NVIDIA L40S") == "L40S"
    assert known_gpu("NVIDIA L4") == "L4"
    assert known_gpu("Something new", "L4") == "L4"
    with pytest.raises(ConfigError, match=r"unknown GPU 'NVIDIA T4'.*--datasheet"):
        known_gpu("NVIDIA T4")
    with pytest.raises(ConfigError, match="which is L40S, not A40"):
        known_gpu("NVIDIA L40S", "A40")
