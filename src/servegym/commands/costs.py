"""The command `servegym costs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from servegym.assets.specs import gpu, model
from servegym.calibrate.calibration import cost_from, read_calibration
from servegym.commands.console import make_console
from servegym.costs.explain import costs_table, evidence_table, stages_table
from servegym.costs.pipeline import NetworkLink, PipelineCost
from servegym.costs.source import Routing, Scales
from servegym.costs.step import StepCost
from servegym.costs.tables import source_of
from servegym.engines import EngineName
from servegym.errors import ConfigError


@dataclass(frozen=True)
class Costs:
    """Show what engine steps cost on a replica, which term dominates and what was measured."""

    gpu: str = "H100-SXM-80GB"
    """GPU type."""
    model: str = "Llama-3.1-8B"
    """Model served."""
    tp: int = 1
    """Tensor-parallel degree."""
    pp: int = 1
    """Pipeline-parallel degree: stages of `tp` GPUs each."""
    pp_link_gb_per_s: float | None = None
    """Of each GPU to its next stage on another node; without it all stages are on one node."""
    pp_link_latency_s: float = 0.0
    """Of such a link."""
    source: Literal["fits", "tables"] = "fits"
    """Fits of assets, or measured tables of the package aiconfigurator-core if installed."""
    engine: EngineName = "vllm"
    """Whose kernels, where they were fitted; TensorRT-LLM's fuse norms, casts and all-reduces."""
    fp8: bool = False
    """Weights and GEMMs in fp8."""
    scales: Scales = "dynamic"
    """Of activations in fp8: computed with every call, held by the checkpoint, or a block's."""
    fp4: bool = False
    """Weights in fp4."""
    fp8_kv: bool = False
    """KV cache of eight bits."""
    expert_groups: int = 1
    """Groups of GPUs that split a mixture's experts under tensor-parallel attention."""
    routing: Routing = "uniform"
    """How a mixture's experts are hit: all alike, or as the benchmarks' power law."""
    calibration: Path | None = None
    """File of `servegym calibrate` to show instead; it names its own GPU, model and tp."""
    context: int = 1024
    """KV tokens of each decoding sequence."""

    def run(self) -> None:
        """Print what steps cost, and what stands behind it."""
        if self.context < 1:
            raise ConfigError(f"context must be at least 1 token, got {self.context}")
        if self.pp_link_latency_s and self.pp_link_gb_per_s is None:
            raise ConfigError("pp_link_latency_s is of a link: give pp_link_gb_per_s, too")
        if self.pp == 1 and self.pp_link_gb_per_s is not None:
            raise ConfigError("pp_link_gb_per_s is of the link between stages: give pp, too")
        if self.calibration:
            if self.pp != 1:
                raise ConfigError("a calibration is of whole steps on one stage: leave pp at 1")
            self._show_calibration(self.calibration)
            return
        spec = gpu(self.gpu)
        source, note = source_of(spec, self.source, fp8=self.fp8, fp4=self.fp4)
        cost = StepCost(
            spec,
            model(self.model),
            self.tp,
            self.fp8,
            source,
            fp4=self.fp4,
            routing=self.routing,
            fp8_kv=self.fp8_kv,
            engine=self.engine,
            scales=self.scales,
            expert_groups=self.expert_groups,
        )
        console = make_console()
        if note:
            console.print(note)
        if self.pp != 1:
            self._show_stages(cost, source.name)
            return
        title = f"{self.model} on {self.tp} x {self.gpu} ({source.name}, {cost.status})"
        console.print(costs_table(title, cost, context=self.context))
        console.print(evidence_table(cost))
        console.print(f"KV cache: {cost.kv_capacity_tokens():,} tokens at 90 % of memory")

    def _show_stages(self, cost: StepCost, source: str) -> None:
        rate = self.pp_link_gb_per_s
        link = None if rate is None else NetworkLink(1e9 * rate, self.pp_link_latency_s)
        pipeline = PipelineCost(cost, self.pp, link)
        title = f"{self.model} on {self.pp} x {self.tp} x {self.gpu} ({source}, {pipeline.status})"
        kv_tokens = pipeline.kv_capacity_tokens()
        console = make_console()
        console.print(stages_table(title, pipeline, context=self.context))
        console.print(evidence_table(pipeline))
        layers = " + ".join(str(one.model.layers) for one in pipeline.stages)
        console.print(
            f"KV cache: {kv_tokens:,} tokens at 90 % of memory, "
            f"by the smallest of stages with {layers} layers"
        )

    def _show_calibration(self, path: Path) -> None:
        cost, made = cost_from(path), read_calibration(path)
        title = f"{made.model} on {made.tp} x {made.gpu} ({cost.operators.name}, {cost.status})"
        console = make_console()
        console.print(costs_table(title, cost, context=self.context))
        console.print(evidence_table(cost))
