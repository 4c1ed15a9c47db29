"""A device by its data sheet alone, and what kernels are expected to reach on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median

import yaml
from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import AllReduceFit, GpuSpec, KernelFit, gpu, gpu_names
from servegym.documents import checked, load_yaml
from servegym.errors import ConfigError


class DataSheet(BaseModel):
    """Peaks of a device that `gpus.yaml` does not have.

    Attributes:
        name: What scenarios call it.
        bf16_flops: Dense FLOP/s.
        memory_bytes: All of it.
        memory_bytes_per_s: Bandwidth.
        l2_bytes: Last cache.
        num_sms: Multiprocessors, if the engine runs FlashAttention 2 there (compute capability 8
            and 12), which makes decodes dearer beside prefills; 0: it does not.
        price_usd_per_h: Rent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    bf16_flops: float = Field(gt=0)
    memory_bytes: float = Field(gt=0)
    memory_bytes_per_s: float = Field(gt=0)
    l2_bytes: float = Field(0.0, ge=0)
    num_sms: int = Field(0, ge=0)
    price_usd_per_h: float = Field(0.0, ge=0)


def read_datasheet(path: Path) -> DataSheet:
    """Read a data sheet from a YAML file.

    Raises:
        ConfigError: If there is none, a peak is missing or impossible, or the name is taken.
    """
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise ConfigError(f"{path} is not a readable YAML file with a data sheet") from None
    sheet = checked(data, str(path), DataSheet)
    if sheet.name in gpu_names():
        raise ConfigError(f"{path}: {sheet.name} is known: give --gpu {sheet.name} instead")
    return sheet


def measured_gpus() -> list[str]:
    """Names of the GPUs whose GEMMs and attention were all measured."""
    return [
        name
        for name in gpu_names()
        if not any(fit.prior for fit in (gpu(name).gemm, gpu(name).prefill, gpu(name).decode))
    ]


def prior_spec(sheet: DataSheet | GpuSpec, others: Iterable[str] | None = None) -> GpuSpec:
    """What to expect of a device of which only the data sheet is known.

    Every coefficient is the median over the measured GPUs, and marked as a prior.

    Args:
        sheet: Peaks; of a `GpuSpec` nothing else is looked at but whether it has `mixed`.
        others: Names of the GPUs to take the median over; all measured ones by default.
    """
    specs = [gpu(name) for name in (measured_gpus() if others is None else others)]
    own = DataSheet.model_fields.keys() - {"name"}
    unpacked = sheet.mixed is not None if isinstance(sheet, GpuSpec) else sheet.num_sms > 0
    return GpuSpec(
        **{key: getattr(sheet, key) for key in sorted(own)},
        source="data sheet",
        price_source="data sheet",
        gemm=_median([spec.gemm for spec in specs]),
        prefill=_median([spec.prefill for spec in specs]),
        decode=_median([spec.decode for spec in specs]),
        mixed=_median([spec.mixed for spec in specs if spec.mixed]) if unpacked else None,
        all_reduce=_collectives(specs),
    )


def _median(fits: list[KernelFit]) -> KernelFit:
    def of(field: str) -> float:
        return float(f"{median(getattr(fit, field) for fit in fits):.3g}")

    return KernelFit(
        c0_s=of("c0_s"),
        eff_bytes=of("eff_bytes"),
        eff_flops=of("eff_flops"),
        p=of("p"),
        s_per_seq_head=of("s_per_seq_head"),
        prior=True,
    )


def _collectives(specs: list[GpuSpec]) -> dict[int, AllReduceFit]:
    """Medians over the GPUs that have one for that many."""
    degrees = sorted({n for spec in specs for n in spec.all_reduce})
    found = {}
    for n in degrees:
        fits = [spec.all_reduce[n] for spec in specs if n in spec.all_reduce]
        fields = ("alpha_s", "bus_bytes_per_s", "p")
        middle = {x: median(getattr(fit, x) for fit in fits) for x in fields}
        found[n] = AllReduceFit(**middle, prior=True)
    return found
