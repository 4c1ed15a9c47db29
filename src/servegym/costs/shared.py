"""What data-parallel ranks that share the experts of a mixture do together in a step.

Each rank has its own queue and KV cache, and computes attention for its own requests. In every
layer the ranks exchange their tokens, compute their share of the experts for the tokens of all,
and give them back; so that layer by layer all wait for the slowest, and their steps begin and end
together (`cluster.lockstep`). A step small enough for a CUDA graph pads every rank to the graph of
the fullest one.

How tokens fall on experts decides what that costs. Decodes are one token each of many texts, and
mixtures are trained to spread those evenly. A chunk is hundreds of tokens of one text, and Qwen3's
are not held to spread a single text evenly (global-batch balancing: Qiu et al., ACL 2025), so that
one rank has more of it than others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import FloatArray

if TYPE_CHECKING:
    from servegym.costs.step import StepCost

_KNOTS = np.unique(np.round(np.geomspace(1, 65536, 97)))
#: Knots of the tables. Fixed, so that replicas of different types share one array in the simulator.
NUM_SHARED_KNOTS = len(_KNOTS)
_ACTIVATION_BYTES = 2.0
#: Tokens of the fullest rank over those of the mean one, by the number of ranks, under the skewed
#: routing of AIConfigurator's benchmarks (power law, exponent 1.2): medians over its tables of
#: experts split over ranks, against even routing split likewise. `scripts/fit-hot-ranks`
_HOT_RANKS, _HOT = np.log([1.0, 2.0, 4.0, 8.0, 16.0]), (1.0, 1.15, 1.34, 1.56, 1.9)


@dataclass(frozen=True)
class SharedCost:
    """What all ranks of a group do together in a step, beside what each does by itself.

    Between knots times are linear, and go on with the last slope.

    Attributes:
        num_ranks: Ranks of the group.
        tokens: Knots, strictly ascending, `float64[NUM_SHARED_KNOTS]`.
        experts_s: Seconds of a rank's share of the experts in a step of decodes, by the tokens of
            all ranks, same shape.
        skewed_experts_s: Likewise of the fullest rank in a step with chunks, same shape.
        exchange_s: Seconds in which tokens go to all ranks and come back, by the tokens of the
            fullest rank, same shape.
        largest_graph: Most tokens of a rank for which there is a CUDA graph; 0: there is none.
    """

    num_ranks: int
    tokens: FloatArray
    experts_s: FloatArray
    skewed_experts_s: FloatArray
    exchange_s: FloatArray
    largest_graph: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ConfigError(f"num_ranks must be at least 1, got {self.num_ranks}")
        if self.largest_graph < 0:
            raise ConfigError(f"largest_graph must be at least 0, got {self.largest_graph}")
        for name in ("tokens", "experts_s", "skewed_experts_s", "exchange_s"):
            values = getattr(self, name)
            if values.shape != (NUM_SHARED_KNOTS,):
                raise ConfigError(
                    f"{name} must have shape ({NUM_SHARED_KNOTS},), got {values.shape}"
                )
            if not np.isfinite(values).all() or (values < 0).any():
                raise ConfigError(f"{name} must be finite and not negative")
        if (np.diff(self.tokens) <= 0).any():
            raise ConfigError("the knots tokens must ascend strictly")

    @classmethod
    def of(cls, cost: StepCost, num_ranks: int, max_num_seqs: int) -> SharedCost:
        """Take the shared terms of a step cost over so many ranks.

        Ranks with more tokens than others send them one rank at a time (vLLM's `all_gatherv` and
        `reduce_scatterv`), so the fullest decides: the exchange takes what it would with that many
        tokens on every rank. Activations go there and back, router logits there, two bytes each.
        """
        model, gather_s = cost.model, cost.operators.all_gather_s
        skewed = replace(cost, routing="skewed")
        hot = float(np.interp(math.log(num_ranks), _HOT_RANKS, _HOT))

        def exchange_s(tokens: float) -> float:
            there_and_back = 2.0 * gather_s(
                _ACTIVATION_BYTES * num_ranks * tokens * model.hidden, num_ranks
            )
            logits = gather_s(_ACTIVATION_BYTES * num_ranks * tokens * model.num_experts, num_ranks)
            return model.layers * (there_and_back + logits)

        return cls(
            num_ranks=num_ranks,
            tokens=_KNOTS,
            experts_s=np.array([cost.terms(t)["experts"] / num_ranks for t in _KNOTS]),
            skewed_experts_s=np.array(
                [skewed.terms(hot * t)["experts"] / num_ranks for t in _KNOTS]
            ),
            exchange_s=np.array([exchange_s(t) for t in _KNOTS]),
            # what vLLM records unless told otherwise
            largest_graph=min(512, 2 * max_num_seqs),
        )

    def step_s(self, rank_tokens: list[int], *, prefills: bool) -> float:
        """Return what a step adds to the own work of its slowest rank.

        Args:
            rank_tokens: Tokens of each rank in the step, at least 1.
            prefills: Whether any of them computes a prompt.

        Returns:
            Seconds.
        """
        fullest, tokens = max(rank_tokens), sum(rank_tokens)
        if fullest <= self.largest_graph:
            fullest = next(size for size in _graph_sizes() if size >= fullest)
            tokens = self.num_ranks * fullest
        experts_s = self.skewed_experts_s if prefills else self.experts_s
        return self._at(self.exchange_s, fullest) + self._at(experts_s, tokens)

    def _at(self, values_s: FloatArray, tokens: int) -> float:
        place = int(np.searchsorted(self.tokens, tokens, side="right")) - 1
        i = min(max(place, 0), NUM_SHARED_KNOTS - 2)
        slope = (values_s[i + 1] - values_s[i]) / (self.tokens[i + 1] - self.tokens[i])
        return float(values_s[i] + (tokens - self.tokens[i]) * slope)


def _graph_sizes() -> Iterator[int]:
    """Sizes of the CUDA graphs that vLLM records, in tokens."""
    return itertools.chain((1, 2, 4), range(8, 257, 8), itertools.count(272, 16))
