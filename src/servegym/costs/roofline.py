"""The fitted source: rooflines whose efficiencies were fitted on measured kernel tables."""

from __future__ import annotations

from dataclasses import dataclass

from servegym.assets.specs import GpuSpec
from servegym.errors import ConfigError

_KV_BYTES = 2.0  # an element of activations and KV cache
#: Time of an iteration that no kernel accounts for; a prior, no source measures it directly
#: (residuals of measured iterations against kernel sums lie between 0 and 3 ms).
CPU_S = 1.0e-3


@dataclass(frozen=True)
class RooflineSource:
    """Operator times of a GPU from the fits in `assets/gpus.yaml`.

    Attributes:
        gpu: Peaks and coefficients.
        fp8: Whether GEMMs run in fp8. One analytic form fits fp8 badly (median error 17-27 %).
        cpu_overhead_s: Time of an iteration outside the device.
    """

    gpu: GpuSpec
    fp8: bool = False
    cpu_overhead_s: float = CPU_S

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        return "fitted roofline" + (" (prior)" if self.gpu.gemm.prior else "")

    def gemm_s(self, m: float, n: int, k: int, weight_bytes: float) -> float:
        """Seconds of `[m, k] x [k, n]`."""
        fit = self.gpu.gemm
        peak = self.gpu.fp8_flops if self.fp8 else self.gpu.bf16_flops
        moved = weight_bytes * (n * k + m * k) + _KV_BYTES * m * n
        flops_s = 2.0 * m * n * k / peak / fit.eff_flops
        bytes_s = moved / self.gpu.memory_bytes_per_s / fit.eff_bytes
        return fit.c0_s + _pnorm(flops_s, bytes_s, fit.p)

    def prefill_attention_s(
        self, chunk: float, context: float, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """Seconds of causal attention of a chunk; the cached part is extrapolated from 0."""
        fit = self.gpu.prefill
        pairs = chunk * (context + 0.5 * (chunk + 1.0))
        flops_s = 4.0 * heads * head_dim * pairs / self.gpu.bf16_flops / fit.eff_flops
        moved = _KV_BYTES * head_dim * (2.0 * chunk * heads + 2.0 * (chunk + context) * kv_heads)
        return flops_s + moved / self.gpu.memory_bytes_per_s / fit.eff_bytes

    def decode_attention_s(
        self, batch: float, kv_tokens: float, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """Seconds of one token each of `batch` sequences over `kv_tokens` in all."""
        fit = self.gpu.decode
        moved = 2.0 * _KV_BYTES * kv_heads * head_dim * kv_tokens
        read_s = moved / self.gpu.memory_bytes_per_s / fit.eff_bytes
        return read_s + fit.s_per_seq_head * batch * kv_heads

    def attention_launch_s(self) -> float:
        """Constant part of one attention kernel."""
        return self.gpu.decode.c0_s

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-reduce.

        Raises:
            ConfigError: If there is no fit for that many GPUs.
        """
        if num_gpus == 1:
            return 0.0
        if num_gpus not in self.gpu.all_reduce:
            raise ConfigError(
                f"no all-reduce fit over {num_gpus} GPUs of this type: "
                f"choose tp from {[1, *sorted(self.gpu.all_reduce)]}"
            )
        fit = self.gpu.all_reduce[num_gpus]
        volume = 2.0 * (num_gpus - 1) / num_gpus * num_bytes
        return _pnorm(fit.alpha_s, volume / fit.bus_bytes_per_s, fit.p)

    def cpu_s(self) -> float:
        """Time of an engine iteration outside the device."""
        return self.cpu_overhead_s


def _pnorm(a: float, b: float, p: float) -> float:
    high, low = max(a, b), min(a, b)
    return float(high * (1.0 + (low / high) ** p) ** (1.0 / p)) if high > 0 else 0.0
