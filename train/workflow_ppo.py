"""PPO on whole episodes of jobs; groups of episodes have the same arrivals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from servegym.agents.workflow_network import Graph, Pairs, WorkflowNetwork
from servegym.train.workflow_arrays import advantages, as_graph, as_pairs, choices, discounted
from servegym.train.workflow_rollout import Played
from servegym.train.workflow_settings import WorkflowTraining
from servegym.typing import FloatArray


class WorkflowPPO:
    """Learns from what was played.

    Args:
        config: Settings.
        network: Is changed.

    Attributes:
        optimizer: Of the network.
        scale: Rewards are divided by this; measured on the first update.
    """

    def __init__(self, config: WorkflowTraining, network: WorkflowNetwork) -> None:
        self._config, self._network = config, network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, eps=1e-5)
        self.scale = 0.0

    def learn(self, played: Sequence[Played], update: int, time_left: float) -> dict[str, float]:
        """Make one update.

        Args:
            played: Episodes, groups with the same arrivals behind each other.
            update: How many there have been before.
            time_left: Share of the run's time; the learning rate falls with it.

        Returns:
            What is logged.
        """
        c = self._config
        rows = [(as_pairs([one]), as_graph([one])) for one in played]
        with torch.no_grad():
            values = [self._network.values(pairs).double().numpy() for pairs, _ in rows]
            old = [self._log_probs(*row, [one])[0] for row, one in zip(rows, played, strict=True)]
        compared, targets = self._advantages(played, values)
        warm = update < c.warmup_updates
        self.optimizer.param_groups[0]["lr"] = c.learning_rate * max(0.02, time_left)
        kl, clipped, errors, entropies, gains = 0.0, [], [], [], []
        for _ in range(c.epochs):
            order = np.random.default_rng((c.seed, 2, update)).permutation(len(played))
            kls = []
            for part in np.array_split(order, min(c.minibatches, len(played))):
                some = [played[i] for i in part]
                pairs, graph = as_pairs(some), as_graph(some)
                log_prob, entropy = self._log_probs(pairs, graph, some)
                log_ratio = log_prob - torch.cat([old[i] for i in part])
                ratio = log_ratio.exp()
                a = torch.from_numpy(np.concatenate([compared[i] for i in part])).float()
                gain = torch.minimum(ratio * a, ratio.clamp(1 - c.clip, 1 + c.clip) * a).mean()
                target = torch.from_numpy(np.concatenate([targets[i] for i in part])).float()
                error = 0.5 * (self._network.values(pairs) - target).square().mean()
                loss = 0.5 * error
                if not warm:
                    loss = loss - gain - c.entropy * entropy.mean()
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self._network.parameters(), 0.5)
                self.optimizer.step()
                with torch.no_grad():
                    kls.append(float((ratio - 1 - log_ratio).mean()))
                    clipped.append(float(((ratio - 1).abs() > c.clip).float().mean()))
                    errors.append(float(error))
                    gains.append(float(gain))
                    entropies.append(float(entropy.mean()))
            kl = float(np.mean(kls))
            if kl > c.target_kl:
                break
        return {
            "train/policy_loss": -float(np.mean(gains)),
            "train/approx_kl": kl,
            "train/clip_fraction": float(np.mean(clipped)),
            "train/value_loss": float(np.mean(errors)),
            "train/entropy": float(np.mean(entropies)),
            "train/decisions": float(sum(len(one.chosen) for one in played)),
        }

    def _advantages(
        self, played: Sequence[Played], values: Sequence[FloatArray]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        """Compare each episode with the others of its group, at the same moments."""
        c = self._config
        horizon_s, credit_s = c.horizon * c.network.tau_s, c.credit * c.network.tau_s
        if self.scale == 0.0:
            returns = [discounted(one, horizon_s) for one in played]
            self.scale = max(1e-9, float(np.concatenate(returns).std()))
        found = [
            advantages(one, value, horizon_s, credit_s, self.scale)
            for one, value in zip(played, values, strict=True)
        ]
        targets = [a + v for a, v in zip(found, values, strict=True)]
        compared = []
        for first in range(0, len(played), c.group_size):
            group = range(first, first + c.group_size)
            for i in group:
                others = [
                    np.interp(played[i].time_s, played[k].time_s, found[k], right=0.0)
                    for k in group
                    if k != i
                ]
                compared.append(found[i] - np.mean(others, 0))
        spread = float(np.concatenate(compared).std()) + 1e-8
        return [a / spread for a in compared], targets

    def _log_probs(
        self, pairs: Pairs, graph: Graph, played: Sequence[Played]
    ) -> tuple[Tensor, Tensor]:
        """Logarithms of the probabilities of what was chosen, and entropies, per decision."""
        scores = self._network.scores(pairs, graph)
        counts = np.concatenate([np.diff(x.first) for x in played])
        first = torch.from_numpy(np.cumsum(counts) - counts)
        chosen = np.concatenate([x.chosen for x in played])
        may_wait = torch.from_numpy(np.concatenate([x.may_wait for x in played]) > 0)
        return choices(
            scores,
            pairs.decision,
            first,
            torch.from_numpy(chosen),
            torch.from_numpy(counts),
            may_wait,
        )
