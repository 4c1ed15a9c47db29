"""Masked PPO over the vector environment: a dispatcher that begins as a rule."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from servegym.agents.network import DispatchNetwork, Prepared
from servegym.agents.torch_policy import TorchPolicy
from servegym.baselines.registry import policy
from servegym.export.from_torch import export_policy
from servegym.export.sample import sample_observations
from servegym.scenario import Scenario, load_scenario
from servegym.train.imitation import demonstrations, imitate
from servegym.train.places import Places
from servegym.train.ppo_settings import PPOConfig
from servegym.train.returns import RunningScale, chosen, gae, less_group_mean
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Stage, TrainingRun, copied
from servegym.train.validation import Validated, Validation

_log = logging.getLogger(__name__)


class Trainer(TrainingRun[PPOConfig, Scenario, DispatchNetwork]):
    """A run that trains a dispatcher; `found` is its network."""

    problem = "dispatch"
    settings = PPOConfig
    stages = (Stage("PPO", "updates"),)
    references = ("added-delay", "prefix-load", "mct")
    load_scenario = staticmethod(load_scenario)

    def __init__(self, config: PPOConfig, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.torch_threads)
        self.device = torch.device(config.device)
        self.network = DispatchNetwork(config.network).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, eps=1e-5
        )
        self.scale = RunningScale(config.num_envs, config.horizon_s)
        self.places = Places.at_the_beginning(config.num_envs)
        self.episode_returns = np.zeros(config.num_envs)
        self.steps_per_update = config.num_envs * config.num_steps

    @classmethod
    @override
    def stored_scenario(cls, contents: Mapping[str, Any]) -> Scenario:
        return Scenario.model_validate(contents)

    @staticmethod
    def completed(config: PPOConfig, scenario: Scenario) -> PPOConfig:
        """Give the network an action for all that the scenario allows."""
        num_extra = scenario.actions.hold + scenario.actions.reject
        network = config.network.model_copy(update={"num_extra": num_extra})
        return replace(config, network=network)

    @cached_property
    def validation(self) -> Validation:
        """Validation episodes, over the range of loads."""
        return Validation(self.scenario, loads=np.linspace(*self.config.load, 4).tolist())

    @cached_property
    def env(self) -> Any:
        """Environments that are stepped together."""
        return gymnasium.make_vec(
            "servegym/Dispatch-v1",
            num_envs=self.config.num_envs,
            scenario=self.scenario,
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
            num_requests=self.config.num_requests,
            load=self.config.load,
            group_size=self.config.group_size,
        )

    @property
    def update(self) -> int:
        """Updates up to now."""
        return self.updates[0]

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        return self.config.total_decisions // self.steps_per_update

    @property
    @override
    def validate_every(self) -> int:
        return self.config.validate_every

    @override
    def share_of_updates(self) -> float:
        return self.update / self.num_updates

    @override
    def goes_on(self) -> bool:
        if self.update == 0:
            return True
        has_time = self.budget.fits(self.update_s + self.validate_s)
        return self.update < self.num_updates and has_time

    def warm_up(self) -> None:
        """Compile, imitate if that is asked for, and bring the environments to their places."""
        if self.config.imitate and self.update == 0:
            self._imitate()
        _, info = self.env.reset(seed=self.config.seed)
        self.env.step(info["action_mask"].argmax(-1))  # compiles
        self.env.reset(seed=self.config.seed)
        self.places.go_to(self.env.batch)
        self._observation = self.env.batch.observation()

    def _imitate(self) -> None:
        c = self.config
        data = demonstrations(
            self.scenario,
            policy(c.imitate),
            c.imitate_decisions,
            num_extra=c.network.num_extra,
            load=c.load,
        )
        agreed = imitate(self.network, data)
        _log.info("imitates %s in %.1f %% of unseen decisions", c.imitate, 100 * agreed)
        self.keep_the_better()

    def validate(self) -> Validated:
        """Play the validation episodes greedily."""
        found = self.validation.play(TorchPolicy(self.network.cpu()))
        self.network.to(self.device)
        return found

    @override
    def validate_rule(self, name: str) -> Validated:
        return self.validation.play(policy(name))

    @override
    def parameters(self) -> dict[str, Tensor]:
        return copied(self.network)

    @override
    def take_best(self) -> None:
        self.network.load_state_dict(self.best)

    @override
    def found(self) -> DispatchNetwork:
        return self.network

    @override
    def close_stage(self) -> None:
        self.env.close()

    def export(self, folder: Path | None = None) -> Path:
        """Export with observations from the training scenario to check against."""
        self.take_best()
        self.network.cpu()
        samples = sample_observations(self.network, self.scenario, load=self.config.load)
        return export_policy(
            self.network,
            folder or self.folder.path / "policy",
            samples,
            scenario=self.config.scenario,
            objective=self.scenario.objective,
            training={
                "algorithm": "ppo",
                "decisions": self.update * self.steps_per_update,
                "seed": self.config.seed,
                "base": self.config.network.base,
                "mean_e2e_s": self.last.get("rollout/mean_e2e_s", 0.0),
            },
        )

    def improve(self) -> dict[str, float]:
        """Step all environments for a while, and learn from that."""
        done_share = self.share()
        self._observation, batch, rows, episodes = self._rollout(self._observation)
        stats = self._learn(batch, rows, done_share)
        if episodes:  # some have just ended
            returns, mean_e2e_s = np.mean(episodes, 0).tolist()
            stats |= {"rollout/return": returns, "rollout/mean_e2e_s": mean_e2e_s}
        return stats

    def _prepare(self, observation: dict[str, Any]) -> Prepared:
        return self.network.prepare(
            torch.from_numpy(observation["replicas"]).to(self.device),
            torch.from_numpy(observation["request"]).to(self.device),
            torch.from_numpy(observation["action_mask"]).to(self.device, torch.float32),
        )

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, torch.float32)

    @torch.no_grad()
    def _rollout(
        self, observation: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor], Prepared, list[tuple[float, float]]]:
        c = self.config
        seen: list[Prepared] = []
        logits: list[Tensor] = []
        actions: list[Tensor] = []
        rewards, dts, ends = (np.empty((c.num_steps, c.num_envs)) for _ in range(3))
        episodes: list[tuple[float, float]] = []  # return, mean E2E seconds
        for step in range(c.num_steps):
            prepared = self._prepare(observation)
            scores = self.network.logits(prepared)
            # the Gumbel trick: one exponential draw per action instead of a distribution object
            noise = torch.empty_like(scores).exponential_().log_()
            action = (scores - noise).argmax(-1)
            taken = action.cpu().numpy()
            observation, reward, terminated, _, info = self.env.step(taken)
            self.places.note(taken, terminated)
            dts[step], ends[step] = info["dt_s"], terminated
            self.episode_returns += reward
            if terminated.any():  # `info` is of the next episode there
                final = info["final_info"]
                dts[step, terminated] = final["dt_s"][terminated]
                mean_e2e_s = final["episode_metrics"]["mean_e2e_s"][terminated]
                ended = self.episode_returns[terminated].tolist()
                episodes += zip(ended, mean_e2e_s.tolist(), strict=True)
                self.episode_returns[terminated] = 0.0
            rewards[step] = self.scale(reward, dts[step], terminated)
            seen.append(prepared)
            logits.append(scores)
            actions.append(action)
        rows = Prepared(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
        shape = (c.num_steps, c.num_envs)
        value = self.network.values(rows).view(shape)
        last = self.network.values(self._prepare(observation))
        gamma = self._on_device(np.exp(-dts / c.horizon_s) * (1.0 - ends))
        lam = self._on_device(np.exp(-dts / c.credit_s))
        advantage = gae(self._on_device(rewards), value, gamma, last, lam)
        action = torch.cat(actions)
        batch = {
            "action": action,
            "log_prob": chosen(torch.cat(logits).log_softmax(-1), action),
            "value": value.flatten(),
            "target": (advantage + value).flatten(),
            "advantage": less_group_mean(advantage, c.group_size).flatten(),
        }
        return observation, batch, rows, episodes

    def _learn(
        self, batch: dict[str, Tensor], rows: Prepared, done_share: float
    ) -> dict[str, float]:
        c = self.config
        self.optimizer.param_groups[0]["lr"] = c.learning_rate * (1.0 - done_share)
        entropy_weight = c.entropy * (1.0 - 0.9 * done_share)
        advantage = batch["advantage"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        size = len(advantage)
        warm = self.update < c.warmup_updates
        kl, clipped, losses, gains = 0.0, 0.0, [], []
        for _ in range(c.epochs):
            for part in torch.randperm(size, device=self.device).split(c.minibatch):
                prepared = Prepared(*(tensor[part] for tensor in rows))
                log_probs = self.network.logits(prepared).log_softmax(-1)
                log_ratio = chosen(log_probs, batch["action"][part]) - batch["log_prob"][part]
                ratio = log_ratio.exp()
                a = advantage[part]
                gain = torch.minimum(ratio * a, ratio.clamp(1 - c.clip, 1 + c.clip) * a).mean()
                value = self.network.values(prepared)
                value_loss = 0.5 * (value - batch["target"][part]).square().mean()
                entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
                loss = c.value_weight * value_loss
                if not warm:
                    loss = loss - gain - entropy_weight * entropy
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), c.max_grad_norm)
                self.optimizer.step()
                with torch.no_grad():
                    kl = float((ratio - 1 - log_ratio).mean())
                    clipped = float(((ratio - 1).abs() > c.clip).float().mean())
                losses.append(float(value_loss.detach()))
                gains.append(float(gain.detach()))
            if kl > c.target_kl:
                break
        variance = float(batch["target"].var())
        residual = float((batch["target"] - batch["value"]).var())
        return {
            "train/policy_loss": -float(np.mean(gains)),
            "train/value_loss": float(np.mean(losses)),
            "train/approx_kl": kl,
            "train/clip_fraction": clipped,
            "train/entropy": float(entropy.detach()),
            "train/explained_variance": 1.0 - residual / max(variance, 1e-9),
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    @override
    def state(self) -> dict[str, Any]:
        scale, cuda = self.scale, self.device.type == "cuda"
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scale": [scale.mean, scale.square, scale.count],
            "returns": torch.from_numpy(scale.returns.copy()),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if cuda else torch.empty(0),
            "episodes": torch.from_numpy(self.places.episodes),
            "taken": [torch.from_numpy(x) for x in self.places.taken()],
            "episode_returns": torch.from_numpy(self.episode_returns.copy()),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.take_best()
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scale.mean, self.scale.square, self.scale.count = content["scale"]
        self.scale.returns = content["returns"].numpy().copy()
        taken = [x.numpy() for x in content["taken"]]
        self.places = Places(content["episodes"].numpy().copy(), taken)
        self.episode_returns = content["episode_returns"].numpy().copy()
        torch.set_rng_state(content["rng"])
        if len(content["device_rng"]) and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["device_rng"])
