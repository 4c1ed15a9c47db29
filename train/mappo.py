"""PPO for all agents of a fleet at once, with a critic that sees all of it (Yu et al. 2022).

The dispatcher draws where requests go, and the schedulers, which share their weights, whom engines
admit and preempt. Both begin as rules and are moved by gradients in the weights that the joint
search moves, so both learners have the same policies to find, and export them alike. Agents decide
one after the other, so to a critic of the whole fleet their decisions are one sequence: what one
was worth shows already at the next, whoever takes that. A critic of what an agent sees itself must
wait for its own next decision, with all that others do in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import flatdim
from torch import Tensor, nn
from typing_extensions import override

from servegym.envs.agent_batch import AgentBatch
from servegym.errors import ConfigError
from servegym.policy.ordering import NUM_ORDERING_FEATURES
from servegym.scenario import Scenario
from servegym.train.critics import Critic
from servegym.train.fleet_agents import CLASSES, Choice, FleetAgents, joined
from servegym.train.fleet_rollout import Links, Rollout, roll_out
from servegym.train.mappo_settings import MappoTraining
from servegym.train.pair_run import PairRun
from servegym.train.returns import chosen, gae_along
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Stage
from servegym.typing import FloatArray

_MAX_GRAD_NORM = 0.5


class MappoTrainer(PairRun[MappoTraining]):
    """A run that trains a dispatcher and an order for all engines behind it by gradients."""

    settings = MappoTraining
    stages = (Stage("MAPPO", "updates"),)

    def __init__(self, config: MappoTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        torch.manual_seed(config.seed)
        torch.set_num_threads(1)  # the matrices are small: waiting for threads would cost more
        order, dispatch = self._start()
        order = self.order_space.with_units(order, config.num_hidden, self._rng)
        dispatch = self.dispatch_space.with_units(dispatch, config.num_hidden, self._rng)
        self.agents = FleetAgents(
            [order, dispatch],
            self.order_space,
            self.dispatch_space,
            self.fleets.batch,
            config.temperature,
        )
        self.optimizer = torch.optim.Adam(self.agents.thetas, lr=config.learning_rate, eps=1e-5)
        self.critics = self._make_critics()
        self.critic_optimizer = torch.optim.Adam(
            self.critics.parameters(), lr=config.critic_learning_rate, eps=1e-5
        )
        self.reward_scale = 0.0  # the standard deviation of returns, from the first update on

    @staticmethod
    @override
    def completed(config: MappoTraining, scenario: Scenario) -> MappoTraining:
        if scenario.spec.moves_kv:
            raise ConfigError(
                f"scenario {scenario.name} must have no migration and no roles for --learner "
                "mappo: it trains no agent that places or moves requests; take --learner joint"
            )
        return PairRun.completed(config, scenario)

    @cached_property
    def fleets(self) -> AgentBatch:
        """Where agents are trained."""
        config = self.config
        return AgentBatch(
            config.num_episodes,
            self.scenario,
            num_requests=1,  # of the episodes that begin where one has ended: nobody plays them
            shaping="cost-to-go" if config.shaping else "none",
        )

    def _make_critics(self) -> nn.ModuleDict:
        hidden, fleets = self.config.critic_hidden, self.fleets
        if self.config.critic == "central":
            return nn.ModuleDict({"fleet": Critic(flatdim(fleets.state_space), hidden)})
        rows = fleets.batch.requests.shape[1] * NUM_ORDERING_FEATURES
        size = {kind: flatdim(fleets.spaces[f"{kind}_0"]["observation"]) for kind in CLASSES}
        size["scheduler"] += 2 * NUM_ORDERING_FEATURES - rows
        return nn.ModuleDict({kind: Critic(size[kind], hidden) for kind in CLASSES})

    @property
    @override
    def described(self) -> dict[str, float | int | str]:
        algorithm = f"mappo, critic {self.config.critic}"
        return {"algorithm": algorithm, "updates": self.num_updates_made}

    @override
    def share_of_updates(self) -> float:
        return self.num_updates_made / self.config.max_updates

    @override
    def goes_on(self) -> bool:
        if self.num_updates_made == 0:
            return True
        has_time = self.budget.fits(self.update_s + self.validate_s)
        return self.share_of_updates() < 1.0 and has_time

    @override
    def warm_up(self) -> None:
        """Compile what steps fleets and what validates."""
        super().warm_up()
        few = [self.scenario.episode(1, num_requests=2)] * self.config.num_episodes
        with torch.random.fork_rng(devices=[]):  # a run that goes on draws as one that went on
            roll_out(self.fleets, few, self.agents.draw)

    @override
    def close_stage(self) -> None:
        self.fleets.close()

    def validate(self) -> Any:
        """Play the validation episodes under the present policies, which draw nothing there."""
        thetas = [theta[None] for theta in self.agents.weights()]
        return self.validated_by(self._play(thetas, self._validation))

    def improve(self) -> dict[str, float]:
        """Let the present policies play some episodes, and learn from that."""
        config = self.config
        first_seed = self.draw_first_seed()
        episodes = self.episodes(first_seed, config.num_episodes, config.num_requests)
        rollout = roll_out(self.fleets, episodes, self.agents.draw)
        choices = {kind: joined(parts) for kind, parts in rollout.kept.items()}
        seen = {
            kind: torch.from_numpy(rollout.states[kind])
            if config.critic == "central"
            else choices[kind].own
            for kind in choices
        }
        advantages, targets, explained = self._judge(rollout, seen)
        stats = self._learn(choices, seen, advantages, targets)
        return {"rollout/return": float(rollout.returns.mean()), **stats, **explained}

    @torch.no_grad()
    def _judge(
        self, rollout: Rollout[Choice], seen: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        """Return advantages of decisions, what the critic should have said, and how well it did."""
        config = self.config
        links = rollout.of_fleet if config.critic == "central" else rollout.of_agent
        gamma = np.exp(-links.dt_s / config.horizon_s) * ~links.ends
        lam = np.exp(-links.dt_s / config.credit_s)
        if self.num_updates_made == 0:
            self.reward_scale = _spread_of_returns(links, gamma)
            for name, critic in self.critics.items():
                samples = [part for kind, part in seen.items() if name in (kind, "fleet")]
                assert isinstance(critic, Critic)
                critic.fit(torch.cat(samples))
        value = np.zeros(links.reward.shape, np.float32)
        places = {kind: (rollout.step[kind], rollout.fleet[kind]) for kind in seen}
        for kind, place in places.items():
            value[place] = self._critic(kind)(seen[kind]).numpy()
        reward, values, gammas, lams = (
            torch.from_numpy(x).float()
            for x in (links.reward / self.reward_scale, value, gamma, lam)
        )
        advantage = gae_along(reward, values, gammas, lams, torch.from_numpy(links.following))
        taken = torch.from_numpy(np.zeros(value.shape, np.bool_))
        for place in places.values():
            taken[place] = True
        target = (advantage + values)[taken]
        error = float(advantage[taken].var() / target.var().clamp(min=1e-9))
        advantages = {kind: advantage[place] for kind, place in places.items()}
        targets = {kind: advantage[place] + values[place] for kind, place in places.items()}
        return advantages, targets, {"train/explained_variance": 1.0 - error}

    def _critic(self, kind: str) -> nn.Module:
        return self.critics["fleet" if self.config.critic == "central" else kind]

    def _learn(
        self,
        choices: dict[str, Choice],
        seen: dict[str, Tensor],
        advantages: dict[str, Tensor],
        targets: dict[str, Tensor],
    ) -> dict[str, float]:
        """Move both policies and the critic."""
        config, left = self.config, 1.0 - self.share()
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * left
        warm = self.num_updates_made < config.warmup_updates
        total = sum(len(x) for x in advantages.values())
        kls: list[float] = []
        clipped: list[float] = []
        gains: list[float] = []
        losses: list[float] = []
        for _ in range(config.num_epochs):
            order = {
                kind: torch.randperm(len(x)).chunk(config.num_minibatches)
                for kind, x in advantages.items()
            }
            kls.clear()
            for part in range(min(len(parts) for parts in order.values())):
                gain, value_loss = torch.zeros(()), torch.zeros(())
                for kind, parts in order.items():
                    rows = parts[part]
                    share = len(advantages[kind]) / total
                    values = self._critic(kind)(seen[kind][rows])
                    error = (values - targets[kind][rows]).square().mean()
                    value_loss = value_loss + 0.5 * share * error
                    if warm:
                        continue
                    choice = Choice(*(x[rows] for x in choices[kind]))
                    of_class, mean = advantages[kind], advantages[kind].mean()
                    a = (of_class[rows] - mean) / (of_class.std() + 1e-8)
                    log_probs = self.agents.log_probs(kind, choice)
                    log_ratio = chosen(log_probs, choice.taken) - choice.log_prob
                    ratio = log_ratio.exp()
                    kept = ratio.clamp(1.0 - config.clip, 1.0 + config.clip)
                    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
                    gain = gain + share * torch.minimum(ratio * a, kept * a).mean()
                    gain = gain + share * config.entropy * left * entropy
                    with torch.no_grad():
                        kls.append(share * float((ratio - 1.0 - log_ratio).mean()))
                        clipped.append(share * float((ratio != kept).float().mean()))
                self._descend(self.critic_optimizer, value_loss)
                losses.append(float(value_loss.detach()))
                if not warm:
                    self._descend(self.optimizer, -gain)
                    gains.append(float(gain.detach()))
            if warm:
                continue
            kl = sum(kls) / config.num_minibatches
            if kl > config.target_kl:
                break
        stats = {"train/value_loss": float(np.mean(losses)), "train/decisions": float(total)}
        if not warm:
            stats |= {
                "train/policy_loss": -float(np.mean(gains)),
                "train/approx_kl": kl,
                "train/clip_fraction": 2.0 * float(np.mean(clipped)),
            }
        return stats

    @staticmethod
    def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], _MAX_GRAD_NORM)
        optimizer.step()

    @override
    def parameters(self) -> list[Tensor]:
        return [torch.from_numpy(theta) for theta in self.agents.weights()]

    @override
    def state(self) -> dict[str, Any]:
        return {
            "thetas": [theta.detach().clone() for theta in self.agents.thetas],
            "optimizer": self.optimizer.state_dict(),
            "critics": self.critics.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "reward_scale": self.reward_scale,
            "rng": json.dumps(self._rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for theta, kept in zip(self.agents.thetas, content["thetas"], strict=True):
                theta.copy_(kept)
        self.optimizer.load_state_dict(content["optimizer"])
        self.critics.load_state_dict(content["critics"])
        self.critic_optimizer.load_state_dict(content["critic_optimizer"])
        self.reward_scale = float(content["reward_scale"])
        self._rng.bit_generator.state = json.loads(content["rng"])
        torch.set_rng_state(content["torch_rng"])
        self.take_best()


def _spread_of_returns(links: Links, gamma: FloatArray) -> float:
    """Return the standard deviation of discounted sums of rewards."""
    reward, gammas = torch.from_numpy(links.reward), torch.from_numpy(gamma)
    nothing, one = torch.zeros_like(reward), torch.ones_like(reward)
    sums = gae_along(reward, nothing, gammas, one, torch.from_numpy(links.following))
    return max(float(sums[reward != 0.0].std()), 1e-6)
