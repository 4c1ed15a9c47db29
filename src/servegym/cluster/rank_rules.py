"""When data-parallel ranks in lockstep prefill."""

from __future__ import annotations

from dataclasses import dataclass

from servegym.errors import ConfigError


@dataclass(frozen=True)
class PrefillTogether:
    """Ranks wait with prefills until all have one, so that fewer steps are long.

    TensorRT-LLM's `attention_dp_config` with `enable_balance`, whose defaults these are
    (`PyExecutor._balance_adp_requests`, 1.1 and 1.2).

    Attributes:
        timeout_steps: A group prefills after so many steps in a row in which not every rank could,
            whether or not anyone waited in them (`timeout_iters`).
        gather_steps: Steps for which it waits for more prompts when every rank could prefill and
            decodes (`batching_wait_iters`).
    """

    timeout_steps: int = 50
    gather_steps: int = 10

    def __post_init__(self) -> None:
        if self.timeout_steps < 1:
            raise ConfigError(f"timeout_steps must be at least 1, got {self.timeout_steps}")
        if self.gather_steps < 0:
            raise ConfigError(f"gather_steps must be at least 0, got {self.gather_steps}")
