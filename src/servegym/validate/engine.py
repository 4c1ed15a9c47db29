"""Replicas as real engines run them: step costs with the constants of an engine family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from servegym.assets.specs import gpu, model
from servegym.cluster.rank_rules import PrefillTogether
from servegym.cluster.spec import Link, ReplicaType, Role
from servegym.costs.formats import number_format
from servegym.costs.grid import CostGrid
from servegym.costs.pipeline import PipelineCost
from servegym.costs.shared import SharedCost
from servegym.costs.source import Routing
from servegym.costs.speculation import Speculation, shared_with_drafts, with_drafter
from servegym.costs.stages import StageGrids
from servegym.costs.step import StepCost
from servegym.costs.uncertainty import Uncertainty, World
from servegym.engines import EngineName
from servegym.errors import ConfigError

#: Of the network of a data-centre GPU, 400 Gb/s: `node_inter_node_bw` of H100 and H200 in
#: AIConfigurator's system files.
NETWORK_BYTES_PER_S = 50e9


@dataclass(frozen=True)
class EngineConstants:
    """What one engine family adds to the kernels, the same for every GPU and model.

    Attributes:
        step_s: Added to every step: scheduling, launches and kernels that no table holds.
        sequence_s: Added for every decoding sequence of a step: sampling, detokenising.
        dense_factor: On GEMMs, experts and collectives.
        request_s: From the client to the scheduler and back; added to TTFT and E2E.
    """

    step_s: float = 0.0
    sequence_s: float = 0.0
    dense_factor: float = 1.0
    request_s: float = 0.0

    def apply(self, grid: CostGrid) -> CostGrid:
        """Return the step cost with these constants."""
        return replace(
            grid,
            cpu_s=max(0.0, grid.cpu_s + self.step_s),
            dense_s=grid.dense_s * self.dense_factor,
            decode_s=grid.decode_s + self.sequence_s * grid.decode_batch[:, np.newaxis],
            mixed_s=grid.mixed_s + self.sequence_s * grid.decode_batch[:, np.newaxis],
        )


@dataclass(frozen=True)
class EngineSetup:
    """One engine instance: what it runs on and its limits.

    Attributes:
        gpu: Name in `assets/gpus.yaml`.
        model: Name in `assets/models.yaml`.
        tp: Tensor-parallel degree.
        pp: Stages of `tp` GPUs on one node that layers are split over.
        precision: Of weights and GEMMs, see `servegym.costs.formats`.
        kv_precision: Of the KV cache, `bf16` or `fp8`.
        max_num_seqs: Running requests.
        max_num_batched_tokens: Token budget of a step.
        computes_once: Whether a prompt alone must fit a step, see `ReplicaType`.
        block_size: Tokens in a KV block.
        num_blocks: KV blocks; None: what the memory model gives.
        memory_fraction: Share of GPU memory the engine may use.
        routing: How tokens fall on the experts of a mixture.
        engine: Whose rules and kernels.
        expert_groups: Groups of GPUs that split the experts under tensor-parallel attention.
        expert_ranks: Data-parallel ranks that share their experts and run in lockstep.
        together: When such ranks prefill; None: each whenever it can.
        separate_attention: Whether chunks and decodes of a step have attention kernels of their
            own, as in every engine but vLLM V1, which hands both to FlashAttention at once.
        host_sequence_s: Time between steps in which the GPU waits for the CPU, for each sequence.
        eager_layer_s: Time to launch the kernels of a layer in a step that prefills.
        chunked_prefill: Whether prompts are split over steps.
        prefix_caching: Whether KV of equal prefixes is used again.
        acceptance: Of drafts by a layer of the model's own, see `costs.speculation`; empty: none.
    """

    gpu: str
    model: str
    tp: int = 1
    pp: int = 1
    precision: str = "bf16"
    kv_precision: str = "bf16"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    computes_once: bool = False
    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    routing: Routing = "uniform"
    engine: EngineName = "vllm"
    expert_groups: int = 1
    expert_ranks: int = 1
    together: PrefillTogether | None = None
    separate_attention: bool = False
    host_sequence_s: float = 0.0
    eager_layer_s: float = 0.0
    chunked_prefill: bool = True
    prefix_caching: bool = False
    acceptance: tuple[float, ...] = ()

    def replica(self, constants: EngineConstants, world: World | None = None) -> ReplicaType:
        """Return the replica type to simulate; with shared experts a rank in lockstep.

        Args:
            constants: Of the engine family.
            world: Whose kernels it has; None: as predicted.

        Raises:
            ConfigError: If the GPU, the model or the degree is not allowed, or the weights do
                not fit.
        """
        if self.acceptance:
            return self._with_drafts(constants, world)
        if self.pp > 1:
            return self._with_stages(constants, world)
        grid, kv_tokens = _compiled(self._kernels, self.memory_fraction, self.expert_ranks)
        shared = self.shared()
        if world is not None:
            uncertainty = _uncertainty(self._kernels, self.memory_fraction, self.expert_ranks)
            grid = uncertainty.in_world(grid, world)
            shared = shared and uncertainty.shared_in_world(shared, world)
        return self._made(self._as_run(grid, constants), kv_tokens, shared)

    def _with_stages(self, constants: EngineConstants, world: World | None) -> ReplicaType:
        """See `replica`; each stage pays what the engine family adds to a step."""
        pipeline, kv_tokens = _compiled_stages(self._kernels, self.memory_fraction, self.pp)
        if world is not None:
            doubt = Uncertainty.of(self.gpu, self.cost(), pipeline.stages[0])
            pipeline = doubt.stages_in_world(pipeline, world)
        pipeline = pipeline.changed(lambda stage: self._as_run(stage, constants))
        made = self._made(pipeline.shared_round, kv_tokens, None)
        return replace(made, pipeline=pipeline)

    def _with_drafts(self, constants: EngineConstants, world: World | None) -> ReplicaType:
        """See `replica`; a layer of the model's own drafts, and has KV of its own."""
        if self.pp > 1:
            raise ConfigError("drafts do not go with stages of a pipeline yet")
        cost, ranks = self.cost(), self.expert_ranks
        speculation = _compiled_drafts(self._kernels, self.acceptance, ranks)
        shared = None
        if ranks > 1:
            shared = shared_with_drafts(cost, len(self.acceptance), ranks, self.max_num_seqs)
        if world is not None:
            doubt = _uncertainty(self._kernels, self.memory_fraction, ranks)
            speculation = doubt.speculation_in_world(speculation, world)
            shared = shared and doubt.shared_in_world(shared, world)
        speculation = speculation.changed(lambda steps: self._as_run(steps, constants))
        fits = with_drafter(cost)
        kv_tokens = (
            fits.kv_capacity_tokens(self.memory_fraction)
            if ranks == 1
            else _rank_capacity(fits, ranks, self.memory_fraction)
        )
        made = self._made(speculation.per_token(self.max_num_seqs), kv_tokens, shared)
        return replace(made, speculation=speculation)

    def _as_run(self, grid: CostGrid, constants: EngineConstants) -> CostGrid:
        """Return a step cost as the engine has it, beyond its kernels."""
        if self.separate_attention:
            grid = replace(grid, mixed_s=grid.decode_s, empty_tiles_s=0.0)
        layers = model(self.model).layers / self.pp
        grid = replace(grid, eager_s=self.eager_layer_s * layers)
        constants = replace(constants, sequence_s=constants.sequence_s + self.host_sequence_s)
        return constants.apply(grid)

    def _made(self, grid: CostGrid, kv_tokens: int, shared: SharedCost | None) -> ReplicaType:
        stages = f" pp{self.pp}" if self.pp > 1 else ""
        return ReplicaType(
            name=f"{self.gpu} x{self.tp}{stages}",
            grid=grid,
            num_blocks=max(1, self.num_blocks or kv_tokens // self.block_size),
            max_num_batched_tokens=max(self.max_num_batched_tokens, self.max_num_seqs),
            max_num_seqs=self.max_num_seqs,
            num_gpus=self.tp * self.pp,
            engine=self.rules,
            shared=shared,
            together=self.together,
            computes_once=self.computes_once,
        )

    def worker(
        self, role: Role, constants: EngineConstants, world: World | None = None
    ) -> ReplicaType:
        """Return the replica type of a worker that only prefills or only decodes; see `replica`.

        It goes by the rules of vLLM V1, as all such workers do. Its KV takes the network of its
        GPUs, each of which has a link of its own.
        """
        # a decoding worker launches no prefill: the one token that it computes of what has landed
        # is a decode to it
        alone = self if role == "prefill" else replace(self, eager_layer_s=0.0)
        made = alone.replica(constants, world)
        shared = made.shared
        if role == "decode" and shared is not None:
            # what is admitted there computes one token: no text falls on the experts unevenly
            shared = replace(shared, skewed_experts_s=shared.experts_s)
        link = Link(self.tp * NETWORK_BYTES_PER_S)
        return replace(made, engine="vllm", role=role, link=link, shared=shared)

    @property
    def rules(self) -> EngineName:
        """Whose rules form the steps.

        vLLM's where ranks in lockstep would have to prefill and decode at once.
        """
        apart = self.expert_ranks > 1 and self.engine in ("vllm-v0", "sglang")
        return "vllm" if apart else self.engine

    def cost(self) -> StepCost:
        """Return the step cost of the model on these GPUs.

        Raises:
            ConfigError: If the GPU, the model or the degree is not allowed.
        """
        return _step_cost(self._kernels)

    @property
    def _kernels(self) -> _Kernels:
        return _Kernels(
            self.gpu,
            self.model,
            self.tp,
            self.precision,
            self.routing,
            self.engine,
            self.kv_precision,
            self.expert_groups,
        )

    def shared(self) -> SharedCost | None:
        """Return what its ranks do together, None if they share no experts."""
        if self.expert_ranks == 1:
            return None
        return SharedCost.of(self.cost(), self.expert_ranks, self.max_num_seqs)


class _Kernels(NamedTuple):
    """What the times of operators depend on."""

    gpu: str
    model: str
    tp: int
    precision: str
    routing: Routing
    engine: EngineName
    kv_precision: str
    expert_groups: int


@lru_cache(maxsize=1024)
def _step_cost(kernels: _Kernels) -> StepCost:
    weights = number_format(kernels.precision)
    return StepCost(
        gpu(kernels.gpu),
        model(kernels.model),
        kernels.tp,
        weights.fp8,
        fp4=weights.fp4,
        scales=weights.scales,
        fp8_kv=kernels.kv_precision == "fp8",
        routing=kernels.routing,
        engine=kernels.engine,
        expert_groups=kernels.expert_groups,
    )


@lru_cache(maxsize=1024)
def _compiled(kernels: _Kernels, fraction: float, ranks: int) -> tuple[CostGrid, int]:
    cost = _step_cost(kernels)
    if ranks == 1:
        return cost.compile(), cost.kv_capacity_tokens(fraction)
    return _own_work(cost), _rank_capacity(cost, ranks, fraction)


@lru_cache(maxsize=1024)
def _compiled_stages(kernels: _Kernels, fraction: float, pp: int) -> tuple[StageGrids, int]:
    pipeline = PipelineCost(_step_cost(kernels), pp)
    return StageGrids.of(pipeline), pipeline.kv_capacity_tokens(fraction)


@lru_cache(maxsize=1024)
def _compiled_drafts(kernels: _Kernels, acceptance: tuple[float, ...], ranks: int) -> Speculation:
    return Speculation.of(_step_cost(kernels), acceptance, experts=ranks == 1)


@lru_cache(maxsize=1024)
def _uncertainty(kernels: _Kernels, fraction: float, ranks: int) -> Uncertainty:
    grid, _ = _compiled(kernels, fraction, ranks)
    found = Uncertainty.of(kernels.gpu, _step_cost(kernels), grid)
    if ranks == 1:
        return found
    own = dict(found.parts_s)
    del own["experts"]
    return replace(found, parts_s=own)


def _own_work(cost: StepCost) -> CostGrid:
    """Return what a data-parallel rank computes by itself: all but the experts."""
    grid = cost.compile()
    dense_s = [cost.dense_s(tokens, experts=False) for tokens in grid.dense_tokens]
    return replace(grid, dense_s=np.array(dense_s))


def _rank_capacity(cost: StepCost, ranks: int, fraction: float) -> int:
    """KV tokens of one rank that holds its share of the experts."""
    spec = cost.model
    lighter = spec.model_copy(
        update={
            "num_params": spec.num_params - spec.expert_params * (1.0 - 1.0 / ranks),
            "num_experts": spec.num_experts // ranks,
        }
    )
    return replace(cost, model=lighter).kv_capacity_tokens(fraction)
