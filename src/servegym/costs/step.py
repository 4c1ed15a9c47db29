"""The cost of an engine step: operators of every layer, added up and compiled to grids."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from servegym.assets.specs import GpuSpec, ModelSpec
from servegym.costs.engines import FUSION
from servegym.costs.forms import WEIGHT_BYTES
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.costs.roofline import RooflineSource
from servegym.costs.routing import fullest_share
from servegym.costs.source import CostSource, Evidence, LatentHeads, Routing, Scales
from servegym.engines import EngineName
from servegym.errors import ConfigError, unknown_name
from servegym.typing import FloatArray

_ACTIVATION_BYTES = 2.0
#: Memory of a GPU beside weights and KV cache: driver, activations, CUDA graphs. What vLLM 0.19
#: left on an RTX 4090 (Llama-3.1-8B, 2,048 tokens a step); larger steps of larger models need more.
_RESERVED_BYTES = 1.7e9
#: Parts of a model that a checkpoint may hold in another precision than its experts.
Part = Literal["projections", "output", "ffn", "router", "head"]


class _Gemm(NamedTuple):
    """A GEMM of one GPU: columns and rows of its weights, and whether every GPU has the same."""

    n: int
    k: int
    part: Part
    copied: bool = False


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
    _parts: dict[str, CostSource] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

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
        if self.fp8 and not self.gpu.fp8_flops:
            raise ConfigError("this GPU has no fp8 units: choose precision bf16")
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
        source = self.source or RooflineSource(self.gpu, self.fp8, fp4=self.fp4)
        if isinstance(source, RooflineSource):
            gpu, scales = source.gpu.of(self.engine), self.scales
            if self._casts_apart:
                scales = "static"
            fp8_kv = self.fp8_kv and not self.model.latent_dim
            if (gpu, scales, fp8_kv) != (source.gpu, source.scales, source.fp8_kv):
                source = replace(
                    source, gpu=gpu, scales=scales, fp8_kv=fp8_kv, _surfaces={}, _tables={}
                )
        if self.fp4 and self.model.fp4_experts_only and isinstance(source, RooflineSource):
            source = replace(source, bf16_dense=True, _surfaces={}, _tables={})
        object.__setattr__(self, "source", source)
        self.operators.all_reduce_s(1.0, self.tp)  # refuse a degree without collectives

    @property
    def operators(self) -> CostSource:
        """The source of operator times."""
        assert self.source is not None
        return self.source

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

    @property
    def all_weight_bytes(self) -> float:
        """Bytes of all weights."""
        m = self.model
        kept, copied = 0.0, 0.0
        for one in self._projections():
            if self._is_16bit(one.part):
                kept += m.layers * one.n * one.k * (1 if one.copied else self.tp)
            if one.copied:
                copied += self._bytes_of(one.part) * m.layers * one.n * one.k * (self.tp - 1)
        if m.latent_dim and self._is_16bit("projections"):
            kept += m.layers * 2 * m.heads * m.head_dim * m.latent_dim
        if self._is_16bit("head"):
            kept += m.vocab * m.hidden
        rest = m.num_params - m.expert_params - kept
        weights = self.weight_bytes * m.expert_params + self.dense_weight_bytes * rest
        return weights + WEIGHT_BYTES["bf16"] * kept + copied

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What stands behind the time of every operator of a step."""
        m, op = self.model, self.operators
        gemms = {(self._is_16bit(one.part), one.n, one.k): one for one in self._gemms()}
        found = [self._source_of(one.part).gemm_evidence(one.n, one.k) for one in gemms.values()]
        if m.num_experts:
            found.append(op.experts_evidence(m.hidden, *self._expert_share, self.routing))
        if m.latent_dim:
            found += op.latent_evidence(self._latent_heads)
        else:
            found += op.attention_evidence(self._heads, self._kv_heads, m.head_dim)
        if m.window_layers:
            note = "a window computes as that many tokens without one"
            found.append(Evidence("sliding window", "extrapolated", note))
        if self.tp > 1:
            found.append(op.all_reduce_evidence(self.tp))
        return tuple(found)

    @property
    def validated(self) -> bool:
        """Whether every operator was measured on this GPU, so that no prior stands in for one."""
        return all(e.kind != "prior" for e in self.evidence)

    @property
    def status(self) -> str:
        """`validated` (operators measured on this GPU) or `extrapolated` (some are priors)."""
        return "validated" if self.validated else "extrapolated"

    @property
    def _heads(self) -> int:
        return self.model.heads // self.tp

    @property
    def _kv_heads(self) -> int:
        return max(1, self.model.kv_heads // self.tp)

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
        m, op = self.model, self.operators
        attention = sum(self._gemm_s(tokens, one) for one in self._projections())
        reductions = 1.0 if m.parallel_ffn else 2.0
        reduce_s = reductions * op.all_reduce_s(_ACTIVATION_BYTES * tokens * m.hidden, self.tp)
        head = self._gemm_s(min(tokens, 256.0), self._head)
        qk_width = (self._heads + self._kv_heads) * m.head_dim
        # the kernel of a mixture holds its activation
        ffn_width = 0 if m.num_experts else m.ffn_dim // self.tp
        mixture = {}
        if m.num_experts:
            experts_s = self._experts_s(tokens)
            mixture["experts"] = m.expert_layers * experts_s
            mixture["router"] = m.expert_layers * self._gemm_s(tokens, self._router)
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
                op.elementwise_s(tokens, m.hidden, qk_width, ffn_width)
                + self._other_kernels_s(tokens, qk_width)
            ),
            **({"casts": m.layers * self._casts_s(tokens)} if self._casts_apart else {}),
            "all-reduce": m.layers * reduce_s,
            "output head": head,
            "attention launch": m.layers * op.attention_launch_s(),
            "prefill attention": self._prefill_s(chunk, context) if chunk else 0.0,
            "decode attention": self._beside_s(chunk, batch, kv_tokens) if batch else 0.0,
        }

    @property
    def _casts_apart(self) -> bool:
        """Whether GEMMs take activations that are quantised before."""
        return self.scales == "static" or (self.fp4 and self.engine == "trtllm")

    @property
    def _fused_norms(self) -> bool:
        """Whether the all-reduces hold the norms that follow them."""
        return self.tp > 1 and self.engine in self.model.fused_norms

    def _other_kernels_s(self, tokens: float, qk_width: int) -> float:
        """Seconds that a layer's small kernels take beyond those of vLLM without Q and K norms."""
        if not isinstance(self.source, RooflineSource):
            return 0.0  # fitted on whole steps, which hold them
        m = self.model
        kernels = -2 if self._fused_norms else 0
        if FUSION[self.engine].rope_in_attention and not (m.qk_norm or m.latent_dim):
            kernels -= 1
        elif m.qk_norm and not FUSION[self.engine].rope_in_attention:
            kernels += 1  # else one kernel norms and rotates
        moved_s = self.source.qk_norm_s(tokens, qk_width) if m.qk_norm else 0.0
        return kernels * self.source.one_elementwise_s() + moved_s

    def _casts_s(self, tokens: float) -> float:
        """Seconds of the kernels of a layer that only quantise activations."""
        m, source = self.model, self.source
        if not isinstance(source, RooflineSource) or self.dense_weight_bytes > 1.0:
            return 0.0
        fusion = FUSION[self.engine]
        casts = fusion.fp4_casts if self.fp4 else fusion.fp8_casts
        widths = []
        if "norm" in casts and not self._fused_norms:
            # experts quantise what they take themselves
            ffn = [] if m.num_experts else [m.hidden]
            widths += ffn if self._is_16bit("projections") else [*ffn, m.hidden]
        if "attention" in casts and not self._is_16bit("output"):
            widths.append(self._heads * m.head_dim)
        if "activation" in casts and not m.num_experts:
            widths.append(m.ffn_dim // self.tp)
        return sum(source.cast_s(tokens, width) for width in widths)

    def _is_16bit(self, part: Part) -> bool:
        """Whether a checkpoint of eight or four bits keeps that part in 16."""
        if part == "router":
            return self.fp8 or self.fp4  # checkpoints and engines never quantise it
        if part == "head" and (self._casts_apart or self.scales == "block"):
            return True  # as those who publish such checkpoints leave it
        return self.fp4 and part in self.model.fp4_16bit

    def _source_of(self, part: Part) -> CostSource:
        """Operator times in the precision of that part."""
        if self._is_16bit(part) and isinstance(self.source, RooflineSource):
            if "16 bit" not in self._parts:
                self._parts["16 bit"] = replace(
                    self.source, bf16_dense=True, _surfaces={}, _tables={}
                )
            return self._parts["16 bit"]
        return self.operators

    def _bytes_of(self, part: Part) -> float:
        return WEIGHT_BYTES["bf16"] if self._is_16bit(part) else self.dense_weight_bytes

    def _gemm_s(self, tokens: float, one: _Gemm) -> float:
        return self._source_of(one.part).gemm_s(tokens, one.n, one.k, self._bytes_of(one.part))

    def _projections(self) -> list[_Gemm]:
        """The GEMMs around attention, on one GPU."""
        m, heads = self.model, self._heads
        output = _Gemm(m.hidden, heads * m.head_dim, "output")
        if not m.latent_dim:
            qkv = (heads + 2 * self._kv_heads) * m.head_dim
            return [_Gemm(qkv, m.hidden, "projections"), output]
        # every GPU computes the latents of queries, keys and values, in one GEMM; their expansion
        # to its heads is in the time of attention but for the queries'
        query = heads * (m.head_dim + m.latent_rope_dim)
        latents = m.latent_dim + m.latent_rope_dim + m.latent_query_dim
        return [
            _Gemm(latents, m.hidden, "projections", copied=True),
            _Gemm(query, m.latent_query_dim or m.hidden, "projections"),
            output,
        ]

    @property
    def _router(self) -> _Gemm:
        return _Gemm(self.model.num_experts, self.model.hidden, "router")

    @property
    def _head(self) -> _Gemm:
        return _Gemm(self.model.vocab // self.tp, self.model.hidden, "head")

    @property
    def _latent_heads(self) -> LatentHeads:
        m = self.model
        return LatentHeads(
            self._heads, m.head_dim, m.latent_dim, m.latent_rope_dim, fp8_kv=self.fp8_kv
        )

    def _gemms(self) -> list[_Gemm]:
        m = self.model
        found = self._projections()
        widths = [m.shared_ffn_dim] if m.shared_ffn_dim else []
        if m.num_experts:
            found.append(self._router)
        if m.dense_layers or not m.num_experts:
            widths.append(m.ffn_dim)
        for width in widths:
            found += self._ffn(width)
        return [*found, self._head]

    def _ffn(self, width: int) -> list[_Gemm]:
        m, mine = self.model, max(1, width // self.tp)
        return [
            _Gemm((m.ffn_matrices - 1) * mine, m.hidden, "ffn"),
            _Gemm(m.hidden, mine, "ffn"),
        ]

    def _ffn_s(self, tokens: float, width: int) -> float:
        up, down = self._ffn(width)
        return self._gemm_s(tokens, up) + self._gemm_s(tokens, down)

    @property
    def _expert_share(self) -> tuple[int, int, int]:
        """Width, number and active ones a token of the experts of one GPU."""
        m, groups = self.model, self.expert_groups
        width = max(1, m.expert_ffn_dim * groups // self.tp)
        return width, m.num_experts // groups, max(1, m.active_experts // groups)

    def _shared_experts_s(self, tokens: float, routed_s: float) -> float:
        """Seconds that the shared experts of a layer add to the routed ones.

        Beside these they hide their launches and latency and add the memory traffic alone.
        """
        alone_s = self._ffn_s(tokens, self.model.shared_ffn_dim)
        # other sources are fitted on whole steps
        beside = tokens <= FUSION[self.engine].shared_tokens
        if not beside or not isinstance(self.source, RooflineSource):
            return alone_s
        weights = sum(one.n * one.k for one in self._ffn(self.model.shared_ffn_dim))
        read_s = weights * self.dense_weight_bytes / self.gpu.memory_bytes_per_s
        return max(alone_s - routed_s, read_s)

    def _experts_s(self, tokens: float) -> float:
        m, op, groups = self.model, self.operators, self.expert_groups
        width, number, active = self._expert_share
        if groups > 1:
            # as many rows as the fullest group has; a token has no more than whole experts there
            rows = tokens * m.active_experts / groups
            rows *= fullest_share(tokens, m.num_experts, m.active_experts, groups)
            tokens = max(rows / active, 1.0)
        return op.experts_s(
            tokens,
            m.hidden,
            width,
            number,
            active,
            m.ffn_matrices,
            self.weight_bytes,
            self.routing,
        )

    def _prefill_s(self, chunk: float, context: float) -> float:
        m, op = self.model, self.operators
        if m.latent_dim:
            latent = self._source_of("projections")
            return m.layers * latent.latent_prefill_s(chunk, context, self._latent_heads)
        shape = (self._heads, self._kv_heads, m.head_dim)
        total = (m.layers - m.window_layers) * op.prefill_attention_s(chunk, context, *shape)
        if m.window_layers:
            # each query sees a window: as blocks of one window over half of one, which has the
            # same number of pairs
            block = min(chunk, float(m.window_tokens))
            before = max(min(context, m.window_tokens - 0.5 * block), 0.0)
            if chunk > block:
                before = 0.5 * block
            one = op.prefill_attention_s(block, before, *shape)
            total += m.window_layers * chunk / block * one
        return total

    def _decode_s(self, batch: float, kv_tokens: float, *, mixed: bool) -> float:
        m, op = self.model, self.operators
        if m.latent_dim:
            return m.layers * op.latent_decode_s(batch, kv_tokens, self._latent_heads)
        shape = (self._heads, self._kv_heads, m.head_dim)
        attention_s = op.mixed_attention_s if mixed else op.decode_attention_s
        total = (m.layers - m.window_layers) * attention_s(batch, kv_tokens, *shape)
        if m.window_layers:
            seen = min(kv_tokens, batch * m.window_tokens)
            total += m.window_layers * attention_s(batch, seen, *shape)
        return total

    def _beside_s(self, chunk: float, batch: float, kv_tokens: float) -> float:
        attention_s = self._decode_s(batch, kv_tokens, mixed=chunk > 0)
        return attention_s + self._empty_tiles_s() * batch * chunk

    def _empty_tiles_s(self) -> float:
        # other sources are fitted on whole steps, which hold it
        if self.model.latent_dim or not isinstance(self.source, RooflineSource):
            return 0.0
        return self.model.layers * self.source.empty_tiles_s(self._heads)

    def dense_s(self, tokens: float) -> float:
        """Seconds of everything in a step that depends on its tokens alone."""
        terms = self.terms(tokens)
        return sum(terms.values()) - terms["cpu"]

    def kv_capacity_tokens(self, memory_fraction: float = 0.9) -> int:
        """KV tokens that fit beside the weights.

        Raises:
            ConfigError: If the weights do not fit.
        """
        budget = memory_fraction * self.gpu.memory_bytes * self.tp
        weights = self.all_weight_bytes
        free = budget - weights - _RESERVED_BYTES * self.tp
        if free <= 0:
            raise ConfigError(
                f"the weights take {weights / 1e9:.0f} GB and do not fit the {budget / 1e9:.0f} GB "
                f"of {self.tp} GPU(s): raise tp, use fp8 or a smaller model"
            )
        # GPUs beyond the KV heads hold copies of them
        copies = max(1, self.model.kv_heads // self.tp) * self.tp / self.model.kv_heads
        token_bytes = (0.5 if self.fp8_kv else 1.0) * self.model.kv_bytes_per_token
        return int(free / (token_bytes * copies))

    def compile(self, max_tokens: int = 8192, max_context: int = 131072) -> CostGrid:
        """Sample the terms on the grids that the simulator interpolates.

        Knots go where a straight line between their neighbours would be furthest off.

        Args:
            max_tokens: Largest token budget of a step.
            max_context: Longest context.
        """
        tokens = np.round(np.geomspace(1, max_tokens, 400))
        last = FUSION[self.engine].shared_tokens
        if self.model.shared_ffn_dim and 0 < last < max_tokens:
            tokens = np.append(tokens, (last, last + 1))  # a step up
        tokens = np.unique(tokens)
        dense = np.array([self.dense_s(t) for t in tokens])
        cpu_s = self.operators.cpu_s()
        at = _knots(dense[:, None], tokens, cpu_s + dense[:, None], NUM_DENSE_KNOTS)
        step_s = cpu_s + dense[0]

        chunks = np.unique(np.round(np.geomspace(1, max_tokens, 60)))
        contexts = np.concatenate(([0.0], np.geomspace(16, max_context, 40)))
        prefill = np.array([[self._prefill_s(c, h) for h in contexts] for c in chunks])
        prefill = _growing(prefill)
        beside = prefill + cpu_s + np.interp(chunks, tokens, dense)[:, None]
        c = _knots(prefill, chunks, beside, NUM_CHUNK_KNOTS)
        h = _knots(prefill.T, contexts, beside.T, NUM_CONTEXT_KNOTS)

        bends: tuple[float, ...] = ()
        if not self.model.latent_dim:
            bends = self.operators.mixed_bends(self._heads, self._kv_heads)
        batches = np.concatenate((np.geomspace(1, 1024, 40), np.clip(bends, 1, 1024)))
        batches = np.unique(np.round(batches))
        kv = np.geomspace(1, 4.0e6, 73)
        decode, mixed = (
            np.array([[self._decode_s(b, k, mixed=beside) for k in kv] for b in batches])
            for beside in (False, True)
        )
        source = self.source
        grows = not isinstance(source, RooflineSource) or source.decode_grows_with_batch
        if grows and not self.model.latent_dim:
            decode = np.maximum.accumulate(decode, axis=0)
        decode = np.maximum.accumulate(decode, axis=1)
        # the same tokens in more sequences may take less time: they leave no multiprocessor idle
        mixed = np.maximum.accumulate(mixed, axis=1)
        both = np.concatenate((decode, mixed), axis=1)
        b = _knots(both, batches, both + step_s, NUM_BATCH_KNOTS)
        both = np.concatenate((decode, mixed), axis=0).T
        k = _knots(both, kv, both + step_s, NUM_KV_KNOTS)
        return CostGrid(
            cpu_s=cpu_s,
            dense_tokens=tokens[at],
            dense_s=dense[at],
            prefill_chunk=chunks[c],
            prefill_context=contexts[h],
            prefill_s=prefill[np.ix_(c, h)],
            decode_batch=batches[b],
            decode_kv=kv[k],
            decode_s=decode[np.ix_(b, k)],
            mixed_s=mixed[np.ix_(b, k)],
            empty_tiles_s=self._empty_tiles_s(),
        )


def _growing(values: FloatArray) -> FloatArray:
    return np.maximum.accumulate(np.maximum.accumulate(values, axis=0), axis=1)


def _knots(values: FloatArray, x: FloatArray, scale: FloatArray, count: int) -> list[int]:
    """Choose knots along the first axis, so that lines between them follow all columns.

    Args:
        values: Samples, `float64[N, columns]`.
        x: Where, ascending, `float64[N]`.
        scale: What an error is measured against, same shape as the samples.
        count: Knots to choose; first and last are among them.

    Returns:
        Indices, ascending.
    """
    chosen = [0, len(x) - 1]
    while len(chosen) < min(count, len(x)):
        i = np.searchsorted(x[chosen], x, side="right").clip(1, len(chosen) - 1)
        low, high = np.array(chosen)[i - 1], np.array(chosen)[i]
        share = ((x - x[low]) / (x[high] - x[low]))[:, None]
        line = values[low] + share * (values[high] - values[low])
        off = np.max(np.abs(line - values) / scale, axis=1)
        off[chosen] = -1.0
        chosen = sorted([*chosen, int(np.argmax(off))])
    if len(chosen) < count:
        raise ConfigError(f"max_tokens must leave {count} sizes to sample, got {int(x[-1])}")
    return chosen
