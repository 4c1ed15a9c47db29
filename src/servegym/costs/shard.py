"""What one GPU of a replica holds of a model: shapes of GEMMs, bytes of weights and KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from servegym.assets.specs import ModelSpec
from servegym.costs.engines import FUSION
from servegym.costs.forms import WEIGHT_BYTES
from servegym.costs.source import Heads, LatentHeads, Scales
from servegym.engines import EngineName
from servegym.errors import ConfigError, unknown_name

#: Memory of a GPU beside weights and KV cache: driver, activations, CUDA graphs. What vLLM 0.19
#: left on an RTX 4090 (Llama-3.1-8B, 2,048 tokens a step); larger steps of larger models need more.
_RESERVED_BYTES = 1.7e9
#: Parts of a model that a checkpoint may hold in another precision than its experts.
Part = Literal["projections", "output", "ffn", "router", "head"]


class Gemm(NamedTuple):
    """A GEMM of one GPU: columns and rows of its weights, and whether every GPU has the same."""

    n: int
    k: int
    part: Part
    copied: bool = False


@dataclass(frozen=True)
class Shard:
    """One GPU's share of `model` on `tp` GPUs; the attributes are those of `StepCost`.

    Raises:
        ConfigError: If the model cannot be split so, or no such weights or engine exist.
    """

    model: ModelSpec
    tp: int
    fp8: bool
    fp4: bool
    fp8_kv: bool
    engine: EngineName
    scales: Scales
    expert_groups: int

    def __post_init__(self) -> None:
        if self.tp < 1 or self.model.heads % self.tp:
            raise ConfigError(f"tp must divide the {self.model.heads} heads, got {self.tp}")
        if self.model.kv_heads % self.tp and self.tp % self.model.kv_heads:
            raise ConfigError(
                f"tp must divide the {self.model.kv_heads} KV heads or be a multiple of them, "
                f"got {self.tp}"
            )
        if self.fp8 and self.fp4:
            raise ConfigError("weights are fp8 or fp4, not both")
        if self.engine not in FUSION:
            raise ConfigError(unknown_name("engine", self.engine, FUSION))
        if self.scales != "dynamic" and not self.fp8:
            raise ConfigError(f"{self.scales} scales are of fp8 GEMMs: choose precision fp8")
        if self.expert_groups < 1 or self.tp % self.expert_groups:
            raise ConfigError(
                f"expert_groups must divide tp {self.tp}, got {self.expert_groups}: "
                "every group is an equal share of the GPUs"
            )
        if self.expert_groups > 1 and self.model.num_experts % self.expert_groups:
            raise ConfigError(
                f"expert_groups must divide the {self.model.num_experts} experts, "
                f"got {self.expert_groups}"
            )

    # ---- shapes ----

    @property
    def heads(self) -> int:
        """Query heads on this GPU."""
        return self.model.heads // self.tp

    @property
    def kv_heads(self) -> int:
        """KV heads on this GPU; GPUs beyond the heads of the model hold copies."""
        return max(1, self.model.kv_heads // self.tp)

    @property
    def qk_width(self) -> int:
        """Elements of the queries and keys of a token."""
        return (self.heads + self.kv_heads) * self.model.head_dim

    @property
    def attention_heads(self) -> Heads:
        """Heads that attend to keys and values of their own."""
        return Heads(self.heads, self.kv_heads, self.model.head_dim)

    @property
    def latent_heads(self) -> LatentHeads:
        """Heads that attend to shared latents."""
        m = self.model
        return LatentHeads(
            self.heads, m.head_dim, m.latent_dim, m.latent_rope_dim, fp8_kv=self.fp8_kv
        )

    @property
    def projections(self) -> list[Gemm]:
        """The GEMMs around attention."""
        m, heads = self.model, self.heads
        output = Gemm(m.hidden, heads * m.head_dim, "output")
        if not m.latent_dim:
            qkv = (heads + 2 * self.kv_heads) * m.head_dim
            return [Gemm(qkv, m.hidden, "projections"), output]
        # every GPU computes the latents of queries, keys and values, in one GEMM; their expansion
        # to its heads is in the time of attention but for the queries'
        query = heads * (m.head_dim + m.latent_rope_dim)
        latents = m.latent_dim + m.latent_rope_dim + m.latent_query_dim
        return [
            Gemm(latents, m.hidden, "projections", copied=True),
            Gemm(query, m.latent_query_dim or m.hidden, "projections"),
            output,
        ]

    @property
    def router(self) -> Gemm:
        """The GEMM that chooses experts."""
        return Gemm(self.model.num_experts, self.model.hidden, "router")

    @property
    def head(self) -> Gemm:
        """The GEMM of the output head."""
        return Gemm(self.model.vocab // self.tp, self.model.hidden, "head")

    def ffn(self, width: int) -> tuple[Gemm, Gemm]:
        """Return the GEMMs of a feed-forward network of that width in all, up and down."""
        m, mine = self.model, max(1, width // self.tp)
        return Gemm((m.ffn_matrices - 1) * mine, m.hidden, "ffn"), Gemm(m.hidden, mine, "ffn")

    @property
    def gemms(self) -> list[Gemm]:
        """All GEMMs of a step but those of routed experts."""
        m = self.model
        found = self.projections
        widths = [m.shared_ffn_dim] if m.shared_ffn_dim else []
        if m.num_experts:
            found.append(self.router)
        if m.dense_layers or not m.num_experts:
            widths.append(m.ffn_dim)
        for width in widths:
            found += self.ffn(width)
        return [*found, self.head]

    @property
    def experts(self) -> tuple[int, int, int]:
        """Width, number and active ones a token of the experts."""
        m, groups = self.model, self.expert_groups
        width = max(1, m.expert_ffn_dim * groups // self.tp)
        return width, m.num_experts // groups, max(1, m.active_experts // groups)

    # ---- kernels ----

    @property
    def casts_apart(self) -> bool:
        """Whether GEMMs take activations that are quantised before."""
        return self.scales == "static" or (self.fp4 and self.engine == "trtllm")

    @property
    def fused_norms(self) -> bool:
        """Whether the all-reduces hold the norms that follow them."""
        return self.tp > 1 and self.engine in self.model.fused_norms

    @property
    def more_kernels(self) -> int:
        """Small kernels of a layer beyond those of vLLM without norms of queries and keys."""
        m, in_attention = self.model, FUSION[self.engine].rope_in_attention
        kernels = -2 if self.fused_norms else 0
        if in_attention and not (m.qk_norm or m.latent_dim):
            kernels -= 1
        elif m.qk_norm and not in_attention:
            kernels += 1  # else one kernel norms and rotates
        return kernels

    @property
    def cast_widths(self) -> list[int]:
        """Elements a token that kernels of a layer only quantise, one kernel each."""
        m = self.model
        if self.dense_weight_bytes > 1.0:
            return []
        fusion = FUSION[self.engine]
        casts = fusion.fp4_casts if self.fp4 else fusion.fp8_casts
        widths = []
        if "norm" in casts and not self.fused_norms:
            # experts quantise what they take themselves
            ffn = [] if m.num_experts else [m.hidden]
            widths += ffn if self.is_16bit("projections") else [*ffn, m.hidden]
        if "attention" in casts and not self.is_16bit("output"):
            widths.append(self.heads * m.head_dim)
        if "activation" in casts and not m.num_experts:
            widths.append(m.ffn_dim // self.tp)
        return widths

    # ---- precision and bytes ----

    def is_16bit(self, part: Part) -> bool:
        """Whether a checkpoint of eight or four bits keeps that part in 16."""
        if part == "router":
            return self.fp8 or self.fp4  # checkpoints and engines never quantise it
        if part == "head" and (self.casts_apart or self.scales == "block"):
            return True  # as those who publish such checkpoints leave it
        return self.fp4 and part in self.model.fp4_16bit

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight; of an expert's where only experts have four bits."""
        return WEIGHT_BYTES["fp4" if self.fp4 else "fp8" if self.fp8 else "bf16"]

    @property
    def dense_weight_bytes(self) -> float:
        """Bytes of a weight outside experts."""
        return (
            WEIGHT_BYTES["bf16"] if self.fp4 and self.model.fp4_experts_only else self.weight_bytes
        )

    def bytes_of(self, part: Part) -> float:
        """Bytes of a weight of that part."""
        return WEIGHT_BYTES["bf16"] if self.is_16bit(part) else self.dense_weight_bytes

    @property
    def all_weight_bytes(self) -> float:
        """Bytes of all weights on all GPUs."""
        m = self.model
        kept, copied = 0.0, 0.0
        for one in self.projections:
            if self.is_16bit(one.part):
                kept += m.layers * one.n * one.k * (1 if one.copied else self.tp)
            if one.copied:
                copied += self.bytes_of(one.part) * m.layers * one.n * one.k * (self.tp - 1)
        if m.latent_dim and self.is_16bit("projections"):
            kept += m.layers * 2 * m.heads * m.head_dim * m.latent_dim
        if self.is_16bit("head"):
            kept += m.vocab * m.hidden
        rest = m.num_params - m.expert_params - kept
        weights = self.weight_bytes * m.expert_params + self.dense_weight_bytes * rest
        return weights + WEIGHT_BYTES["bf16"] * kept + copied

    def kv_capacity_tokens(self, memory_bytes: float, memory_fraction: float) -> int:
        """Count the KV tokens that fit beside the weights, on all GPUs.

        Args:
            memory_bytes: Of one GPU.
            memory_fraction: Share of it that may be used.

        Raises:
            ConfigError: If the weights do not fit.
        """
        budget = memory_fraction * memory_bytes * self.tp
        weights = self.all_weight_bytes
        free = budget - weights - _RESERVED_BYTES * self.tp
        if free <= 0:
            raise ConfigError(
                f"the weights take {weights / 1e9:.0f} GB and do not fit the {budget / 1e9:.0f} GB "
                f"of {self.tp} GPU(s): raise tp, use fp8 or a smaller model"
            )
        # GPUs beyond the KV heads hold copies of them
        copies = self.kv_heads * self.tp / self.model.kv_heads
        return int(free / (self.kv_token_bytes * copies))

    @property
    def kv_token_bytes(self) -> float:
        """KV of one token, without copies; bytes."""
        return (0.5 if self.fp8_kv else 1.0) * self.model.kv_bytes_per_token
