"""Policy iteration on what all choices would have done: a dispatcher that begins as a rule.

The present policy plays; at some of its decisions every choice is tried on the state as it is
(`policy.counterfactual`), and the network is fitted to raise the mean of what its choices are worth
there. Such a decision says more than hundreds of PPO's, in whose returns what one choice did is
lost among what all others did. What a label is worth does not depend on who plays, so that those of
earlier policies are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from servegym.agents.acting import Acting
from servegym.agents.network import Prepared
from servegym.errors import ConfigError
from servegym.policy.counterfactual import Teacher, worth_of
from servegym.scenario import Scenario, load_scenario
from servegym.train.arena import Arena
from servegym.train.counterfactual_settings import CounterfactualTraining
from servegym.train.dispatcher_run import DispatcherRun, episode_stats
from servegym.train.labels import advantages, label, make_teacher, require_whole_requests
from servegym.train.mix import Mix, is_mix, load_mix, parts_of
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Stage

#: First logit of holds and rejections; that of the rule's choice is 0.
FIRST_EXTRA = -4.0


class CounterfactualTrainer(DispatcherRun[CounterfactualTraining]):
    """A run that trains a dispatcher; `found` is its network."""

    settings = CounterfactualTraining
    stages = (Stage("policy iteration", "updates"),)
    algorithm = "counterfactual"

    def __init__(self, config: CounterfactualTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        # what is not tried does not show in the gradient, so that holds and rejections begin rare,
        # but not so rare as PPO, which tries what it does, can afford
        nn.init.constant_(self.network.extra.bias, FIRST_EXTRA)
        self.memories = [Memory(config.memory // len(self.parts)) for _ in self.parts]

    @staticmethod
    @override
    def load_scenario(name_or_path: str) -> Scenario | Mix:
        return load_mix(name_or_path) if is_mix(name_or_path) else load_scenario(name_or_path)

    @staticmethod
    @override
    def completed(
        config: CounterfactualTraining, scenario: Scenario | Mix
    ) -> CounterfactualTraining:
        parts = parts_of(scenario, config.load)
        for part in parts:
            require_whole_requests(part.scenario, "--learner ppo")
        least = len(parts) * config.labels_per_update
        if config.total_labels < least:
            raise ConfigError(
                f"total_labels must be at least those of an update of {len(parts)} scenarios,"
                f" {least}, got {config.total_labels}"
            )
        if config.memory < least:
            raise ConfigError(
                f"memory must hold the {least} labels of an update of {len(parts)} scenarios, got"
                f" {config.memory}"
            )
        return DispatcherRun.completed(config, scenario)

    @property
    @override
    def validation_size(self) -> tuple[int, int]:
        return self.config.validation_episodes, self.config.validation_requests

    @property
    @override
    def num_updates(self) -> int:
        return self.config.total_labels // (len(self.parts) * self.config.labels_per_update)

    @override
    def goes_on(self) -> bool:
        stale = 0 < self.config.patience <= self.since_best
        return super().goes_on() and not stale

    @cached_property
    def teachers(self) -> list[Teacher]:
        """Who says what choices are worth, in each scenario."""
        c = self.config
        worth = worth_of(self.scenario.objective)._replace(
            num_samples=c.num_samples,
            prefix_price=c.prefix_price,
            prefill_price=c.prefill_price,
            memory_price=c.memory_price,
        )
        if self.scenario.objective == "goodput":
            worth = worth._replace(second=c.second_price, stretch=c.stretch, softness=c.softness)
        return [
            make_teacher(part.scenario, part.prices.over(worth), num_threads=c.label_threads)
            for part in self.parts
        ]

    def warm_up(self) -> None:
        """Compile, and bring the environments to their places."""
        super().warm_up()
        for arena, teacher in zip(self.arenas, self.teachers, strict=True):
            label(arena, teacher, 0)

    @override
    def close_stage(self) -> None:
        for teacher in self.teachers:
            teacher.close()
        super().close_stage()

    def improve(self) -> dict[str, float]:
        """Play, label and fit."""
        done_share = self.share()
        episodes: list[tuple[float, float]] = []
        for arena, teacher, memory in zip(self.arenas, self.teachers, self.memories, strict=True):
            self._collect(arena, teacher, memory, episodes)
        return self._fit(done_share) | episode_stats(episodes)

    @torch.no_grad()
    def _collect(
        self,
        arena: Arena,
        teacher: Teacher,
        memory: Memory,
        episodes: list[tuple[float, float]],
    ) -> None:
        """Let the present policy play a scenario, and label some of its decisions."""
        c = self.config
        acting = Acting(self.network)
        first = self.update * c.num_steps
        for step in range(c.num_steps):
            prepared = arena.prepared(acting)
            if step % c.label_every == 0:
                values = self.on_device(label(arena, teacher, (c.seed << 32) + first + step))
                memory.add(prepared, advantages(values, prepared.mask))
            arena.step(acting.logits(prepared), episodes)

    def _fit(self, done_share: float) -> dict[str, float]:
        """Raise the mean advantage of what the network would do in the states of the memories.

        Those of each scenario count in their own standard deviation, and all scenarios alike.
        """
        c = self.config
        self.optimizer.param_groups[0]["lr"] = c.learning_rate * (1.0 - done_share)
        smoothing = c.smoothing * (1.0 - 0.9 * done_share)
        contents = [memory.content() for memory in self.memories]
        scales = [float(advantage.std()) + 1e-8 for _, advantage in contents]
        size = max(1, c.batch // len(contents))
        gains, regrets = [], []
        for _ in range(c.num_batches):
            batches: dict[int, list[tuple[Prepared, Tensor, float]]] = {}
            for (rows, advantage), scale in zip(contents, scales, strict=True):
                part = torch.randint(len(advantage), (size,), device=advantage.device)
                drawn = Prepared(*(x[part] for x in rows)), advantage[part], scale
                batches.setdefault(advantage.shape[-1], []).append(drawn)
            losses = []
            for same_width in batches.values():
                some = Prepared(*map(torch.cat, zip(*(b[0] for b in same_width), strict=True)))
                a = torch.cat([b[1] for b in same_width])
                own = torch.tensor([b[2] for b in same_width], device=a.device)
                log_probs = self.network.logits(some).log_softmax(-1)
                probs = log_probs.exp()
                gain = (probs * a).sum(-1)
                evenness = (log_probs * some.mask).sum(-1) / some.mask.sum(-1)
                scaled = gain.unflatten(0, (-1, size)).mean(-1) / own
                losses.append(-scaled.sum() - smoothing * len(own) * evenness.mean())
                gains.append(float(gain.detach().mean()))
                regrets.append(float(a.amax(-1).mean()) - gains[-1])
            self.optimizer.zero_grad(set_to_none=True)
            (torch.stack(losses).sum() / len(contents)).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), c.max_grad_norm)
            self.optimizer.step()
        return {
            "train/policy_loss": -float(np.mean(gains)),
            "train/regret": float(np.mean(regrets)),
            "train/entropy": float(-(probs * log_probs).sum(-1).mean().detach()),
            "train/labels": float(sum(len(advantage) for _, advantage in contents)),
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    @override
    def provenance(self) -> dict[str, float | int | str]:
        return {
            "labels": self.update * len(self.parts) * self.config.labels_per_update,
            "validation_gain": self.gain,
        }

    @override
    def state(self) -> dict[str, Any]:
        return {**super().state(), "memory": [memory.state() for memory in self.memories]}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        super().restore(content)
        for memory, stored in zip(self.memories, content["memory"], strict=True):
            memory.restore(stored)


class Memory:
    """The latest labelled decisions.

    Args:
        size: How many are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._arrays: list[Tensor] = []  # those of `Prepared`, then the advantages
        self._count = 0  # of all that were ever added

    def add(self, rows: Prepared, advantage: Tensor) -> None:
        """Keep some more, in place of the oldest if there is no room.

        Args:
            rows: What the network reads.
            advantage: Of all actions, `float32[batch, A]`.
        """
        new = [*rows, advantage]
        if not self._arrays:
            self._arrays = [x.new_empty((self._size, *x.shape[1:])) for x in new]
        place = (self._count + torch.arange(len(advantage), device=advantage.device)) % self._size
        for kept, x in zip(self._arrays, new, strict=True):
            kept[place] = x
        self._count += len(advantage)

    def content(self) -> tuple[Prepared, Tensor]:
        """Return all that is kept."""
        *rows, advantage = (x[: min(self._count, self._size)] for x in self._arrays)
        return Prepared(*rows), advantage

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        # a copy: of a view all would be saved
        kept = [x[: min(self._count, self._size)].cpu().clone() for x in self._arrays]
        return {"kept": kept, "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what was kept."""
        self._count = int(state["count"])
        self._arrays = []
        for x in state["kept"]:
            self._arrays.append(x.new_empty((self._size, *x.shape[1:])))
            self._arrays[-1][: len(x)] = x
