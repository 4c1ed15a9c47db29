"""The cost of an engine step: operators of every layer, added up and compiled to grids."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from servegym.assets.specs import GpuSpec, ModelSpec
from servegym.costs.engines import FUSION
from servegym.costs.grid import CostGrid
from servegym.costs.roofline import RooflineSource
from servegym.costs.routing import fullest_share
from servegym.costs.sampling import sample
from servegym.costs.shard import Gemm, Part, Shard
from servegym.costs.source import CostSource, Evidence, Experts, Routing, Scales
from servegym.engines import EngineName
from servegym.errors import ConfigError

_ACTIVATION_BYTES = 2.0


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step of `model` on `tp` GPUs, term by term.

    Attributes:
        gpu: The GPU.
        model: The architecture.
        tp: Tensor-parallel degree.
        fp8: Weights and GEMMs in fp8.
        source: Operator times; the fits of `assets` by default. Fits and tables are set to
            engine, scales and KV cache of the step.
        fp4: Weights in fp4.
        routing: How a mixture's experts are hit.
        fp8_kv: Whether the KV cache has eight bits.
        engine: Whose kernels, and what it fuses into one; without fits of its own vLLM's.
        scales: Of activations in fp8 GEMMs.
        expert_groups: Groups of GPUs that split a mixture's experts while attention is tensor
            parallel over all of them (expert parallelism): each GPU holds `num_experts /
            expert_groups` experts, `expert_groups / tp` of the width of each, and waits for the
            group on which routing falls most.
        shard: What one of the GPUs holds.
    """

    gpu: GpuSpec
    model: ModelSpec
    tp: int = 1
    fp8: bool = False
    source: CostSource | None = None
    fp4: bool = False
    routing: Routing = "uniform"
    fp8_kv: bool = False
    engine: EngineName = "vllm"
    scales: Scales = "dynamic"
    expert_groups: int = 1
    shard: Shard = field(init=False, compare=False, repr=False)
    _compiled: dict[tuple[int, int], CostGrid] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        shard = Shard(
            self.model,
            self.tp,
            fp8=self.fp8,
            fp4=self.fp4,
            fp8_kv=self.fp8_kv,
            engine=self.engine,
            scales=self.scales,
            expert_groups=self.expert_groups,
        )
        object.__setattr__(self, "shard", shard)
        if self.fp8 and not self.gpu.fp8_flops:
            raise ConfigError("this GPU has no fp8 units: choose precision bf16")
        source = self.source or RooflineSource(self.gpu, self.fp8, fp4=self.fp4)
        source = source.for_step(
            engine=self.engine,
            scales="static" if shard.casts_apart else self.scales,
            fp8_kv=self.fp8_kv and not self.model.latent_dim,
            bf16_dense=self.fp4 and self.model.fp4_experts_only,
        )
        object.__setattr__(self, "source", source)
        source.all_reduce_s(1.0, self.tp)  # refuse a degree without collectives

    @property
    def operators(self) -> CostSource:
        """The source of operator times."""
        assert self.source is not None
        return self.source

    @cached_property
    def _operators_16bit(self) -> CostSource:
        return self.operators.in_16bit()

    @property
    def _experts(self) -> Experts:
        m, shard = self.model, self.shard
        sizes = (m.hidden, *shard.experts, m.ffn_matrices, shard.weight_bytes)
        return Experts(*sizes, routing=self.routing)

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight; of an expert's where only experts have four bits."""
        return self.shard.weight_bytes

    @property
    def all_weight_bytes(self) -> float:
        """Bytes of all weights on all GPUs."""
        return self.shard.all_weight_bytes

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What stands behind the time of every operator of a step."""
        return tuple(one for group in self.evidence_by_operator.values() for one in group)

    @property
    def evidence_by_operator(self) -> dict[str, list[Evidence]]:
        """The same by `GEMM`, `experts`, `attention` (prefill first), `window`, `collectives`."""
        m, op, shard = self.model, self.operators, self.shard
        gemms = {(shard.is_16bit(one.part), one.n, one.k): one for one in shard.gemms}
        attention = (
            op.latent_evidence(shard.latent_heads)
            if m.latent_dim
            else op.attention_evidence(shard.attention_heads)
        )
        note = "a window computes as that many tokens without one"
        window = [Evidence("sliding window", "extrapolated", note)]
        return {
            "GEMM": [
                self._source_of(one.part).gemm_evidence(one.n, one.k) for one in gemms.values()
            ],
            "experts": [op.experts_evidence(self._experts)] if m.num_experts else [],
            "attention": list(attention),
            "window": window if m.window_layers else [],
            "collectives": [op.all_reduce_evidence(self.tp)] if self.tp > 1 else [],
        }

    @property
    def validated(self) -> bool:
        """Whether every operator was measured on that kind of machine: no prior stands in."""
        return all(e.kind != "prior" for e in self.evidence)

    @property
    def status(self) -> str:
        """`validated` (operators measured on that kind of machine), else `extrapolated`."""
        return "validated" if self.validated else "extrapolated"

    def terms(
        self,
        tokens: float,
        chunk: float = 0.0,
        context: float = 0.0,
        batch: float = 0.0,
        kv_tokens: float = 0.0,
    ) -> dict[str, float]:
        """Split the duration of a step into its terms.

        Args:
            tokens: All tokens of the step.
            chunk: Prompt tokens of one prefilling request.
            context: Its tokens already cached.
            batch: Decoding sequences; beside a chunk they cost what a mixed step makes of them.
            kv_tokens: Tokens these attend to in all.

        Returns:
            Seconds by term.
        """
        m, op, shard = self.model, self.operators, self.shard
        attention = sum(self._gemm_s(tokens, one) for one in shard.projections)
        reductions = 1.0 if m.parallel_ffn else 2.0
        reduce_s = reductions * op.all_reduce_s(_ACTIVATION_BYTES * tokens * m.hidden, self.tp)
        head = self._gemm_s(min(tokens, 256.0), shard.head)
        # the kernel of a mixture holds its activation
        ffn_width = 0 if m.num_experts else m.ffn_dim // self.tp
        mixture = {}
        if m.num_experts:
            experts_s = self._experts_s(tokens)
            mixture["experts"] = m.expert_layers * experts_s
            mixture["router"] = m.expert_layers * self._gemm_s(tokens, shard.router)
            if m.shared_ffn_dim:
                shared_s = self._shared_experts_s(tokens, experts_s)
                mixture["shared experts"] = m.expert_layers * shared_s
        if m.num_experts and m.dense_layers:
            mixture["MLP"] = m.dense_layers * self._ffn_s(tokens, m.ffn_dim)
        return {
            "cpu": op.cpu_s(),
            "attention GEMMs": m.layers * attention,
            **(mixture if m.num_experts else {"MLP": m.layers * self._ffn_s(tokens, m.ffn_dim)}),
            "norms, activation": m.layers
            * (
                op.elementwise_s(tokens, m.hidden, shard.qk_width, ffn_width)
                + self._more_kernels_s(tokens)
            ),
            **({"casts": m.layers * self._casts_s(tokens)} if shard.casts_apart else {}),
            "all-reduce": m.layers * reduce_s,
            "output head": head,
            "attention launch": m.layers * op.attention_launch_s(),
            "prefill attention": self.prefill_s(chunk, context) if chunk else 0.0,
            "decode attention": self._beside_s(chunk, batch, kv_tokens) if batch else 0.0,
        }

    def _more_kernels_s(self, tokens: float) -> float:
        """Seconds that a layer's small kernels take beyond those of vLLM without Q and K norms."""
        op = self.operators
        moved_s = op.qk_norm_s(tokens, self.shard.qk_width) if self.model.qk_norm else 0.0
        return self.shard.more_kernels * op.one_elementwise_s() + moved_s

    def _casts_s(self, tokens: float) -> float:
        """Seconds of the kernels of a layer that only quantise activations."""
        return sum(self.operators.cast_s(tokens, width) for width in self.shard.cast_widths)

    def _source_of(self, part: Part) -> CostSource:
        """Operator times in the precision of that part."""
        return self._operators_16bit if self.shard.is_16bit(part) else self.operators

    def _gemm_s(self, tokens: float, one: Gemm) -> float:
        weight_bytes = self.shard.bytes_of(one.part)
        return self._source_of(one.part).gemm_s(tokens, one.n, one.k, weight_bytes)

    def _ffn_s(self, tokens: float, width: int) -> float:
        up, down = self.shard.ffn(width)
        return self._gemm_s(tokens, up) + self._gemm_s(tokens, down)

    def _shared_experts_s(self, tokens: float, routed_s: float) -> float:
        """Seconds that the shared experts of a layer add to the routed ones.

        Beside these they hide their launches and latency and add the memory traffic alone.
        """
        alone_s = self._ffn_s(tokens, self.model.shared_ffn_dim)
        beside = tokens <= FUSION[self.engine].shared_tokens
        if not beside or not self.operators.times_kernels:
            return alone_s
        weights = sum(one.n * one.k for one in self.shard.ffn(self.model.shared_ffn_dim))
        read_s = weights * self.shard.dense_weight_bytes / self.gpu.memory_bytes_per_s
        return max(alone_s - routed_s, read_s)

    def _experts_s(self, tokens: float) -> float:
        m, op, groups = self.model, self.operators, self.expert_groups
        shape = self._experts
        if groups > 1:
            # as many rows as the fullest group has; a token has no more than whole experts there
            rows = tokens * m.active_experts / groups
            rows *= fullest_share(tokens, m.num_experts, m.active_experts, groups)
            tokens = max(rows / shape.active, 1.0)
        return op.experts_s(tokens, shape)

    def prefill_s(self, chunk: float, context: float) -> float:
        """Seconds of a chunk's attention in all layers; see `terms`."""
        m, op = self.model, self.operators
        if m.latent_dim:
            latent = self._source_of("projections")
            return m.layers * latent.latent_prefill_s(chunk, context, self.shard.latent_heads)
        shape = self.shard.attention_heads
        total = (m.layers - m.window_layers) * op.prefill_attention_s(chunk, context, shape)
        if m.window_layers:
            # each query sees a window: as blocks of one window over half of one, which has the
            # same number of pairs
            block = min(chunk, float(m.window_tokens))
            before = max(min(context, m.window_tokens - 0.5 * block), 0.0)
            if chunk > block:
                before = 0.5 * block
            one = op.prefill_attention_s(block, before, shape)
            total += m.window_layers * chunk / block * one
        return total

    def decode_s(self, batch: float, kv_tokens: float, *, mixed: bool, queries: int = 1) -> float:
        """Seconds of decodes' attention in all layers.

        Args:
            batch: Decoding sequences.
            kv_tokens: Tokens these attend to in all.
            mixed: In a step that prefills too.
            queries: Tokens of each sequence, the drafted ones included. All of them read the same
                keys and values, as the query heads of a group do. Beside prefills each head has a
                tile of its own, which they fill further.
        """
        m, op = self.model, self.operators
        if m.latent_dim:
            heads = self.shard.latent_heads
            return m.layers * op.latent_decode_s(batch, kv_tokens, heads, queries)
        shape = self.shard.attention_heads
        if not mixed:
            shape = shape._replace(heads=queries * shape.heads)
        attention_s = op.mixed_attention_s if mixed else op.decode_attention_s
        total = (m.layers - m.window_layers) * attention_s(batch, kv_tokens, shape)
        if m.window_layers:
            seen = min(kv_tokens, batch * m.window_tokens)
            total += m.window_layers * attention_s(batch, seen, shape)
        return total

    def _beside_s(self, chunk: float, batch: float, kv_tokens: float) -> float:
        attention_s = self.decode_s(batch, kv_tokens, mixed=chunk > 0)
        return attention_s + self.empty_tiles_s() * batch * chunk

    def empty_tiles_s(self) -> float:
        """Seconds that each decode adds to a mixed step for each token of its longest chunk."""
        if self.model.latent_dim:
            return 0.0
        return self.model.layers * self.operators.empty_tiles_s(self.shard.heads)

    def dense_s(self, tokens: float, *, experts: bool = True) -> float:
        """Seconds of everything in a step that depends on its tokens alone.

        Without `experts`: of what a data-parallel rank that shares them computes by itself.
        """
        terms = self.terms(tokens)
        shared_s = 0.0 if experts else terms.get("experts", 0.0)
        return sum(terms.values()) - terms["cpu"] - shared_s

    def kv_capacity_tokens(self, memory_fraction: float = 0.9) -> int:
        """KV tokens that fit beside the weights.

        Raises:
            ConfigError: If the weights do not fit.
        """
        return self.shard.kv_capacity_tokens(self.gpu.memory_bytes, memory_fraction)

    @property
    def kv_token_bytes(self) -> float:
        """KV of one token, which a transfer has to move; bytes."""
        return self.shard.kv_token_bytes

    def compile(self, max_tokens: int = 8192, max_context: int = 131072) -> CostGrid:
        """Sample the terms on the grids that the simulator interpolates.

        Knots go where a straight line between their neighbours would be furthest off.

        Args:
            max_tokens: Largest token budget of a step.
            max_context: Longest context.

        Returns:
            The same object for the same arguments: leave its arrays as they are.
        """
        size = (max_tokens, max_context)
        if size not in self._compiled:
            self._compiled[size] = sample(self, *size)
        return self._compiled[size]
