"""Offline learning: a dispatcher from a data set of another's play, without an environment.

Three algorithms over one network. Behaviour cloning raises the probability of what the data do.
Conservative Q-learning (Kumar et al. 2020, its discrete form) learns values by temporal differences
and lowers those of actions that the data do not take. Implicit Q-learning (Kostrikov et al. 2022)
learns values from the data's actions alone, and clones those that were better than usual.

Values are in the unit of the rule that the network corrects: its logits over `eta` are seconds of
cost, and so an untrained network's values of actions differ by what the rule says they cost.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from servegym.agents.network import DispatchNetwork, Prepared
from servegym.errors import ConfigError
from servegym.scenario import Scenario, load_scenario
from servegym.train.dataset import DataSet, Decisions
from servegym.train.mix import Mix
from servegym.train.network_run import NetworkRun
from servegym.train.offline_settings import OfflineTraining
from servegym.train.returns import chosen
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Stage

#: Most that iql lets one action count.
_MAX_WEIGHT = 20.0


class Batch(NamedTuple):
    """Some decisions of the data, n of them."""

    seen: Prepared
    following: Prepared
    action: Tensor  # int64[n]
    reward: Tensor  # float32[n], scaled
    discount: Tensor  # float32[n], of what follows; 0 after the last decision of an episode


class OfflineTrainer(NetworkRun[OfflineTraining]):
    """A run that trains a dispatcher; `found` is its network."""

    settings = OfflineTraining
    stages = (Stage("offline", "updates"),)
    algorithm = "offline"
    load_scenario = staticmethod(load_scenario)

    def __init__(self, config: OfflineTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        self.critic = copy.deepcopy(self.network)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer.add_param_group({"params": list(self.critic.parameters())})
        self.steps_per_update = config.num_batches * config.batch

    @staticmethod
    @override
    def completed(config: OfflineTraining, scenario: Scenario | Mix) -> OfflineTraining:
        """Take from the data what follows from them, and refuse those of other decisions."""
        if not config.dataset:
            raise ConfigError("offline learning needs --dataset: make one with servegym record")
        data = DataSet(Path(config.dataset))
        network = config.network.model_copy(update={"extended": data.extended})
        config = replace(config, network=network, dataset_sha256=data.digest())
        config = NetworkRun.completed(config, scenario)
        if data.num_extra != config.network.num_extra:
            raise ConfigError(
                f"{config.dataset} has {data.num_extra} actions beside the replicas, and"
                f" {scenario.name} {config.network.num_extra}: give the scenario of the data,"
                f" {data.about['scenario']['name']}"
            )
        return config

    @property
    @override
    def validation_size(self) -> tuple[int, int]:
        return self.config.validation_episodes, self.config.validation_requests

    @property
    @override
    def num_updates(self) -> int:
        return self.config.total_updates

    @cached_property
    def decisions(self) -> Decisions:
        """All that is learned from."""
        return DataSet(Path(self.config.dataset)).decisions()

    @property
    @override
    def num_decisions(self) -> int:
        return min(super().num_decisions, int(self.decisions.decided.sum()))

    @cached_property
    def scale(self) -> float:
        """Standard deviation of the data's discounted returns: what is 1 to the critic."""
        d = self.decisions
        discount = np.where(d.terminal, 0.0, np.exp(-d.dt_s / self.config.horizon_s))
        returns, following = np.zeros(len(d.reward)), 0.0
        for n in range(len(d.reward) - 1, -1, -1):
            following = d.reward[n] + discount[n] * following if d.decided[n] else 0.0
            returns[n] = following
        return max(float(returns[d.decided].std()), 1e-8)

    @override
    def warm_up(self) -> None:
        d = self.decisions
        self._rows = self.network.prepare(
            *(self.on_device(part) for part in (d.replicas, d.request, d.mask))
        )
        self._action = torch.from_numpy(d.action).to(self.device)
        self._reward = self.on_device(d.reward / self.scale)
        discount = np.where(d.terminal, 0.0, np.exp(-d.dt_s / self.config.horizon_s))
        self._discount = self.on_device(discount)
        self._places = torch.from_numpy(np.flatnonzero(d.decided)).to(self.device)

    def improve(self) -> dict[str, float]:
        """Make the gradient steps of an update."""
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * (1.0 - self.share())
        learn = {"bc": self._clone, "cql": self._conservative, "iql": self._implicit}[c.algorithm]
        stats: dict[str, list[float]] = {}
        for _ in range(c.num_batches):
            batch = self._draw()
            loss, logged = learn(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, c.max_grad_norm)
            self.optimizer.step()
            self._follow()
            for name, value in logged.items():
                stats.setdefault(f"train/{name}", []).append(float(value.detach()))
        means = {name: float(np.mean(values)) for name, values in stats.items()}
        return {**means, "train/learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _draw(self) -> Batch:
        some = self._places[torch.randint(len(self._places), (self.config.batch,))]
        return Batch(
            Prepared(*(x[some] for x in self._rows)),
            Prepared(*(x[some + 1] for x in self._rows)),
            self._action[some],
            self._reward[some],
            self._discount[some],
        )

    def _clone(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.network.logits(batch.seen)
        loss = nn.functional.cross_entropy(logits, batch.action)
        return loss, {"policy_loss": loss, "agreement": agreement(logits, batch.action)}

    def _conservative(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Learn the values of the network itself: the best of them is what it does."""
        values = self.action_values(self.network, batch.seen)
        with torch.no_grad():
            best = self.action_values(self.network, batch.following).argmax(-1)
            later = chosen(self.action_values(self.target, batch.following), best)
            aim = batch.reward + batch.discount * later
        taken = chosen(values, batch.action)
        error = nn.functional.smooth_l1_loss(taken, aim)
        gap = (values.logsumexp(-1) - taken).mean()
        logged = {"value_loss": error, "policy_loss": gap}
        logged["agreement"] = agreement(values, batch.action)
        return error + self.config.conservatism * gap, logged

    def _implicit(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Learn values by the critic, those of states and the policy by the network."""
        c = self.config
        with torch.no_grad():
            known = chosen(self.action_values(self.target, batch.seen), batch.action)
            aim = batch.reward + batch.discount * self.network.values(batch.following)
        taken = chosen(self.action_values(self.critic, batch.seen), batch.action)
        error = nn.functional.smooth_l1_loss(taken, aim)
        advantage = known - self.network.values(batch.seen)
        weight = torch.where(advantage > 0, c.expectile, 1.0 - c.expectile)
        fit = (weight.detach() * advantage.square()).mean()
        scaled = advantage.detach() / (advantage.detach().std() + 1e-8)
        count = (c.temperature * scaled).exp().clamp(max=_MAX_WEIGHT)
        logits = self.network.logits(batch.seen)
        copied = nn.functional.cross_entropy(logits, batch.action, reduction="none")
        policy_loss = (count * copied).mean()
        logged = {"value_loss": error, "policy_loss": policy_loss, "state_value_loss": fit}
        logged["agreement"] = agreement(logits, batch.action)
        return error + fit + policy_loss, logged

    def action_values(self, network: DispatchNetwork, rows: Prepared) -> Tensor:
        """Value all actions, in units of `scale`; forbidden ones at about -1e8, `float32[n, A]`.

        The value of the state, and the logits less their mean over what is allowed, in seconds.
        """
        logits = network.logits(rows)
        mean = (logits * rows.mask).sum(-1, keepdim=True) / rows.mask.sum(-1, keepdim=True)
        unit = 1.0 / (network.config.eta * self.scale)
        differences = torch.where(rows.mask > 0, (logits - mean) * unit, logits)
        return network.values(rows).unsqueeze(-1) + differences

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the target network follow the one whose values are learned."""
        if self.config.algorithm == "bc":
            return
        leader = self.network if self.config.algorithm == "cql" else self.critic
        for mine, theirs in zip(self.target.parameters(), leader.parameters(), strict=True):
            mine.lerp_(theirs, self.config.target_rate)

    @override
    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        super().restore(content)
        self.critic.load_state_dict(content["critic"])
        self.target.load_state_dict(content["target"])


def agreement(scores: Tensor, action: Tensor) -> Tensor:
    """Share of decisions in which the best score is that of the data's action."""
    return (scores.argmax(-1) == action).double().mean()
