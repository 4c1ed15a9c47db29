"""Training an order by PPO whose advantages are counterfactual.

The policy draws whom to admit and whom to preempt. At some of its choices several requests are
tried in copies of the engine, which play on with the same arrivals (`order_branches`); what each of
them brought, less the mean, is its advantage: no critic, and no return in which one choice drowns
among hundreds. The weights are those that the search moves, so both learners have the same policies
to find.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from servegym.train.order_branches import Branches, Rules, collect
from servegym.train.order_ppo_settings import OrderPPOTraining
from servegym.train.order_run import OrderRun
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Stage
from servegym.typing import FloatArray

#: Logit of what is no request.
_NOBODY = -1e8


class OrderPPOTrainer(OrderRun[OrderPPOTraining]):
    """A run that improves an order by gradients."""

    settings = OrderPPOTraining
    stages = (Stage("ppo", "updates"),)

    def __init__(self, config: OrderPPOTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        torch.set_num_threads(1)  # sums of a few numbers: waiting for threads would cost more
        guess = self.space.with_units(self._first_guess(), config.num_hidden, self._rng)
        self.theta = torch.from_numpy(guess).requires_grad_()
        self.optimizer = torch.optim.Adam([self.theta], lr=config.learning_rate)

    @property
    @override
    def present(self) -> FloatArray:
        weights: FloatArray = self.theta.detach().numpy()
        return weights

    @property
    @override
    def described(self) -> dict[str, float | int | str]:
        return {"algorithm": "ppo on counterfactuals", "updates": self.num_updates_made}

    @override
    def share_of_updates(self) -> float:
        return self.num_updates_made / self.config.max_updates

    @override
    def goes_on(self) -> bool:
        if self.num_updates_made == 0:
            return True
        has_time = self.budget.fits(self.update_s + self.validate_s)
        return self.share_of_updates() < 1.0 and has_time

    def improve(self) -> dict[str, float]:
        """Play, try and learn."""
        branches = self._collect()
        num = len(branches.values)
        if not num:
            return {"train/labels": 0.0}
        values = torch.from_numpy(branches.values)
        tried = torch.from_numpy(branches.tried)
        mean = (values * tried).sum(-1, keepdim=True) / tried.sum(-1, keepdim=True)
        advantage = (values - mean) * tried
        advantage /= advantage[tried].std(correction=0) + 1e-8
        with torch.no_grad():
            old = self._log_probs(branches)
            regret = (values.masked_fill(~tried, -torch.inf).amax(-1) - values[:, 0]).mean()
        clip, probs = self.config.clip, old.exp()
        for _ in range(self.config.num_epochs):
            ratio = (self._log_probs(branches) - old).masked_fill(~tried, 0.0).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            loss = -(probs * gain).sum(-1).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        with torch.no_grad():
            new = self._log_probs(branches)
        return {
            "rollout/return": float(values[:, 0].mean()),
            "train/policy_loss": float(loss.detach()),
            "train/divergence": float((probs * (old - new)).sum(-1).mean()),
            "train/regret": float(regret),
            "train/labels": float(num),
        }

    def _collect(self) -> Branches:
        """Let the present policy play some episodes, and try other picks at some of its choices."""
        config = self.config
        first_seed = self.draw_first_seed()
        episodes = self.episodes(first_seed, config.num_episodes, config.num_requests)
        nets = self.space.perceptrons(self.present[None])
        goodput = self.scenario.objective == "goodput"
        rules = Rules(config.temperature, config.label_every, config.horizon_s, goodput)
        with ThreadPoolExecutor(config.num_threads) as pool:
            jobs = [
                pool.submit(
                    collect,
                    self.scenario.spec,
                    episode,
                    nets,
                    rules,
                    num_choices=config.num_choices,
                    seed=first_seed + i,
                )
                for i, episode in enumerate(episodes)
            ]
            found = [job.result() for job in jobs]
        return Branches(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def _log_probs(self, branches: Branches) -> Tensor:
        """Return the log probabilities of those that were tried, among them, `float64[L, K]`."""
        rows, preempts = torch.from_numpy(branches.rows), torch.from_numpy(branches.preempts)
        heads = self.space.scores(self.theta, rows)
        logits = torch.where(preempts[:, None], heads[..., 1], -heads[..., 0])
        logits = logits / self.config.temperature
        logits = logits.masked_fill(~torch.from_numpy(branches.tried), _NOBODY)
        return logits.log_softmax(-1)

    @override
    def state(self) -> dict[str, Any]:
        return {
            "theta": self.theta.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "rng": json.dumps(self._rng.bit_generator.state),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.theta.copy_(content["theta"])
        self.optimizer.load_state_dict(content["optimizer"])
        self._rng.bit_generator.state = json.loads(content["rng"])
        self.take_best()
