"""Rewards, returns and advantages of decisions that are unevenly spaced in time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class RunningScale:
    """Divide rewards by the running standard deviation of discounted returns."""

    def __init__(self, num_envs: int, horizon_s: float) -> None:
        self.returns = np.zeros(num_envs)
        self._horizon_s = horizon_s
        self.mean = self.square = self.count = 0.0

    def __call__(self, reward: np.ndarray, dt_s: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Scale one step's rewards, `float[num_envs]`."""
        self.returns = self.returns * np.exp(-dt_s / self._horizon_s) + reward
        n = len(reward)
        self.count += n
        self.mean += float((self.returns - self.mean).sum()) / self.count
        self.square += (float((self.returns**2).mean()) - self.square) * n / self.count
        self.returns[done] = 0.0
        return reward / math.sqrt(max(self.square - self.mean**2, 1e-8))


def gae(reward: Tensor, value: Tensor, gamma: Tensor, last: Tensor, lam: Tensor) -> Tensor:
    """Generalised advantage estimation with a discount and a lambda per step.

    Steps last differently long, and a decision shows its effect over seconds, not over a number
    of later decisions; so both are exponentials of time.

    Args:
        reward: `float32[steps, envs]`.
        value: Of the states acted in, same shape.
        gamma: Discount to the next state, 0 at the end of an episode, same shape.
        last: Value of the state after the last step, `float32[envs]`.
        lam: Lambda of each step, same shape.

    Returns:
        Advantages, `float32[steps, envs]`.
    """
    deltas = reward + gamma * torch.cat((value[1:], last.unsqueeze(0))) - value
    running = torch.zeros_like(last)
    advantages = []
    for delta, decay in zip(deltas.flip(0).unbind(), (gamma * lam).flip(0).unbind(), strict=True):
        running = delta + decay * running
        advantages.append(running)
    return torch.stack(advantages).flip(0)


def gae_along(
    reward: Tensor, value: Tensor, gamma: Tensor, lam: Tensor, following: Tensor
) -> Tensor:
    """Generalised advantage estimation where what follows a decision is not the next step's.

    Of many agents that decide in turn, an agent's next decision may be many steps later.

    Args:
        reward: Between a decision and the one that follows it, `float32[steps, envs]`.
        value: Of the states acted in, same shape.
        gamma: Discount to what follows, 0 where nothing does, same shape.
        lam: Lambda of each decision, same shape.
        following: Step of what follows, greater than its own, `int64[steps, envs]`; any step where
            nothing does.

    Returns:
        Advantages, `float32[steps, envs]`.
    """
    advantage = torch.zeros_like(reward)
    for t in range(len(reward) - 1, -1, -1):
        after = following[t : t + 1]
        ahead = gamma[t] * value.gather(0, after)[0]
        ahead += gamma[t] * lam[t] * advantage.gather(0, after)[0]
        advantage[t] = reward[t] + ahead - value[t]
    return advantage


def chosen(values: Tensor, actions: Tensor) -> Tensor:
    """Pick each row's value at its action, `float32[batch]`."""
    return values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def less_group_mean(advantage: Tensor, group_size: int) -> Tensor:
    """Subtract from each environment the mean of the others that play the same requests.

    An input-dependent baseline (Mao et al. 2019): what the arrivals alone did to the return is
    the same for the whole group. Leaving oneself out keeps the gradient unbiased.

    Args:
        advantage: `float32[steps, envs]`, groups are neighbours.
        group_size: Environments per group; 1 changes nothing.
    """
    if group_size == 1:
        return advantage
    groups = advantage.unflatten(1, (-1, group_size))
    others = (groups.sum(-1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten(1)
