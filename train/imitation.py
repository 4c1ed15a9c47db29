"""Imitation: a warm start from any policy, such as a planner that is too slow to serve."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from servegym.agents.network import DispatchNetwork
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import DONE
from servegym.policy.contract import observed_groups
from servegym.policy.layout import agent_actions, agent_arrays
from servegym.policy.observe import observe_batch
from servegym.policy.policy import Policy
from servegym.scenario import Scenario


def demonstrations(
    scenario: Scenario,
    teacher: Policy,
    num_decisions: int,
    *,
    num_extra: int,
    extended: bool = False,
    load: tuple[float, float] = (0.6, 1.1),
    num_requests: int = 512,
    first_seed: int = 300_000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Let a teacher play, and keep what it saw and did.

    Args:
        scenario: What is played.
        teacher: Any policy but an oracle: it must decide by what a student can see.
        num_decisions: How many to collect at least.
        num_extra: Actions beside the replicas: hold, reject.
        extended: Whether what a router infers is seen, too.
        load: Range of the load factor.
        num_requests: Requests per episode.
        first_seed: Seeds of the episodes count from here.

    Returns:
        Raw `replicas float32[n, R, F]`, `request float32[n, G]`, `mask float32[n, A]` and the
        teacher's `action int64[n]`.
    """
    episodes_each = 8
    rng = np.random.default_rng(first_seed)
    kept: list[tuple[Tensor, ...]] = []
    count = 0
    width, needs = scenario.max_replicas, observed_groups(extended=extended)
    while count < num_decisions:
        episodes = [
            scenario.episode(
                first_seed + count + i, load=rng.uniform(*load), num_requests=num_requests
            )
            for i in range(episodes_each)
        ]
        simulator = Simulator(scenario.spec, episodes, max_replicas=width)
        teacher.reset(episodes_each, first_seed + count)
        while (simulator.advance() != DONE).any():
            observations, envs = observe_batch(simulator, teacher.needs | needs)
            chosen = teacher.act(observations, envs)
            actions = agent_actions(observations.mask, num_extra)
            arrays = agent_arrays(observations, actions, extended=extended)
            done = np.searchsorted(actions, chosen)
            kept.append(tuple(torch.from_numpy(a) for a in (*arrays, done)))
            answers = np.zeros(episodes_each, np.int64)
            answers[envs] = chosen
            simulator.apply(answers)
            count += len(envs)
    replicas, request, mask, action = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return replicas, request, mask, action


def imitate(
    network: DispatchNetwork,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    epochs: int = 4,
    minibatch: int = 512,
    learning_rate: float = 2e-3,
    progress: Callable[[float], None] = lambda share: None,
) -> float:
    """Fit the network to demonstrations by cross-entropy.

    Args:
        network: Is changed.
        data: From `demonstrations`.
        epochs: Passes over the data.
        minibatch: Decisions per gradient step.
        learning_rate: Adam's, falling linearly to 0.
        progress: Called with the share that is done.

    Returns:
        Share of the last tenth of the demonstrations, which is not trained on, in which the
        network's most probable action is the teacher's.
    """
    device = next(network.parameters()).device
    replicas, request, mask, action = (tensor.to(device) for tensor in data)
    with torch.no_grad():
        rows = network.prepare(replicas, request, mask)
    train = int(0.9 * len(action))
    parts = [
        p for _ in range(epochs) for p in torch.randperm(train, device=device).split(minibatch)
    ]
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for i, part in enumerate(parts):
        optimizer.param_groups[0]["lr"] = learning_rate * (1.0 - i / len(parts))
        logits = network.logits(type(rows)(*(tensor[part] for tensor in rows)))
        loss = torch.nn.functional.cross_entropy(logits, action[part])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress((i + 1) / len(parts))
    with torch.no_grad():
        logits = network.logits(type(rows)(*(tensor[train:] for tensor in rows)))
    return float((logits.argmax(-1) == action[train:]).double().mean())
