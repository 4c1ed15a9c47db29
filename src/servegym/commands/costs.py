"""`servegym costs`."""

from __future__ import annotations

from dataclasses import dataclass

from servegym.assets.specs import gpu, model
from servegym.commands.console import make_console
from servegym.costs.explain import costs_table
from servegym.costs.step import StepCost


@dataclass(frozen=True)
class Costs:
    """Show what engine steps cost on a replica, and which term dominates."""

    gpu: str = "H100-SXM-80GB"
    """GPU type."""
    model: str = "Llama-3.1-8B"
    """Model served."""
    tp: int = 1
    """Tensor-parallel degree."""
    fp8: bool = False
    """Weights and GEMMs in fp8."""
    context: int = 1024
    """KV tokens of each decoding sequence."""

    def run(self) -> None:
        """Print the table."""
        cost = StepCost(gpu(self.gpu), model(self.model), self.tp, self.fp8)
        title = f"{self.model} on {self.tp} x {self.gpu} ({cost.operators.name})"
        console = make_console()
        console.print(costs_table(title, cost, context=self.context))
        console.print(f"KV cache: {cost.kv_capacity_tokens():,} tokens at 90 % of memory")
