"""Played episodes of jobs as arrays that a network learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from servegym.agents.workflow_network import MAX_EXPORTED_DEPTH, Graph, Pairs
from servegym.errors import ExportError
from servegym.export.workflow import DecisionSample
from servegym.train.workflow_rollout import Played
from servegym.typing import FloatArray, IntArray


def as_pairs(played: Sequence[Played]) -> Pairs:
    """Lay the pairs of some episodes one behind the other."""
    stages = np.cumsum([0] + [len(one.stages) for one in played])
    jobs = np.cumsum([0] + [int(one.job.max()) + 1 for one in played])
    decisions = np.cumsum([0] + [len(one.chosen) for one in played])
    each = [np.repeat(np.arange(len(one.chosen)), np.diff(one.first)) for one in played]
    return Pairs(
        torch.from_numpy(np.concatenate([one.features for one in played])),
        torch.from_numpy(np.concatenate([one.base for one in played])),
        torch.from_numpy(
            np.concatenate([x.stage + n for x, n in zip(played, stages, strict=False)])
        ),
        torch.from_numpy(
            np.concatenate([x.job[x.stage] + n for x, n in zip(played, jobs, strict=False)])
        ),
        torch.from_numpy(np.concatenate([x + n for x, n in zip(each, decisions, strict=False)])),
        int(decisions[-1]),
    )


def as_graph(played: Sequence[Played]) -> Graph:
    """Lay the jobs of some episodes one behind the other."""
    stages = np.cumsum([0] + [len(one.stages) for one in played])
    jobs = np.cumsum([0] + [int(one.job.max()) + 1 for one in played])
    members = [np.flatnonzero(one.hidden == 0) for one in played]

    return Graph(
        torch.from_numpy(np.concatenate([one.stages for one in played])),
        _joined([one.parent for one in played], stages),
        _joined([one.child for one in played], stages),
        max(one.depth for one in played),
        _joined(members, stages),
        _joined([one.job[m] for one, m in zip(played, members, strict=True)], jobs),
        int(jobs[-1]),
    )


def decision_samples(one: Played, count: int) -> list[DecisionSample]:
    """Take decisions, evenly spread over an episode, with the jobs that they are about.

    Raises:
        ExportError: If a job has a longer way of stages than an exported graph can follow.
    """
    if one.depth > MAX_EXPORTED_DEPTH:
        raise ExportError(
            f"a job has {one.depth} known stages one behind the other, an exported graph follows at"
            f" most {MAX_EXPORTED_DEPTH}: train without message passing"
        )
    found = []
    for t in np.unique(np.linspace(0, len(one.chosen) - 1, count).astype(int)).tolist():
        rows = slice(int(one.first[t]), int(one.first[t + 1]))
        stage = one.stage[rows]
        jobs, job = np.unique(one.job[stage], return_inverse=True)
        inside = np.flatnonzero(np.isin(one.job, jobs))
        place = np.full(len(one.job), -1)
        place[inside] = np.arange(len(inside))
        children = np.zeros((len(inside), len(inside)), np.float32)
        edges = np.isin(one.parent, inside)
        children[place[one.parent[edges]], place[one.child[edges]]] = 1.0
        known = (one.job[inside] == jobs[:, None]) & (one.hidden[inside] == 0)
        members = known / np.maximum(1, known.sum(-1, keepdims=True))
        found.append(
            DecisionSample(
                one.features[rows],
                one.base[rows],
                place[stage],
                job.astype(np.int64),
                one.stages[inside],
                children,
                members.astype(np.float32),
            )
        )
    return found


def _joined(parts: Sequence[IntArray], offsets: IntArray) -> Tensor:
    """Lay index arrays one behind the other, each moved by its offset."""
    return torch.from_numpy(np.concatenate([x + n for x, n in zip(parts, offsets, strict=False)]))


def choices(
    scores: Tensor, decision: Tensor, first: Tensor, chosen: Tensor, count: Tensor, may_wait: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the softmax over each decision's pairs, and waiting with score 0, gives.

    Args:
        scores: Of all pairs, `float32[P]`.
        decision: Of each pair, `int64[P]`, ascending.
        first: First pair of each decision, `int64[D]`.
        chosen: Which of its pairs each decision took; `count` for waiting, `int64[D]`.
        count: Pairs of each decision, `int64[D]`.
        may_wait: Whether it could wait, `bool[D]`.

    Returns:
        Logarithm of the probability of what was chosen, and the entropy, `float32[D]` each.
    """
    size = len(first)
    with torch.no_grad():
        most = torch.where(may_wait, 0.0, -math.inf)
        most = most.scatter_reduce(0, decision, scores, "amax", include_self=True)
    waiting = torch.where(may_wait, (-most).exp(), 0.0)
    total = waiting.index_add(0, decision, (scores - most[decision]).exp())
    log_total = total.log() + most
    log_probs = scores - log_total[decision]
    waits = chosen == count
    picked = log_probs[(first + chosen).clamp(max=len(scores) - 1)]
    log_prob = torch.where(waits, -log_total, picked)
    entropy = scores.new_zeros(size).index_add(0, decision, -log_probs.exp() * log_probs)
    entropy = entropy + torch.where(may_wait, log_total * (-log_total).exp(), 0.0)
    return log_prob, entropy


def discounted(one: Played, horizon_s: float) -> FloatArray:
    """Return the discounted sum of rewards from each decision on, `float64[D]`."""
    rewards = np.diff(one.earned)
    gamma = np.exp(-np.diff(np.append(one.time_s, one.end_s)) / horizon_s)
    found = np.zeros(len(rewards) + 1)
    for t in range(len(rewards) - 1, -1, -1):
        # what is earned on the way is on average half the way ahead
        found[t] = math.sqrt(gamma[t]) * rewards[t] + gamma[t] * found[t + 1]
    return found[:-1]


def advantages(
    one: Played, values: FloatArray, horizon_s: float, credit_s: float, scale: float
) -> FloatArray:
    """Estimate advantages with discounts by time; episodes are played to their ends.

    Args:
        one: The episode.
        values: Of the states decided in, in units of `scale`, `float64[D]`.
        horizon_s: Time constant of the discount.
        credit_s: Time constant of lambda.
        scale: Rewards are divided by this.

    Returns:
        `float64[D]`.
    """
    rewards = np.diff(one.earned) / scale
    passed_s = np.diff(np.append(one.time_s, one.end_s))
    gamma, lam = np.exp(-passed_s / horizon_s), np.exp(-passed_s / credit_s)
    following = np.append(values[1:], 0.0)
    delta = np.sqrt(gamma) * rewards + gamma * following - values
    found, running = np.zeros(len(values)), 0.0
    for t in range(len(values) - 1, -1, -1):
        running = delta[t] + gamma[t] * lam[t] * running
        found[t] = running
    return found
