"""What a calibration was made on."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import gpu_names
from servegym.errors import ConfigError, unknown_name

Device = Literal["cuda", "cpu"]

#: What a driver calls a GPU of `gpus.yaml`; the first that is part of the name counts.
_DRIVER_NAMES = {
    "H200": "H200-SXM-141GB",
    "H100 80GB HBM3": "H100-SXM-80GB",
    "A100-SXM4-80GB": "A100-SXM-80GB",
    "B200": "B200-SXM-180GB",
    "RTX PRO 6000": "RTX-PRO-6000",
    "RTX 4090": "RTX-4090",
    "MI300X": "MI300X",
    "L40S": "L40S",
    "A40": "A40",
    "RTX A6000": "RTX-A6000",
    "L4": "L4",
}


class Machine(BaseModel):
    """The device and software that were measured.

    Attributes:
        device: Its name, as the driver gives it.
        driver: Version of the driver, empty where there is none.
        clock_mhz: Of the device when measuring began, 0 if unknown.
        max_clock_mhz: Highest it can have, 0 if unknown.
        software: Versions of Python and of what ran the kernels.
        time: When measuring began, UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    driver: str = ""
    clock_mhz: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_clock_mhz: float = Field(0.0, ge=0, allow_inf_nan=False)
    software: str = ""
    time: str


def describe(device: Device) -> Machine:
    """Describe the device, driver and software that are measured on.

    Raises:
        ConfigError: If there is no such device here.
    """
    import torch

    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    time = datetime.now(UTC).isoformat(timespec="seconds")
    if device == "cpu":
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
        return Machine(device=name, clock_mhz=_cpu_mhz(), software=software, time=time)
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device here: use --device cpu, or install its driver")
    driver, clock, highest = _query()
    return Machine(
        device=torch.cuda.get_device_name(),
        driver=driver,
        clock_mhz=clock,
        max_clock_mhz=highest,
        software=software,
        time=time,
    )


def known_gpu(device: str, wanted: str | None = None) -> str:
    """Return the name in `gpus.yaml` of what the driver calls `device`.

    Args:
        device: The driver's name.
        wanted: What the user calls it; taken where the driver's name says nothing.

    Raises:
        ConfigError: If it is none of them, or another than `wanted`.
    """
    if wanted is not None and wanted not in gpu_names():
        raise ConfigError(unknown_name("GPU", wanted, gpu_names()))
    for part, name in _DRIVER_NAMES.items():
        if re.search(rf"\b{re.escape(part)}\b", device):
            if wanted not in (None, name):
                raise ConfigError(f"this machine has {device}, which is {name}, not {wanted}")
            return name
    if wanted is not None:
        return wanted
    raise ConfigError(
        f"{unknown_name('GPU', device, gpu_names())}; or give its peaks with --datasheet FILE"
    )


def _query() -> tuple[str, float, float]:
    """Driver version, clock and highest clock in MHz, from nvidia-smi."""
    import torch

    program = shutil.which("nvidia-smi")
    if program is None:
        return "", 0.0, 0.0
    uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
    chosen = [f"--id=GPU-{uuid}"] if uuid else []
    fields = "driver_version,clocks.sm,clocks.max.sm"
    done = subprocess.run(
        [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits", *chosen],
        capture_output=True,
        text=True,
        check=False,
    )
    parts = [part.strip() for part in done.stdout.splitlines()[0].split(",")] if done.stdout else []
    if done.returncode or len(parts) != 3:
        return "", 0.0, 0.0
    return parts[0], _number(parts[1]), _number(parts[2])


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_mhz() -> float:
    return _number(_cpu_info("cpu MHz"))
