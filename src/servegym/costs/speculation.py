"""Speculative decoding with a head of the model's own: what drafting and verifying cost.

A drafter of one layer (multi-token prediction, EAGLE) reads the hidden states of the model. With
the step that verifies, it runs over all of that step's tokens, as one more layer does; then once
for each further draft, over one token of each sequence, with the output head again. The model
itself computes every decoding sequence's next token and all of its drafts in one pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from servegym.assets.specs import ModelSpec
from servegym.costs.grid import NUM_BATCH_KNOTS, CostGrid, scaled
from servegym.costs.pipeline import layer_params, part_of
from servegym.costs.sampling import sample
from servegym.costs.shared import SharedCost
from servegym.costs.step import StepCost
from servegym.errors import ConfigError
from servegym.typing import FloatArray


@dataclass(frozen=True)
class Speculation:
    """Drafts of every decoding request, verified in its next step.

    Attributes:
        acceptance: For each draft how often it and all before it are accepted, as in vLLM's log
            and `synthetic_acceptance_rates`: not increasing.
        steps: Cost of a step; `decode_s` and `mixed_s` are of sequences with all their drafts, and
            include what drafting attends to.
        draft_s: Seconds of drafting beside that, by the sequences of the step, at the knots
            `decode_batch`; `float64[NUM_BATCH_KNOTS]`.
    """

    acceptance: tuple[float, ...]
    steps: CostGrid
    draft_s: FloatArray

    def __post_init__(self) -> None:
        check_acceptance(self.acceptance)
        if self.draft_s.shape != (NUM_BATCH_KNOTS,):
            raise ConfigError(
                f"draft_s must have shape ({NUM_BATCH_KNOTS},), got {self.draft_s.shape}"
            )
        if not np.isfinite(self.draft_s).all() or (self.draft_s < 0).any():
            raise ConfigError("draft_s must be finite and not negative")

    @classmethod
    def of(
        cls,
        cost: StepCost,
        acceptance: tuple[float, ...],
        max_tokens: int = 8192,
        *,
        experts: bool = True,
    ) -> Speculation:
        """Compile the cost of a model with a drafter.

        Args:
            cost: Of a step without.
            acceptance: See above; as many drafts as it has numbers.
            max_tokens: Largest token budget of a step.
            experts: Whether experts are among it; else what ranks do together is in
                `shared_with_drafts`.
        """
        num_tokens = len(acceptance)
        whole, drafter = with_drafter(cost), replace(cost, model=_last_layer(cost))
        steps = sample(whole, max_tokens, max_context=131072, queries=1 + num_tokens)
        more = num_tokens - 1
        attended_s = np.array(
            [
                [more * drafter.decode_s(b, k, mixed=False) for k in steps.decode_kv]
                for b in steps.decode_batch
            ]
        )
        dense_s = steps.dense_s
        if not experts:
            dense_s = np.array([whole.dense_s(t, experts=False) for t in steps.dense_tokens])
        joined_s = np.array([_joining_s(cost, tokens) for tokens in steps.dense_tokens])
        return cls(
            acceptance,
            replace(
                steps,
                dense_s=dense_s + joined_s,
                decode_s=steps.decode_s + attended_s,
                mixed_s=steps.mixed_s + attended_s,
            ),
            np.array(
                [
                    cost.terms(batch)["output head"]
                    + more * (drafter.dense_s(batch, experts=experts) + _joining_s(cost, batch))
                    for batch in steps.decode_batch
                ]
            ),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that are drafted for a request (vLLM's `num_speculative_tokens`)."""
        return len(self.acceptance)

    @property
    def mean_tokens(self) -> float:
        """Tokens that come out for a request in one step, in the mean."""
        return 1.0 + sum(self.acceptance)

    def drafting_s(self, sequences: int) -> float:
        """Return the seconds of drafting in a step of so many sequences."""
        knots, values = self.steps.decode_batch, self.draft_s
        i = min(max(int(knots.searchsorted(sequences, side="right")) - 1, 0), len(knots) - 2)
        share = (sequences - knots[i]) / (knots[i + 1] - knots[i])
        return float(values[i] + share * (values[i + 1] - values[i]))

    def step_s(self, chunks: list[tuple[int, int]], decodes: list[tuple[int, int]]) -> float:
        """Return the seconds of one step.

        Args:
            chunks: `(chunk, context)` in tokens of every prefilling request in the step.
            decodes: The same of every decoding one; its tokens are the next and its drafts.
        """
        grid = self.steps
        prompts = sum(chunk for chunk, _ in chunks)
        total = grid.cpu_s + grid.dense(prompts + sum(tokens for tokens, _ in decodes))
        total += sum(grid.prefill(chunk, context) for chunk, context in chunks)
        if decodes:
            attention = grid.mixed if chunks else grid.decode
            total += attention(len(decodes), sum(map(sum, decodes)))
            longest = max((chunk for chunk, _ in chunks), default=0)
            total += grid.empty_tiles_s * len(decodes) * longest
        total += self.drafting_s(len(chunks) + len(decodes))
        return max(total, grid.eager_s) if chunks else total

    def changed(self, change: Callable[[CostGrid], CostGrid]) -> Speculation:
        """Return the same with the grid of its steps changed."""
        return replace(self, steps=change(self.steps))

    def slower(self, factor: float) -> Speculation:
        """Return the same with all times so many times as long."""
        return replace(self, steps=scaled(self.steps, factor), draft_s=factor * self.draft_s)

    def per_token(self, max_num_seqs: int) -> CostGrid:
        """The step cost of an engine that decodes one token a step as fast as this one.

        For whoever states rates, or plans without drafts. Steps of as many tokens as sequences can
        decode are taken for decodes, longer ones for prefills.

        Args:
            max_num_seqs: Running requests at most.
        """
        grid, mean = self.steps, self.mean_tokens
        knots = grid.dense_tokens
        decodes_s = np.array(
            [(grid.dense((1 + self.num_tokens) * x) + self.drafting_s(x)) / mean for x in knots]
        )
        prefills_s = grid.dense_s + grid.cpu_s * (1.0 - 1.0 / mean)
        dense_s = np.where(knots <= max_num_seqs, decodes_s, prefills_s)
        return replace(
            grid,
            cpu_s=grid.cpu_s / mean,
            dense_s=np.maximum.accumulate(dense_s),
            decode_s=grid.decode_s / mean,
        )


def check_acceptance(acceptance: tuple[float, ...]) -> None:
    """Refuse rates that cannot be.

    Raises:
        ConfigError: If there are none, or they are not from 0 to 1, or increase.
    """
    if not acceptance:
        raise ConfigError(
            "acceptance rates must be one for each drafted token, at least 1, got none"
        )
    if not all(0.0 <= rate <= 1.0 for rate in acceptance):
        raise ConfigError(f"acceptance rates must be from 0 to 1, got {list(acceptance)}")
    if any(b > a for a, b in itertools.pairwise(acceptance)):
        raise ConfigError(
            "acceptance rates must not increase, as each is of a draft and all before it, got "
            f"{list(acceptance)}"
        )


def with_drafter(cost: StepCost) -> StepCost:
    """Return the step cost of a model with one layer more, which drafts."""
    m = cost.model
    layer = _last_layer(cost)
    update = {
        "layers": m.layers + 1,
        "kv_bytes_per_token": m.kv_bytes_per_token + layer.kv_bytes_per_token,
        "num_params": m.num_params + layer_params(layer) + 2.0 * m.hidden * m.hidden,
    }
    return replace(cost, model=m.model_copy(update=update))


def shared_with_drafts(
    cost: StepCost, num_tokens: int, num_ranks: int, max_num_seqs: int
) -> SharedCost:
    """Return what ranks do together that draft so many tokens; see `SharedCost.of`.

    The drafter has experts of its own. Its further passes are over one token of each sequence, of
    as many as a step of decodes has with such drafts.
    """
    most = max_num_seqs * (1 + num_tokens)
    found = SharedCost.of(with_drafter(cost), num_ranks, most)
    once = SharedCost.of(replace(cost, model=_last_layer(cost)), num_ranks, most)
    more, sequences = num_tokens - 1, found.tokens / (1 + num_tokens)

    def with_passes(first_s: FloatArray, one_s: FloatArray) -> FloatArray:
        return first_s + more * np.interp(sequences, once.tokens, one_s)

    return replace(
        found,
        experts_s=with_passes(found.experts_s, once.experts_s),
        skewed_experts_s=with_passes(found.skewed_experts_s, once.skewed_experts_s),
        exchange_s=with_passes(found.exchange_s, once.exchange_s),
    )


def _last_layer(cost: StepCost) -> ModelSpec:
    layers = cost.model.layers
    return part_of(cost.model, layers - 1, layers)


def _joining_s(cost: StepCost, tokens: float) -> float:
    """Seconds to join a token's hidden state with its embedding: a product on every GPU."""
    hidden = cost.model.hidden
    return cost.operators.gemm_s(tokens, hidden, 2 * hidden, cost.shard.dense_weight_bytes)
