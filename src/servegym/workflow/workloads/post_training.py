"""Dataflow of reinforcement learning from feedback: generate, judge, train, reallocate."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from servegym.assets.specs import model
from servegym.typing import IntArray
from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.device_cost import (
    TRAINING_BYTES,
    WEIGHT_BYTES,
    DeviceCost,
    device_cost,
)
from servegym.workflow.workloads.family import Family
from servegym.workloads.mixtures import LengthConfig

_GENERATE, _REFERENCE, _REWARD, _VALUE, _TRAIN_ACTOR, _TRAIN_CRITIC = range(6)
#: A token's number and its logarithmic probability; a number a token (reward, value, reference).
_SAMPLE_BYTES, _SCORE_BYTES = 8.0, 4.0


class PostTraining(Family):
    """Some iterations of PPO: shards of a batch are generated and judged, then both models train.

    A device is a node of `gpus_per_device` GPUs, tensor parallel. Durations come from the kernel
    costs of each type: generation follows the lengths drawn (a batch shrinks as its sequences end),
    judging is a forward pass, training three and the update of the optimiser's state. A model that
    trains in one place and runs in another is moved: its weights are the bytes of the edge to the
    next generation or valuation, weights and optimiser state of the one to the next training
    (parameter reallocation, as in ReaLHF, Mei et al. 2024). A type without the memory for a stage
    has no duration. Sizes are of the order of published PPO runs.

    Attributes:
        device_types: GPUs, by the names of `assets/gpus.yaml`.
        gpus_per_device: Of a node.
        actor: Model that learns; the reference is its first version.
        critic: Model that values, of the same size as the one that rewards.
        iterations: Of a job.
        num_sequences: A batch.
        num_shards: Parts of it that are generated and judged on their own.
        prompt_tokens: Of every sequence.
        output: Length of what is generated.
    """

    labels: ClassVar[tuple[str, ...]] = (
        *("generate", "reference", "reward", "value"),
        *("train actor", "train critic"),
    )

    kind: Literal["post-training"] = "post-training"
    device_types: tuple[str, ...] = Field(("H100-SXM-80GB", "A100-SXM-80GB", "L40S"), min_length=1)
    gpus_per_device: int = Field(8, ge=1)
    actor: str = "Llama-3.1-8B"
    critic: str = "Llama-3.1-8B"
    iterations: int = Field(2, ge=1)
    num_sequences: int = Field(512, ge=1)
    num_shards: int = Field(4, ge=1)
    prompt_tokens: int = Field(512, ge=1)
    output: LengthConfig = LengthConfig(medians_tokens=(500.0,), sigmas=(0.6,), max_tokens=2048)

    def job(self, rng: np.random.Generator) -> Job:
        """Draw the lengths of a run."""
        builder = JobBuilder("post-training", self.device_types)
        weights_bytes = [
            WEIGHT_BYTES * model(name).num_params for name in (self.actor, self.critic)
        ]
        before: tuple[int, int] | None = None
        for _ in range(self.iterations):
            outputs = self.output.draw(rng, self.num_sequences)
            shards = np.array_split(outputs, min(self.num_shards, self.num_sequences))
            judged = [self._shard(builder, shard) for shard in shards]
            lengths = outputs + self.prompt_tokens
            now = (
                self._train(builder, _TRAIN_ACTOR, self.actor, lengths),
                self._train(builder, _TRAIN_CRITIC, self.critic, lengths),
            )
            for (generate, *scores), shard in zip(judged, shards, strict=True):
                tokens = float((shard + self.prompt_tokens).sum())
                for train in now:
                    builder.edge(generate, train, data_bytes=_SAMPLE_BYTES * tokens)
                    for score in scores:
                        builder.edge(score, train, data_bytes=_SCORE_BYTES * tokens)
            if before:
                for generate, _, _, value in judged:
                    builder.edge(before[0], generate, data_bytes=weights_bytes[0])
                    builder.edge(before[1], value, data_bytes=weights_bytes[1])
                for k in range(2):
                    state_bytes = TRAINING_BYTES / WEIGHT_BYTES * weights_bytes[k]
                    builder.edge(before[k], now[k], data_bytes=state_bytes)
            before = now
        return builder.build()

    def _shard(self, builder: JobBuilder, outputs: IntArray) -> tuple[int, int, int, int]:
        """Add what happens to a part of the batch before training."""
        lengths = outputs + self.prompt_tokens
        longest = int(lengths.max())
        generate = builder.task(
            _GENERATE,
            self._seconds(
                self.actor,
                lambda node: node.generation_s(self.prompt_tokens, outputs),
                lambda node: node.can_hold(longest),
            ),
        )
        judges = []
        for label, name in (
            (_REFERENCE, self.actor),
            (_REWARD, self.critic),
            (_VALUE, self.critic),
        ):
            seconds = self._seconds(
                name, lambda node: node.forward_s(lengths), lambda node: node.can_hold(longest)
            )
            judge = builder.task(label, seconds)
            builder.edge(generate, judge, data_bytes=_SAMPLE_BYTES * float(lengths.sum()))
            judges.append(judge)
        return generate, judges[0], judges[1], judges[2]

    def _train(self, builder: JobBuilder, label: int, name: str, lengths: IntArray) -> int:
        seconds = self._seconds(name, lambda node: node.training_s(lengths), DeviceCost.can_train)
        return builder.task(label, seconds)

    def _seconds(
        self,
        model_name: str,
        seconds: Callable[[DeviceCost], float],
        fits: Callable[[DeviceCost], bool],
    ) -> dict[str, float]:
        """Duration on each type that a model fits on, by name."""
        nodes = {
            name: device_cost(name, model_name, self.gpus_per_device) for name in self.device_types
        }
        return {name: seconds(node) for name, node in nodes.items() if fits(node)}
