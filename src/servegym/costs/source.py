"""What a source of kernel costs answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from servegym.engines import EngineName

#: How the experts of a mixture are hit: all alike, or as the benchmarks' power law (exponent 1.2).
Routing = Literal["uniform", "skewed"]

#: Of weights.
Precision = Literal["bf16", "fp8", "fp4"]

#: Scales of activations in fp8 GEMMs: computed with every call, held by the checkpoint (one a
#: tensor), or computed for every 128 elements, with a scale a block of 128 x 128 weights.
Scales = Literal["dynamic", "static", "block"]


@dataclass(frozen=True)
class Evidence:
    """What stands behind the time of one operator at one shape.

    Attributes:
        operator: E.g. `"GEMM 6144 x 4096"`.
        kind: `measured` at this shape on this GPU; `interpolated` between shapes measured on it;
            `extrapolated` beyond them; `prior`: not measured on this GPU at all, or, of a
            collective, only on another kind of host.
        note: Source, or why.
        error: Median and 95th percentile of the error on measurements held out, percent.
    """

    operator: str
    kind: Literal["measured", "interpolated", "extrapolated", "prior"]
    note: str = ""
    error: tuple[float, float] | None = None


class Heads(NamedTuple):
    """Heads of one GPU that attend to keys and values of their own.

    Attributes:
        heads: Query heads on this GPU.
        kv_heads: KV heads on this GPU.
        head_dim: Elements of a head.
    """

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads} heads, {self.kv_heads} KV, size {self.head_dim}"


class Experts(NamedTuple):
    """The experts of a layer, as one GPU holds them.

    Attributes:
        hidden: Elements of a token.
        width: Of each expert on this GPU.
        num_experts: On this GPU.
        active: Experts that a token goes to.
        matrices: Of an expert.
        weight_bytes: Bytes of a weight.
        routing: How they are hit.
    """

    hidden: int
    width: int
    num_experts: int
    active: int
    matrices: int
    weight_bytes: float
    routing: Routing

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Hidden size, width, number and active ones, by which measured ones are found."""
        return self[:4]

    def __str__(self) -> str:
        return f"{self.num_experts} experts {self.hidden} x {self.width}"


@dataclass(frozen=True)
class LatentHeads:
    """Heads of one GPU that attend to shared latents.

    Attributes:
        heads: Query heads on this GPU.
        head_dim: Elements of a head's expanded key, without the rotary part, and of its value.
        latent_dim: Elements of a token's latent.
        rope_dim: Elements of its rotary key.
        fp8_kv: Whether latents are cached in eight bits.
    """

    heads: int
    head_dim: int
    latent_dim: int
    rope_dim: int
    fp8_kv: bool = False

    @property
    def kv_kind(self) -> str:
        """Precision of the cache, as fits are named."""
        return "fp8" if self.fp8_kv else "bf16"

    @property
    def expansion(self) -> tuple[int, int]:
        """`(n, k)` of the GEMM that makes keys and values of every head out of latents."""
        return 2 * self.heads * self.head_dim, self.latent_dim


class CostSource(Protocol):
    """Seconds of single operators on one device; `StepCost` adds them up to a step.

    Sources: fits (`costs.roofline`) and measured tables (`costs.tables`).
    """

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        ...

    @property
    def times_kernels(self) -> bool:
        """Whether times are of single kernels, else they were fitted on whole steps.

        Such a fit holds what runs between and beside its operators: small kernels, casts, empty
        tiles are 0 s of their own, and nothing is taken off for what overlaps.
        """
        return False

    def for_step(
        self, *, engine: EngineName, scales: Scales, fp8_kv: bool, bf16_dense: bool
    ) -> CostSource:
        """Return the source with the kernels of a step; itself if it knows no others.

        Args:
            engine: Whose kernels.
            scales: Of activations in fp8 GEMMs.
            fp8_kv: Whether the KV cache of ordinary heads has eight bits.
            bf16_dense: Whether all but experts stay in 16 bits.
        """
        return self

    def in_16bit(self) -> CostSource:
        """Return the source of the parts that stay in 16 bits; itself if it knows no others."""
        return self

    def gemm_s(self, m: float, n: int, k: int, weight_bytes: float) -> float:
        """Seconds of `[m, k] x [k, n]` with weights of `weight_bytes` bytes an element."""
        ...

    def experts_s(self, tokens: float, shape: Experts) -> float:
        """Seconds of the experts of a layer."""
        ...

    def prefill_attention_s(self, chunk: float, context: float, shape: Heads) -> float:
        """Seconds of causal attention of `chunk` new tokens over `context` cached, no launch."""
        ...

    def decode_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of `batch` sequences, one token each, over `kv_tokens` in all, no launch."""
        ...

    def mixed_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of such decodes in a step that also prefills, no launch."""
        ...

    def mixed_bends(self, heads: int, kv_heads: int) -> tuple[float, ...]:
        """Batches at which `mixed_attention_s` bends, for grids to have a knot there."""
        return ()

    def empty_tiles_s(self, heads: int) -> float:
        """Seconds that each decode adds to a call for each token of the longest chunk beside it."""
        return 0.0

    @property
    def decode_grows_with_batch(self) -> bool:
        """Whether the same tokens in more sequences never take less time."""
        return True

    def latent_prefill_s(self, chunk: float, context: float, shape: LatentHeads) -> float:
        """Seconds of new tokens with latent attention (MLA), launch and expansion included."""
        ...

    def latent_decode_s(
        self, batch: float, kv_tokens: float, shape: LatentHeads, queries: int = 1
    ) -> float:
        """Seconds of decoding with latent attention, absorption included, no launch.

        Each sequence has so many query tokens, which attend to the same latents.
        """
        ...

    def attention_launch_s(self) -> float:
        """Constant part of one attention kernel."""
        ...

    def elementwise_s(self, tokens: float, hidden: int, qk_width: int, ffn_width: int) -> float:
        """Seconds of a layer's norms, rotary embedding and activation."""
        ...

    def one_elementwise_s(self) -> float:
        """Seconds of one such kernel on a few tokens."""
        return 0.0

    def qk_norm_s(self, tokens: float, qk_width: int) -> float:
        """Seconds to read and write queries and keys once, beside the launch."""
        return 0.0

    def cast_s(self, tokens: float, width: int) -> float:
        """Seconds of a kernel that casts activations of that width to fp8 by a given scale."""
        return 0.0

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-reduce of `num_bytes` over `num_gpus`."""
        ...

    def all_gather_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of `num_bytes` in all."""
        ...

    def cpu_s(self) -> float:
        """Time of an engine iteration outside the device."""
        ...

    def gemm_evidence(self, n: int, k: int) -> Evidence:
        """What stands behind `gemm_s` of that shape."""
        ...

    def experts_evidence(self, shape: Experts) -> Evidence:
        """What stands behind `experts_s` of that shape."""
        ...

    def attention_evidence(self, shape: Heads) -> Sequence[Evidence]:
        """What stands behind prefill and decode attention of that shape."""
        ...

    def latent_evidence(self, shape: LatentHeads) -> Sequence[Evidence]:
        """What stands behind latent attention of that shape."""
        ...

    def all_reduce_evidence(self, num_gpus: int) -> Evidence:
        """What stands behind `all_reduce_s` over that many GPUs."""
        ...
