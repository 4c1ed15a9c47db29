"""GPU and model specifications, read from the YAML files beside this one."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict

from servegym.errors import ConfigError, unknown_name


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KernelFit(_Spec):
    """Coefficients of one operator; the forms are in `gpus.yaml`."""

    c0_s: float
    eff_bytes: float
    eff_flops: float = 1.0
    p: float = 1.0
    s_per_seq_head: float = 0.0
    error: tuple[float, float] | None = None
    source: str = ""
    prior: bool = False


class AllReduceFit(_Spec):
    """Coefficients of an all-reduce over a given number of GPUs."""

    alpha_s: float
    bus_bytes_per_s: float
    p: float


class GpuSpec(_Spec):
    """A GPU: peaks, memory, rent and kernel efficiencies."""

    bf16_flops: float
    fp8_flops: float = 0.0
    memory_bytes: float
    memory_bytes_per_s: float
    price_usd_per_h: float
    source: str
    price_source: str
    gemm: KernelFit
    prefill: KernelFit
    decode: KernelFit
    all_reduce: dict[int, AllReduceFit]


class ModelSpec(_Spec):
    """A decoder-only transformer; sizes in elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    num_experts: int
    active_experts: int
    expert_ffn_dim: int
    vocab: int
    ffn_matrices: int
    kv_bytes_per_token: int
    num_params: float
    source: str


_S = TypeVar("_S", bound=_Spec)


@cache
def _read(file: str) -> dict[str, dict[str, object]]:
    text = resources.files("servegym.assets").joinpath(file).read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def _find(kind: str, file: str, cls: type[_S], name: str) -> _S:
    entries = _read(file)
    if name not in entries:
        raise ConfigError(unknown_name(kind, name, entries))
    return cls.model_validate(entries[name])


def gpu_names() -> list[str]:
    """Names of all GPUs."""
    return sorted(_read("gpus.yaml"))


def model_names() -> list[str]:
    """Names of all models."""
    return sorted(_read("models.yaml"))


def gpu(name: str) -> GpuSpec:
    """Return a GPU's specification.

    Raises:
        ConfigError: If there is none of that name.
    """
    return _find("GPU", "gpus.yaml", GpuSpec, name)


def model(name: str) -> ModelSpec:
    """Return a model's specification.

    Raises:
        ConfigError: If there is none of that name.
    """
    return _find("model", "models.yaml", ModelSpec, name)
