"""All orders by name, with their parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from servegym.baselines.ordering.edf import edf
from servegym.baselines.ordering.fcfs import fcfs
from servegym.baselines.ordering.footprint import footprint
from servegym.baselines.ordering.least_slack import least_slack
from servegym.baselines.ordering.ltr import ltr
from servegym.baselines.ordering.mlfq import mlfq
from servegym.baselines.ordering.priority import priority
from servegym.baselines.ordering.random_order import random_order
from servegym.baselines.ordering.sjf import sjf
from servegym.baselines.ordering.srpt import srpt
from servegym.baselines.ordering.trail import trail
from servegym.baselines.parameters import read_parameters
from servegym.errors import ConfigError, unknown_name
from servegym.policy.ordering import OrderingRule

_RULES: dict[str, Callable[..., OrderingRule]] = {
    "edf": edf,
    "fcfs": fcfs,
    "footprint": footprint,
    "least-slack": least_slack,
    "ltr": ltr,
    "mlfq": mlfq,
    "priority": priority,
    "random": random_order,
    "sjf": sjf,
    "srpt": srpt,
    "trail": trail,
}

#: `(low, high)` of the parameters that are not just any number of at least 0.
_BOUNDS = {
    "edf": {"hopeless_last": (0.0, 1.0)},
    "footprint": {"victim_weight": (-10.0, 10.0), "weight": (-10.0, 10.0)},
    "least-slack": {"hopeless_last": (0.0, 1.0)},
    "ltr": {"period": (1.0, 1e9), "starvation": (1.0, 1e9)},
    "mlfq": {"growth": (1.1, 100.0), "quantum_s": (1e-6, 1e6)},
    "trail": {"young": (0.0, 1.0)},
}

#: `(low, high, logarithmic)` of the parameters that tuning tries.
ORDER_RANGES: dict[str, dict[str, tuple[float, float, bool]]] = {
    "edf": {"hopeless_last": (0.0, 1.0, False)},
    "footprint": {"weight": (0.0, 4.0, False), "victim_weight": (-2.0, 2.0, False)},
    "least-slack": {"hopeless_last": (0.0, 1.0, False)},
    "ltr": {"starvation": (50.0, 20000.0, True), "period": (5.0, 500.0, True)},
    "mlfq": {"quantum_s": (0.05, 50.0, True), "starvation_s": (1.0, 1000.0, True)},
    "trail": {"young": (0.1, 1.0, False)},
}


def ordering_names() -> list[str]:
    """Names of all orders."""
    return sorted(_RULES)


def ordering_policy(text: str) -> OrderingRule:
    """Make an order from its name and parameters.

    Args:
        text: A name, optionally with parameters: `"ltr:starvation=200,period=20"`.

    Returns:
        The rule.

    Raises:
        ConfigError: If the name or a parameter is unknown or a value is not allowed.
    """
    name, _, given = text.partition(":")
    if name not in _RULES:
        raise ConfigError(unknown_name("order", name, _RULES))
    values = read_parameters(name, _RULES[name], given, _BOUNDS.get(name, {}))
    return replace(_RULES[name](**values), name=text if given else name)
