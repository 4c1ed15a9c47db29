"""From where a replica loads KV, and how KV gets there and back: docs/kv-tiers.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from servegym.errors import ConfigError, unknown_name

#: Whether KV that a tier has is always loaded, or only where computing it anew takes longer.
LoadRule = Literal["always", "faster"]


@dataclass(frozen=True)
class KvTier:
    """A store of KV blocks; it forgets those that were used longest ago.

    Attributes:
        num_blocks: What it holds.
        read_bytes_per_s: From it, one load after the other.
        write_bytes_per_s: To it, one block after the other.
        latency_s: From the last byte to where it can be used.
    """

    num_blocks: int
    read_bytes_per_s: float = float("inf")
    write_bytes_per_s: float = float("inf")
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigError(
                f"a KV tier must hold at least 1 block, got {self.num_blocks}: make it larger, or "
                "leave it out"
            )
        for name in ("read_bytes_per_s", "write_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of a KV tier must be above 0, got {getattr(self, name)}")
        if not 0 <= self.latency_s < np.inf:
            raise ConfigError(
                f"latency_s of a KV tier must be at least 0 and finite, got {self.latency_s}"
            )


@dataclass(frozen=True)
class TierRules:
    """What all replicas have in common of the tiers behind their KV blocks.

    Attributes:
        load: Whether KV that a tier has is always loaded, as vLLM and LMCache do, or only where
            computing it anew would take longer (`"faster"`).
        interference: Factor on the duration of steps that begin while KV moves between a GPU and
            its tiers.
        store: A store that all replicas share, with each one's link to it.
        store_bytes_per_s: Of the store's own in each direction, for all replicas together.
        balancing_threshold: A prefix that another replica has, and that is more than so many
            times as long as what a replica and its tiers have of a request, is fetched over the
            links of both (Mooncake's name); None: nothing is.
    """

    load: LoadRule = "always"
    interference: float = 1.0
    store: KvTier | None = None
    store_bytes_per_s: float = float("inf")
    balancing_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.load not in get_args(LoadRule):
            raise ConfigError(unknown_name("load", self.load, list(get_args(LoadRule))))
        if not 1 <= self.interference < np.inf:
            raise ConfigError(
                f"interference must be at least 1 and finite, got {self.interference}"
            )
        if self.balancing_threshold is not None and not 1 <= self.balancing_threshold < np.inf:
            raise ConfigError(
                "balancing_threshold must be at least 1 and finite, got "
                f"{self.balancing_threshold}: leave it out to fetch nothing"
            )
        if not self.store_bytes_per_s > 0:
            raise ConfigError(f"store_bytes_per_s must be above 0, got {self.store_bytes_per_s}")
