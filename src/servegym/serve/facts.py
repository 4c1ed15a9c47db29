"""What is known of each replica without asking it: from its hardware, or from given numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import gpu, model
from servegym.calibrate.calibration import calibrated_cost
from servegym.cluster.nominal import (
    REFERENCE_BATCH,
    REFERENCE_OUTPUT_TOKENS,
    REFERENCE_PROMPT_TOKENS,
    nominal_facts,
    reference_request_s,
)
from servegym.cluster.spec import ClusterSpec, ReplicaType
from servegym.costs.step import StepCost
from servegym.policy.contract import NO_BOUND, NUM_NOMINAL
from servegym.typing import FloatArray


class Hardware(BaseModel):
    """A replica whose costs servegym knows.

    Attributes:
        gpu: Type, as in `gpus.yaml`.
        model: As in `models.yaml`.
        tp: Tensor-parallel degree.
        precision: Of weights.
        calibration: File of `servegym calibrate` for this GPU, model and degree.
        speed: Factor on its speed, 1 is nominal.
        max_num_seqs: Engine setting.
        max_num_batched_tokens: Engine setting.
        kv_memory_fraction: Share of the memory that the engine may use.
        kv_capacity_tokens: Size of the KV cache, if it is known better.
        link_gb_per_s: At which KV comes and goes where replicas have roles; `None`: not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    gpu: str
    model: str
    tp: int = Field(1, ge=1)
    precision: Literal["bf16", "fp8"] = "bf16"
    calibration: Path | None = None
    speed: float = Field(1.0, gt=0)
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=1)
    kv_memory_fraction: float = Field(0.9, gt=0, le=1)
    kv_capacity_tokens: int | None = Field(None, ge=1)
    link_gb_per_s: float | None = Field(None, gt=0)

    def replica_type(self) -> ReplicaType:
        """Make it a replica of the simulator.

        Raises:
            ConfigError: If a name is unknown or the calibration was made for another.
        """
        cost = self._cost()
        tokens = self.kv_capacity_tokens or cost.kv_capacity_tokens(self.kv_memory_fraction)
        return ReplicaType(
            name=f"{self.gpu} x{self.tp}",
            grid=cost.compile(max_tokens=max(self.max_num_batched_tokens, 64)),
            num_blocks=tokens,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
        )

    def kv_rate(self) -> float:
        """Tokens whose KV its link moves in a second; 0: not known."""
        if self.link_gb_per_s is None:
            return 0.0
        return min(1e9 * self.link_gb_per_s / self._cost().kv_token_bytes, NO_BOUND)

    def _cost(self) -> StepCost:
        if self.calibration is not None:
            return calibrated_cost(self.calibration, self.gpu, self.model, self.tp, self.precision)
        return StepCost(gpu(self.gpu), model(self.model), self.tp, self.precision == "fp8")


class Rates(BaseModel):
    """A replica described by its numbers; the names are the contract's.

    Attributes:
        prefill_tokens_per_s: Prefill rate at a full token budget.
        decode_step_s: Duration of a step that decodes one sequence.
        decode_seq_s: Extra step time of each further decoding sequence of 1,024 tokens.
        kv_capacity_tokens: Size of the KV cache; 0: ask the engine's metrics.
        max_num_seqs: Engine setting.
        max_num_batched_tokens: Engine setting.
        kv_tokens_per_s: Tokens whose KV comes or goes in a second where replicas have roles; 0: not
            known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prefill_tokens_per_s: float = Field(gt=0)
    decode_step_s: float = Field(gt=0)
    decode_seq_s: float = Field(0.0, ge=0)
    kv_capacity_tokens: int = Field(0, ge=0)
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=1)
    kv_tokens_per_s: float = Field(0.0, ge=0)

    def reference_request_s(self) -> float:
        """Engine seconds of the simulator's reference request, as far as these numbers tell."""
        batch = min(REFERENCE_BATCH, self.max_num_seqs)
        step_s = self.decode_step_s + (batch - 1) * self.decode_seq_s
        prefill_s = REFERENCE_PROMPT_TOKENS / self.prefill_tokens_per_s
        return prefill_s + REFERENCE_OUTPUT_TOKENS * step_s / batch


def kv_tokens_per_s(entry: Hardware | Rates) -> float:
    """Return how many tokens' KV a replica's link moves in a second; 0 where it is not known."""
    return entry.kv_rate() if isinstance(entry, Hardware) else entry.kv_tokens_per_s


@functools.lru_cache(maxsize=64)  # equal replicas are compiled once
def _of_hardware(entry: Hardware) -> tuple[float, ...]:
    made = entry.replica_type()
    _, prefill, step_s, seq_s, *sizes = nominal_facts(ClusterSpec((made,), block_size=1))[
        0
    ].tolist()
    speed, request_s = entry.speed, reference_request_s(made)
    return (speed / request_s, prefill * speed, step_s / speed, seq_s / speed, *sizes)


def replica_facts(entry: Hardware | Rates) -> FloatArray:
    """Return the static rows of one replica's observation; of new hardware it takes seconds.

    Returns:
        `float64[NUM_NOMINAL]`, in the order of the contract, but for the speed, which is in
        reference requests per second: how fast it is beside others is the fleet's business.

    Raises:
        ConfigError: If a name is unknown or a calibration was made for another replica.
    """
    if isinstance(entry, Hardware):
        return np.array(_of_hardware(entry), np.float64)
    facts = (
        1.0 / entry.reference_request_s(),
        entry.prefill_tokens_per_s,
        entry.decode_step_s,
        entry.decode_seq_s,
        entry.kv_capacity_tokens,
        entry.max_num_seqs,
        entry.max_num_batched_tokens,
    )
    return np.array(facts, np.float64)


def fleet_facts(replicas: Sequence[Hardware | Rates]) -> FloatArray:
    """Return the static rows of a fleet's observation.

    Args:
        replicas: One entry each.

    Returns:
        `float64[NUM_NOMINAL, R]`, in the order of the contract; the fastest replica's relative
        speed is 1.

    Raises:
        ConfigError: If a name is unknown or a calibration was made for another replica.
    """
    rows = np.zeros((NUM_NOMINAL, len(replicas)))
    for r, entry in enumerate(replicas):
        rows[:, r] = replica_facts(entry)
    if len(replicas):
        rows[0] /= rows[0].max()
    return rows
