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

from servegym.agents.network import Prepared
from servegym.errors import ConfigError
from servegym.policy.counterfactual import Teacher, due, worth_of
from servegym.policy.drawn_lengths import learn_lengths
from servegym.policy.layout import scenario_actions
from servegym.scenario import Scenario
from servegym.train.counterfactual_settings import CounterfactualTraining
from servegym.train.dispatcher_run import DispatcherRun, episode_stats
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Stage
from servegym.train.validation import Validation

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
        self.memory = Memory(config.memory)

    @staticmethod
    @override
    def completed(config: CounterfactualTraining, scenario: Scenario) -> CounterfactualTraining:
        if scenario.spec.disaggregated:
            raise ConfigError(
                "choices are tried as if a replica did all of a request, but some of "
                f"{scenario.name} only prefill or decode: take --learner ppo"
            )
        if scenario.spec.migrates:
            raise ConfigError(
                "choices are tried as if requests stayed where they are, but those of "
                f"{scenario.name} migrate: take --learner ppo"
            )
        if scenario.spec.tiered:
            raise ConfigError(
                "choices are tried as if a replica computed all of a request, but in "
                f"{scenario.name} KV is loaded from behind the GPUs: take --learner ppo"
            )
        return DispatcherRun.completed(config, scenario)

    @cached_property
    @override
    def validation(self) -> Validation:
        return Validation(
            self.scenario,
            loads=np.linspace(*self.config.load, 4).tolist(),
            num_episodes=self.config.validation_episodes,
            num_requests=self.config.validation_requests,
        )

    @property
    @override
    def num_updates(self) -> int:
        return self.config.total_labels // self.config.labels_per_update

    @cached_property
    def teacher(self) -> Teacher:
        """Who says what choices are worth."""
        c = self.config
        worth = worth_of(self.scenario.objective)._replace(
            num_samples=c.num_samples, prefix_price=c.prefix_price
        )
        if self.scenario.objective == "goodput":
            worth = worth._replace(second=c.second_price, stretch=c.stretch, softness=c.softness)
        return Teacher(learn_lengths(self.scenario), worth, num_threads=c.label_threads)

    def warm_up(self) -> None:
        """Compile, and bring the environments to their places."""
        super().warm_up()
        self._label(0)

    @override
    def close_stage(self) -> None:
        self.teacher.close()
        super().close_stage()

    def improve(self) -> dict[str, float]:
        """Play, label and fit."""
        done_share = self.share()
        episodes = self._collect()
        return self._fit(done_share) | episode_stats(episodes)

    def _label(self, key: int) -> np.ndarray:
        """Value every action in all environments, `float64[num_envs, A]`."""
        simulator, actions = self.env.batch.simulator, self.scenario.actions
        own = scenario_actions(simulator.max_replicas, hold=actions.hold, reject=actions.reject)
        return self.teacher.values(simulator, due(simulator), key)[:, own]

    @torch.no_grad()
    def _collect(self) -> list[tuple[float, float]]:
        """Let the present policy play, and label some of its decisions."""
        c = self.config
        episodes: list[tuple[float, float]] = []
        first = self.update * c.num_steps
        for step in range(c.num_steps):
            prepared = self.prepared(self.observation)
            if step % c.label_every == 0:
                values = self.on_device(self._label((c.seed << 32) + first + step))
                self.memory.add(prepared, advantages(values, prepared.mask))
            self.step(self.network.logits(prepared), episodes)
        return episodes

    def _fit(self, done_share: float) -> dict[str, float]:
        """Raise the mean advantage of what the network would do in the states of the memory."""
        c = self.config
        self.optimizer.param_groups[0]["lr"] = c.learning_rate * (1.0 - done_share)
        smoothing = c.smoothing * (1.0 - 0.9 * done_share)
        rows, advantage = self.memory.content()
        scale = float(advantage.std()) + 1e-8
        gains, regrets = [], []
        for _ in range(c.num_batches):
            part = torch.randint(len(advantage), (c.batch,), device=advantage.device)
            some = Prepared(*(x[part] for x in rows))
            log_probs = self.network.logits(some).log_softmax(-1)
            probs, a = log_probs.exp(), advantage[part]
            gain = (probs * a).sum(-1).mean()
            evenness = ((log_probs * some.mask).sum(-1) / some.mask.sum(-1)).mean()
            loss = -gain / scale - smoothing * evenness
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), c.max_grad_norm)
            self.optimizer.step()
            gains.append(float(gain.detach()))
            regrets.append(float(a.amax(-1).mean()) - gains[-1])
        return {
            "train/policy_loss": -float(np.mean(gains)),
            "train/regret": float(np.mean(regrets)),
            "train/entropy": float(-(probs * log_probs).sum(-1).mean().detach()),
            "train/labels": float(len(advantage)),
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    @override
    def state(self) -> dict[str, Any]:
        return {**super().state(), "memory": self.memory.state()}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        super().restore(content)
        self.memory.restore(content["memory"])


def advantages(values: Tensor, mask: Tensor) -> Tensor:
    """Subtract from what is allowed its mean; what is not allowed has 0.

    Args:
        values: Of all actions, `float32[batch, A]`.
        mask: 1 where allowed, same shape.
    """
    mean = (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return (values - mean) * mask


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
        kept = [x[: min(self._count, self._size)].cpu() for x in self._arrays]
        return {"kept": kept, "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what was kept."""
        self._count = int(state["count"])
        self._arrays = []
        for x in state["kept"]:
            self._arrays.append(x.new_empty((self._size, *x.shape[1:])))
            self._arrays[-1][: len(x)] = x
