"""Masked PPO over the vector environment: one straight loop."""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from servegym.agents.network import DispatchNetwork, NetworkConfig, Prepared
from servegym.baselines.registry import policy
from servegym.errors import ConfigError
from servegym.scenario import load_scenario
from servegym.train.budget import Budget
from servegym.train.imitation import demonstrations, imitate
from servegym.train.places import Places
from servegym.train.returns import RunningScale, chosen, gae, less_group_mean
from servegym.train.run_folder import RunFolder, restoring
from servegym.train.validation import Validation

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a training run."""

    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file."""
    total_decisions: int = 2_000_000
    """Dispatch decisions to train on."""
    max_minutes: float = math.inf
    """Stop earlier after this wall-clock time."""
    num_envs: int = 32
    """Environments stepped together."""
    group_size: int = 4
    """Environments that play the same requests; the group is the baseline of its members."""
    num_steps: int = 256
    """Decisions of each environment per update."""
    num_requests: int = 2048
    """Requests per episode."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    learning_rate: float = 1e-3
    """Adam's, falling linearly to 0."""
    horizon_s: float = 20.0
    """Discount: a reward t seconds ahead counts exp(-t / horizon)."""
    credit_s: float = 5.0
    """Time constant of generalised advantage estimation: lambda is exp(-dt / credit_s)."""
    epochs: int = 3
    """Passes over each batch."""
    minibatch: int = 1024
    """Decisions per gradient step."""
    clip: float = 0.2
    """PPO's ratio clip."""
    entropy: float = 0.002
    """Entropy bonus, falling linearly to a tenth."""
    value_weight: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 0.5
    """Gradient clip."""
    target_kl: float = 0.03
    """An update ends early above this divergence."""
    warmup_updates: int = 5
    """First updates train the critic alone, so that it cannot spoil the heuristic start."""
    validate_every: int = 10
    """Updates between validations; the network that did best there is the one exported."""
    imitate: str = ""
    """Policy to imitate first, such as what-if-added; none: start as the base rule."""
    imitate_decisions: int = 50_000
    """Decisions of it to learn from."""
    seed: int = 0
    """Of everything."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    torch_threads: int = 1
    """Of PyTorch on the CPU: the matrices are small, and threads that wait for each other on a
    busy machine cost more than they bring."""
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig())
    """Network and base heuristic."""

    def __post_init__(self) -> None:
        if self.num_envs < 1 or self.group_size < 1:
            raise ConfigError(
                f"num_envs and group_size must be at least 1, got {self.num_envs} and "
                f"{self.group_size}"
            )
        if not 0 < self.load[0] <= self.load[1]:
            raise ConfigError(f"load must be two ascending numbers above 0, got {self.load}")
        if not self.max_minutes > 0:
            raise ConfigError(f"minutes must be above 0, got {self.max_minutes:g}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if self.imitate and policy(self.imitate).information == "oracle":
            raise ConfigError(
                f"cannot imitate {self.imitate}, an oracle: it decides by what no policy can see"
            )
        if self.num_envs % self.group_size:
            raise ConfigError(
                f"num_envs ({self.num_envs}) must be a multiple of group_size ({self.group_size})"
            )
        if self.total_decisions < self.num_envs * self.num_steps:
            raise ConfigError(
                f"total_decisions must be at least num_envs * num_steps = "
                f"{self.num_envs * self.num_steps}, got {self.total_decisions}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda was asked for, but PyTorch finds no GPU: use cpu")


class Trainer:
    """A training run in a folder: config, TensorBoard log and checkpoint."""

    def __init__(self, config: PPOConfig, folder: Path) -> None:
        self._created_s = time.monotonic()
        self.config = config
        scenario = load_scenario(config.scenario)
        self.folder = RunFolder(folder, "dispatcher", config, scenario.model_dump(mode="json"))
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.torch_threads)
        self.device = torch.device(config.device)
        self.network = DispatchNetwork(config.network).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, eps=1e-5
        )
        self.env: Any = gymnasium.make_vec(
            "servegym/Dispatch-v1",
            num_envs=config.num_envs,
            scenario=config.scenario,
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
            num_requests=config.num_requests,
            load=config.load,
            group_size=config.group_size,
        )
        self.update, self.spent_s, self.finished = 0, 0.0, False
        self.budget = Budget(config.max_minutes)
        self.scale = RunningScale(config.num_envs, config.horizon_s)
        self.places = Places.at_the_beginning(config.num_envs)
        self.history: list[dict[str, float]] = []
        self.last: dict[str, float] = {}
        low, high = config.load
        self.validation = Validation(scenario, loads=np.linspace(low, high, 4).tolist())
        self.best = copy.deepcopy(self.network.state_dict())
        self.best_scores = self.first_scores = self.validation.scores(self.network.cpu())
        self.network.to(self.device)
        self._prepared = False

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        c = self.config
        return c.total_decisions // (c.num_envs * c.num_steps)

    def prepare(self) -> float:
        """Compile, go on from the checkpoint if there is one, and imitate if that is asked for.

        Returns:
            Seconds since the trainer was made; the budget begins to count now.

        Raises:
            ConfigError: If the checkpoint is broken.
            OutputError: If the folder cannot be written.
        """
        content = self.folder.begin()
        if content is not None:
            self._restore(content)
        if not self.finished:
            if self.config.imitate and self.update == 0:
                self._imitate()
            _, info = self.env.reset(seed=self.config.seed)
            self.env.step(info["action_mask"].argmax(-1))  # compiles
            self.env.reset(seed=self.config.seed)
            self.places.go_to(self.env.batch)
        self.budget.start(self.spent_s)
        self._prepared = True
        return time.monotonic() - self._created_s

    def run(self, *, progress: bool = True) -> DispatchNetwork:
        """Train to the end (or the time limit), resuming from a checkpoint if there is one."""
        if not self._prepared:
            self.prepare()
        if not self.finished:
            decisions = self.config.num_envs * self.config.num_steps
            with self.folder.tensorboard(self.update * decisions + 1) as writer:
                self._train(writer, progress)
            self._keep_the_better()
            self._save(finished=True)
            self.finished = True
        self.env.close()
        self.network.load_state_dict(self.best)
        return self.network

    def _train(self, writer: SummaryWriter, progress: bool) -> None:
        c = self.config
        observation = self.env.batch.observation()
        begin, first_update = time.perf_counter(), self.update
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[s]}"),
        )
        latest = ""
        with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
            task = bar.add_task("PPO", total=1.0, s="")
            while self.update < self.num_updates:
                done_share = self._share()
                if done_share >= 1.0:
                    break
                observation, batch, rows, episodes = self._rollout(observation)
                stats = self._learn(batch, rows, done_share)
                self.update += 1
                decisions = (self.update - first_update) * c.num_envs * c.num_steps
                stats["time/fps"] = decisions / (time.perf_counter() - begin)
                if episodes:
                    stats["rollout/mean_e2e_s"] = float(np.mean(episodes))
                step = self.update * c.num_envs * c.num_steps
                for key, value in stats.items():
                    writer.add_scalar(key, value, step)
                self.history.append(stats)
                self.last |= stats
                text = f"{stats['time/fps']:,.0f} decisions/s"
                if "rollout/mean_e2e_s" in stats:  # only when an episode has just ended
                    latest = f"  mean E2E {stats['rollout/mean_e2e_s']:.2f} s"
                text += latest
                bar.update(task, completed=self._share(), s=text)
                if self.update % c.validate_every == 0:
                    writer.add_scalar("validation/gain", self._keep_the_better(), step)
                    self._save()

    def _imitate(self) -> None:
        c = self.config
        data = demonstrations(
            load_scenario(c.scenario),
            policy(c.imitate),
            c.imitate_decisions,
            num_extra=c.network.num_extra,
            load=c.load,
        )
        agreed = imitate(self.network, data)
        _log.info("imitates %s in %.1f %% of unseen decisions", c.imitate, 100 * agreed)
        self._keep_the_better()

    def _keep_the_better(self) -> float:
        """Validate, and return by how much this network is better than the first one.

        Under the `latency` objective 0.05 means a mean E2E latency lower by about 5 %.
        """
        scores = self.validation.scores(self.network.cpu())
        self.network.to(self.device)
        if scores.mean() < self.best_scores.mean():
            self.best, self.best_scores = copy.deepcopy(self.network.state_dict()), scores
        return float((self.first_scores - scores).mean())

    def _share(self) -> float:
        """Share of the run that is over, by decisions or by the clock."""
        return min(1.0, max(self.update / self.num_updates, self.budget.share()))

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
    ) -> tuple[dict[str, Any], dict[str, Tensor], Prepared, list[float]]:
        c = self.config
        seen: list[Prepared] = []
        logits: list[Tensor] = []
        actions: list[Tensor] = []
        rewards, dts, ends = (np.empty((c.num_steps, c.num_envs)) for _ in range(3))
        episodes: list[float] = []
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
            if terminated.any():  # `info` is of the next episode there
                final = info["final_info"]
                dts[step, terminated] = final["dt_s"][terminated]
                episodes += final["episode_metrics"]["mean_e2e_s"][terminated].tolist()
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
        kl, clipped, losses = 0.0, 0.0, []
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
            if kl > c.target_kl:
                break
        variance = float(batch["target"].var())
        residual = float((batch["target"] - batch["value"]).var())
        return {
            "train/value_loss": float(np.mean(losses)),
            "train/approx_kl": kl,
            "train/clip_fraction": clipped,
            "train/entropy": float(entropy.detach()),
            "train/explained_variance": 1.0 - residual / max(variance, 1e-9),
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def _save(self, *, finished: bool = False) -> None:
        """Write all that the rest of the run depends on."""
        scale, cuda = self.scale, self.device.type == "cuda"
        self.folder.save(
            f"{self.update} updates",
            {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "best_scores": torch.from_numpy(self.best_scores),
                "update": self.update,
                "spent_s": self.budget.spent_s,
                "scale": [scale.mean, scale.square, scale.count],
                "returns": torch.from_numpy(scale.returns.copy()),
                "rng": torch.get_rng_state(),
                "device_rng": torch.cuda.get_rng_state() if cuda else torch.empty(0),
                "episodes": torch.from_numpy(self.places.episodes),
                "taken": [torch.from_numpy(x) for x in self.places.taken()],
                "last": self.last,
                "finished": finished,
            },
        )

    def _restore(self, content: dict[str, Any]) -> None:
        with restoring(self.folder.path):
            self.network.load_state_dict(content["network"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.best, self.best_scores = content["best"], content["best_scores"].numpy()
            DispatchNetwork(self.config.network).load_state_dict(self.best)
            self.update, self.spent_s = int(content["update"]), float(content["spent_s"])
            self.scale.mean, self.scale.square, self.scale.count = content["scale"]
            self.scale.returns = content["returns"].numpy().copy()
            taken = [x.numpy() for x in content["taken"]]
            self.places = Places(content["episodes"].numpy().copy(), taken)
            self.last, self.finished = dict(content["last"]), bool(content["finished"])
            torch.set_rng_state(content["rng"])
            if len(content["device_rng"]):
                torch.cuda.set_rng_state(content["device_rng"])
