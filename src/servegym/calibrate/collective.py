"""Time all-reduces over several devices of this machine, one process each."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np

from servegym.calibrate.bench import Timing
from servegym.calibrate.machine import Device
from servegym.errors import ConfigError

_WARM_UP, _SAMPLES, _CALLS = 5, 20, 10


def time_all_reduces(device: Device, num_devices: int, sizes: list[int]) -> list[Timing]:
    """Time all-reduces of bf16 values.

    On CUDA devices NCCL reduces, between processes on a CPU Gloo.

    Args:
        device: Where.
        num_devices: Processes, one a device.
        sizes: Bytes of each message.

    Returns:
        One timing a size: of the slowest process in every sample.

    Raises:
        ConfigError: If there are fewer devices.
    """
    import torch

    if device == "cuda" and torch.cuda.device_count() < num_devices:
        raise ConfigError(
            f"an all-reduce over {num_devices} GPUs needs as many here, "
            f"found {torch.cuda.device_count()}"
        )
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call,attr-defined]
            _process, args=(device, num_devices, sizes, folder), nprocs=num_devices
        )
        rows = json.loads((Path(folder) / "seconds.json").read_text(encoding="utf-8"))
    found = []
    for samples in rows:
        low, middle, high = np.percentile(samples, (25, 50, 75))
        found.append(Timing(float(middle), float((high - low) / middle), len(samples)))
    return found


def _process(rank: int, device: Device, num_devices: int, sizes: list[int], folder: str) -> None:
    import torch
    from torch import distributed

    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=num_devices,
    )
    place = f"cuda:{rank}" if device == "cuda" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    rows = []
    for num_bytes in sizes:
        x = torch.zeros(num_bytes // 2, device=place, dtype=torch.bfloat16)
        for _ in range(_WARM_UP):
            distributed.all_reduce(x)
        seconds = [_sample(device, x) for _ in range(_SAMPLES)]
        slowest = torch.tensor(seconds, device=place, dtype=torch.float64)
        distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
        rows.append(slowest.tolist())
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(rows), encoding="utf-8")
    distributed.destroy_process_group()


def _sample(device: Device, x) -> float:  # type: ignore[no-untyped-def]
    import torch
    from torch import distributed

    distributed.barrier()
    if device == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_CALLS):
            distributed.all_reduce(x)
        end.record()
        end.synchronize()
        return float(1e-3 * start.elapsed_time(end) / _CALLS)
    begun = time.perf_counter()
    for _ in range(_CALLS):
        distributed.all_reduce(x)
    return (time.perf_counter() - begun) / _CALLS
