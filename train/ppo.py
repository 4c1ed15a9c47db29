"""Masked PPO over the vector environment: a dispatcher that begins as a rule."""

from __future__ import annotations

import logging
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
from servegym.baselines.registry import policy
from servegym.policy.counterfactual import Teacher
from servegym.scenario import Scenario, load_scenario
from servegym.train.compiled_loss import CompiledLoss
from servegym.train.dispatcher_run import DispatcherRun, episode_stats
from servegym.train.imitation import demonstrations, imitate
from servegym.train.labels import label, make_teacher, require_whole_requests
from servegym.train.mix import Mix, parts_of
from servegym.train.ppo_loss import AutogradLoss, Loss, LossParts, LossWeights
from servegym.train.ppo_settings import PPOConfig
from servegym.train.returns import RunningScale, chosen, gae, less_group_mean
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Stage

_log = logging.getLogger(__name__)

#: Validation episodes, and requests of each.
_VALIDATION = (16, 1024)


class Trainer(DispatcherRun[PPOConfig]):
    """A run that trains a dispatcher; `found` is its network."""

    settings = PPOConfig
    stages = (Stage("PPO", "updates"),)
    algorithm = "ppo"
    load_scenario = staticmethod(load_scenario)

    def __init__(self, config: PPOConfig, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        self.scale = RunningScale(config.num_envs, config.horizon_s)
        network = self.network
        self._loss: Loss = (
            CompiledLoss(network) if CompiledLoss.runs(network) else AutogradLoss(network)
        )

    @property
    @override
    def validation_size(self) -> tuple[int, int]:
        return _VALIDATION

    @property
    @override
    def num_updates(self) -> int:
        return self.config.total_decisions // self.steps_per_update

    def warm_up(self) -> None:
        """Imitate if that is asked for, compile, and bring the environments to their places."""
        if self.config.imitate and self.update == 0:
            self._imitate()
        super().warm_up()

    @staticmethod
    @override
    def completed(config: PPOConfig, scenario: Scenario | Mix) -> PPOConfig:
        for part in parts_of(scenario, config.load):
            if config.advantage == "counterfactual":
                require_whole_requests(part.scenario, "--advantage gae")
        return DispatcherRun.completed(config, scenario)

    def _imitate(self) -> None:
        c = self.config
        (part,) = self.parts
        data = demonstrations(
            part.scenario,
            policy(c.imitate),
            c.imitate_decisions,
            num_extra=c.network.num_extra,
            extended=c.network.extended,
            load=c.load,
        )
        agreed = imitate(self.network, data)
        _log.info("imitates %s in %.1f %% of unseen decisions", c.imitate, 100 * agreed)
        self.keep_the_better()

    def improve(self) -> dict[str, float]:
        """Step all environments for a while, and learn from that."""
        done_share = self.share()
        by_trying = self.config.advantage == "counterfactual"
        batch, rows, episodes = self._labelled() if by_trying else self._rollout()
        return self._learn(batch, rows, done_share) | episode_stats(episodes)

    @torch.no_grad()
    def _rollout(self) -> tuple[dict[str, Tensor], Prepared, list[tuple[float, float]]]:
        c = self.config
        (arena,) = self.arenas
        acting = Acting(self.network)
        seen: list[Prepared] = []
        logits: list[Tensor] = []
        actions: list[Tensor] = []
        rewards, dts, ends = (np.empty((c.num_steps, c.num_envs)) for _ in range(3))
        episodes: list[tuple[float, float]] = []  # return, mean E2E seconds
        for step in range(c.num_steps):
            prepared = arena.prepared(acting)
            scores = acting.logits(prepared)
            action, reward, dts[step], ends[step] = arena.step(scores, episodes)
            rewards[step] = self.scale(reward, dts[step], ends[step] > 0)
            seen.append(prepared)
            logits.append(scores)
            actions.append(action)
        rows = Prepared(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
        shape = (c.num_steps, c.num_envs)
        value = self.network.values(rows).view(shape)
        last = self.network.values(arena.prepared(acting))
        gamma = self.on_device(np.exp(-dts / c.horizon_s) * (1.0 - ends))
        lam = self.on_device(np.exp(-dts / c.credit_s))
        advantage = gae(self.on_device(rewards), value, gamma, last, lam)
        action = torch.cat(actions)
        batch = {
            "action": action,
            "log_prob": chosen(torch.cat(logits).log_softmax(-1), action),
            "value": value.flatten(),
            "target": (advantage + value).flatten(),
            "advantage": less_group_mean(advantage, c.group_size).flatten(),
        }
        return batch, rows, episodes

    @cached_property
    def teacher(self) -> Teacher:
        """Who says what choices are worth."""
        (part,) = self.parts
        return make_teacher(part.scenario, num_threads=1)

    @torch.no_grad()
    def _labelled(self) -> tuple[dict[str, Tensor], Prepared, list[tuple[float, float]]]:
        """Step all environments, and keep the decisions whose choices are all tried."""
        c = self.config
        (arena,) = self.arenas
        acting = Acting(self.network)
        seen: list[Prepared] = []
        logits: list[Tensor] = []
        actions: list[Tensor] = []
        gains: list[Tensor] = []
        episodes: list[tuple[float, float]] = []
        first = self.update * c.num_steps
        for step in range(c.num_steps):
            prepared = arena.prepared(acting)
            scores = acting.logits(prepared)
            tried = step % c.label_every == 0
            if tried:
                values = self.on_device(label(arena, self.teacher, (c.seed << 32) + first + step))
            action = arena.step(scores, episodes).action
            if tried:
                # less the mean under the policy itself, so that nothing else is left of the state
                expected = (scores.softmax(-1) * values * prepared.mask).sum(-1)
                seen.append(prepared)
                logits.append(scores)
                actions.append(action)
                gains.append(chosen(values, action) - expected)
        rows = Prepared(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
        action = torch.cat(actions)
        value = self.network.values(rows)
        batch = {
            "action": action,
            "log_prob": chosen(torch.cat(logits).log_softmax(-1), action),
            "value": value,
            "target": value,  # nobody asks the critic
            "advantage": torch.cat(gains),
        }
        return batch, rows, episodes

    def _learn(
        self, batch: dict[str, Tensor], rows: Prepared, done_share: float
    ) -> dict[str, float]:
        c = self.config
        self.optimizer.param_groups[0]["lr"] = c.learning_rate * (1.0 - done_share)
        advantage = batch["advantage"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        batch = {**batch, "advantage": advantage}
        size = len(advantage)
        by_trying = c.advantage == "counterfactual"
        weights = LossWeights(
            clip=c.clip,
            value=0.0 if by_trying else c.value_weight,
            entropy=c.entropy * (1.0 - 0.9 * done_share),
            warm=not by_trying and self.update < c.warmup_updates,
        )
        losses: list[LossParts] = []
        for _ in range(c.epochs):
            for part in torch.randperm(size, device=self.device).split(c.minibatch):
                prepared = Prepared(*(tensor.index_select(0, part) for tensor in rows))
                drawn = {name: values.index_select(0, part) for name, values in batch.items()}
                losses.append(self._loss.backward(prepared, drawn, weights))
                nn.utils.clip_grad_norm_(self.network.parameters(), c.max_grad_norm)
                self.optimizer.step()
            if losses[-1].kl > c.target_kl:
                break
        variance = float(batch["target"].var())
        residual = float((batch["target"] - batch["value"]).var())
        return {
            "train/policy_loss": -float(np.mean([parts.gain for parts in losses])),
            "train/value_loss": float(np.mean([parts.value_loss for parts in losses])),
            "train/approx_kl": losses[-1].kl,
            "train/clip_fraction": losses[-1].clipped,
            "train/entropy": losses[-1].entropy,
            "train/explained_variance": 1.0 - residual / max(variance, 1e-9),
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    @override
    def state(self) -> dict[str, Any]:
        scale = self.scale
        return {
            **super().state(),
            "scale": [scale.mean, scale.square, scale.count],
            "returns": torch.from_numpy(scale.returns.copy()),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        super().restore(content)
        self.scale.mean, self.scale.square, self.scale.count = content["scale"]
        self.scale.returns = content["returns"].numpy().copy()
