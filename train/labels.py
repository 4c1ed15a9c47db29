"""Labels of decisions: what each of their choices is worth, for those who learn from that."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from servegym.errors import ConfigError
from servegym.policy.counterfactual import Teacher, Worth, due, worth_of
from servegym.policy.drawn_lengths import learn_lengths
from servegym.policy.layout import scenario_actions
from servegym.scenario import Scenario
from servegym.train.arena import Arena


def require_whole_requests(scenario: Scenario, instead: str) -> None:
    """Refuse scenarios in which choices cannot be tried.

    Args:
        scenario: What is played.
        instead: An option that does without.

    Raises:
        ConfigError: If KV moves: some replicas only prefill or decode, requests migrate, or there
            are tiers behind the GPUs.
    """
    spec = scenario.spec
    for applies, tried, but in (
        (
            spec.disaggregated,
            "a replica did all of a request",
            f"some of {scenario.name} only prefill or decode",
        ),
        (
            spec.migrates,
            "requests stayed where they are",
            f"those of {scenario.name} migrate",
        ),
        (
            spec.tiered,
            "a replica computed all of a request",
            f"in {scenario.name} KV is loaded from behind the GPUs",
        ),
    ):
        if applies:
            raise ConfigError(f"choices are tried as if {tried}, but {but}: take {instead}")


def make_teacher(scenario: Scenario, worth: Worth | None = None, *, num_threads: int) -> Teacher:
    """Make who says what choices in a scenario are worth.

    Args:
        scenario: What is played.
        worth: How choices are valued; as its objective wants it unless given.
        num_threads: That label together.
    """
    return Teacher(
        learn_lengths(scenario), worth or worth_of(scenario.objective), num_threads=num_threads
    )


def label(arena: Arena, teacher: Teacher, key: int) -> np.ndarray:
    """Value every action in all environments, `float64[num_envs, A]`.

    Args:
        arena: The environments.
        teacher: Of their scenario.
        key: Of the futures: other ones for another key.
    """
    simulator, actions = arena.env.batch.simulator, arena.scenario.actions
    own = scenario_actions(simulator.max_replicas, hold=actions.hold, reject=actions.reject)
    return teacher.values(simulator, due(simulator), key)[:, own]


def advantages(values: Tensor, mask: Tensor) -> Tensor:
    """Subtract from what is allowed its mean; what is not allowed has 0.

    Args:
        values: Of all actions, `float32[batch, A]`.
        mask: 1 where allowed, same shape.
    """
    mean = (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return (values - mean) * mask
