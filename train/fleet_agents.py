"""Dispatcher and schedulers that draw their decisions from flat weights, with gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from servegym.envs.agent_batch import Asked
from servegym.envs.cluster_batch import ClusterBatch
from servegym.policy.ordering import NUM_ORDERING_FEATURES
from servegym.train.critics import seen_by_scheduler
from servegym.train.dispatch_space import DispatchSpace
from servegym.train.fleet_rollout import Drawn
from servegym.train.order_space import OrderSpace
from servegym.train.pair_run import DISPATCHER, SCHEDULERS
from servegym.train.returns import chosen
from servegym.typing import FloatArray

#: Classes of agents, and the places of their weights.
CLASSES = {"scheduler": SCHEDULERS, "dispatcher": DISPATCHER}
#: Logit of what is not allowed: below any that a low temperature makes.
_FORBIDDEN = torch.finfo(torch.float32).min


class Choice(NamedTuple):
    """Decisions of agents of one class; axes: n of them, W things to choose among.

    Attributes:
        inputs: Of what there is to choose, `float32[n, W, F]`.
        others: Costs of replicas, or logarithms of requests, `float32[n, W, 3 or 2]`.
        sign: 1 where the greatest score is chosen, -1 where the least is, `float32[n]`.
        head: Which score counts, `int64[n]`.
        allowed: `bool[n, W]`.
        taken: Which was, `int64[n]`.
        log_prob: Its log probability then, `float32[n]`.
        own: What the agents' own critic sees, `float32[n, K]`.
    """

    inputs: Tensor
    others: Tensor
    sign: Tensor
    head: Tensor
    allowed: Tensor
    taken: Tensor
    log_prob: Tensor
    own: Tensor


class FleetAgents:
    """The policies of a fleet's agents, which begin as given weights.

    Args:
        weights: Of both, as `CLASSES` places them, `float64[size]`.
        order_space: What those of the schedulers stand for.
        dispatch_space: What those of the dispatcher stand for.
        batch: The fleets.
        temperature: Of the draws: how far scores must be apart for one choice to be taken rather.

    Attributes:
        thetas: The weights, `float32[size]`.
    """

    def __init__(
        self,
        weights: list[FloatArray],
        order_space: OrderSpace,
        dispatch_space: DispatchSpace,
        batch: ClusterBatch,
        temperature: float,
    ) -> None:
        self.thetas = [torch.from_numpy(theta).float().requires_grad_() for theta in weights]
        self._order_space, self._dispatch_space = order_space, dispatch_space
        self._batch, self._temperature = batch, temperature

    def weights(self) -> list[FloatArray]:
        """Return the present weights of both, `float64[size]`."""
        return [theta.detach().double().numpy() for theta in self.thetas]

    @torch.no_grad()
    def draw(self, kind: str, asked: Asked) -> Drawn[Choice]:
        """Draw decisions of agents of one class from the present policy."""
        choice = self._dispatch(asked) if kind == "dispatcher" else self._pick(asked)
        log_probs = self.log_probs(kind, choice)
        noise = torch.empty_like(log_probs).exponential_().log_()
        taken = (log_probs - noise).argmax(-1)
        choice = choice._replace(taken=taken, log_prob=chosen(log_probs, taken))
        action = taken.numpy().copy()
        if kind == "scheduler":
            action += np.where(choice.head.numpy() == 1, self._batch.max_waiting, 0)
        return Drawn(action, choice)

    def _dispatch(self, asked: Asked) -> Choice:
        """Make out what dispatchers choose among."""
        batch = self._batch
        seen = torch.from_numpy(asked.observation)
        width = batch.num_replicas * len(batch.shown)
        replicas = seen[:, :width].view(len(seen), batch.num_replicas, -1)
        inputs, costs = self._dispatch_space.prepared(replicas, seen[:, width:])
        allowed = torch.from_numpy(asked.action_mask == 1)
        # holds and rejections are taken where no replica is allowed, and are nobody's choice
        none = ~allowed[:, : batch.num_replicas].any(-1)
        allowed[:, batch.num_replicas :] &= none[:, None]
        extra = allowed.shape[1] - batch.num_replicas
        inputs, costs = (nn.functional.pad(x, (0, 0, 0, extra)) for x in (inputs, costs))
        nothing = torch.zeros(len(seen))
        return Choice(
            inputs, costs, nothing + 1.0, nothing.long(), allowed, nothing.long(), nothing, seen
        )

    def _pick(self, asked: Asked) -> Choice:
        """Make out what schedulers choose among: those who wait, or those who run."""
        batch = self._batch
        waiting, running = batch.max_waiting, batch.max_running
        seen = torch.from_numpy(asked.observation)
        size = (waiting + running) * NUM_ORDERING_FEATURES
        rows = seen[:, :size].view(len(seen), waiting + running, NUM_ORDERING_FEATURES)
        preempts = seen[:, size:][:, -1] > 0.0
        mask = torch.from_numpy(asked.action_mask == 1)
        parts = []
        for x in (rows, mask[..., None]):
            width = max(waiting, running)
            admit = nn.functional.pad(x[:, :waiting], (0, 0, 0, width - waiting))
            preempt = nn.functional.pad(x[:, waiting:], (0, 0, 0, width - running))
            parts.append(torch.where(preempts[:, None, None], preempt, admit))
        inputs, logs = self._order_space.prepared(parts[0])
        nothing = torch.zeros(len(seen))
        return Choice(
            inputs,
            logs,
            torch.where(preempts, 1.0, -1.0),
            preempts.long(),
            parts[1][..., 0],
            nothing.long(),
            nothing,
            seen_by_scheduler(rows, seen[:, size:]),
        )

    def log_probs(self, kind: str, choice: Choice) -> Tensor:
        """Return the log probabilities of all that can be chosen, `float32[n, W]`."""
        theta = self.thetas[CLASSES[kind]]
        if kind == "dispatcher":
            scores = self._dispatch_space.scores(theta, choice.inputs, choice.others)
        else:
            heads = self._order_space.scores(theta, choice.inputs, choice.others)
            scores = torch.where(choice.head[:, None] == 1, heads[..., 1], heads[..., 0])
        logits = choice.sign[:, None] * scores / self._temperature
        return logits.masked_fill(~choice.allowed, _FORBIDDEN).log_softmax(-1)


def joined(parts: list[Choice]) -> Choice:
    """Put decisions one behind the other."""
    return Choice(*(torch.cat(values) for values in zip(*parts, strict=True)))
