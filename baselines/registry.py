"""All dispatch rules by name, with their tunable parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from servegym.baselines.added_delay import added_delay
from servegym.baselines.dynamo import dynamo
from servegym.baselines.hexgen import hexgen
from servegym.baselines.least_outstanding import least_outstanding
from servegym.baselines.least_work_left import least_work_left
from servegym.baselines.llm_d import llm_d
from servegym.baselines.llumnix import llumnix
from servegym.baselines.mct import mct
from servegym.baselines.min_kv import min_kv
from servegym.baselines.parameters import read_parameters
from servegym.baselines.power_of_two import power_of_two
from servegym.baselines.prefix_load import prefix_load
from servegym.baselines.random_choice import random_choice
from servegym.baselines.round_robin import round_robin
from servegym.baselines.sglang import sglang, sglang_older
from servegym.baselines.speed_family import speed_family
from servegym.baselines.token_least_load import token_least_load
from servegym.baselines.weighted_round_robin import weighted_round_robin
from servegym.baselines.what_if import what_if
from servegym.baselines.what_if_added import what_if_added
from servegym.errors import ConfigError, unknown_name
from servegym.policy.policy import Heuristic

_RULES: dict[str, Callable[..., Heuristic]] = {
    "random": random_choice,
    "round-robin": round_robin,
    "weighted-round-robin": weighted_round_robin,
    "least-outstanding": least_outstanding,
    "power-of-two": power_of_two,
    "speed-family": speed_family,
    "token-least-load": token_least_load,
    "least-work-left": least_work_left,
    "min-kv": min_kv,
    "sglang": sglang,
    "sglang-older": sglang_older,
    "llm-d": llm_d,
    "dynamo": dynamo,
    "prefix-load": prefix_load,
    "added-delay": added_delay,
    "hexgen": hexgen,
    "llumnix": llumnix,
    "mct": mct,
    "what-if": what_if,
    "what-if-added": what_if_added,
}
#: Rules that also exist with the true lengths in place of predictions.
_ORACLES = ("added-delay", "least-work-left", "mct", "what-if", "what-if-added")

#: `(low, high, logarithmic)` within which a parameter is tuned.
RANGES: dict[str, dict[str, tuple[float, float, bool]]] = {
    "speed-family": {"eta": (0.0, 2.0, False)},
    "prefix-load": {"weight": (0.002, 1.0, True), "eta": (0.0, 2.0, False)},
    "added-delay": {"prefill": (0.05, 20.0, True), "decode": (0.05, 20.0, True)},
    "dynamo": {
        "overlap": (0.2, 3.0, True),
        "prefill_scale": (0.1, 10.0, True),
        "per_request": (0.01, 30.0, True),
    },
    "llm-d": {"queue": (0.1, 10.0, True), "kv": (0.1, 10.0, True), "prefix": (0.1, 10.0, True)},
    "sglang": {
        "cache_threshold": (0.05, 0.9, False),
        "balance_abs": (1.0, 100.0, True),
        "balance_rel": (1.0, 4.0, True),
    },
    "hexgen": {"alpha": (0.0, 0.9, False)},
}

#: `(low, high)` of the parameters that are not just any number of at least 0.
_BOUNDS = {
    "hexgen": {"alpha": (0.0, 1.0)},
    "sglang": {"cache_threshold": (0.0, 1.0)},
    "dynamo": {"block_tokens": (1.0, 1e6)},
}


def names() -> list[str]:
    """Names of all rules, oracles included."""
    return sorted([*_RULES, *(f"{name}-oracle" for name in _ORACLES)])


def policy(text: str) -> Heuristic:
    """Make a rule from its name and parameters.

    Args:
        text: A name, optionally with parameters: `"speed-family:eta=0.5"`.

    Returns:
        The rule.

    Raises:
        ConfigError: If the name or a parameter is unknown, a parameter is given twice, or a value
            is not allowed.
    """
    name, _, given = text.partition(":")
    if name not in names():
        raise ConfigError(unknown_name("policy", name, names()))
    oracle = name not in _RULES
    factory = _RULES[name.removesuffix("-oracle") if oracle else name]
    made = factory(**read_parameters(name, factory, given, _BOUNDS.get(name, {})))
    if oracle:
        return replace(made, name=text if given else name, information="oracle")
    return replace(made, name=text if given else name)


def describe(name: str) -> tuple[str, str, str]:
    """Return a rule's parameters with defaults, its first line of documentation and its source."""
    made = policy(name)
    factory = _RULES.get(name) or _RULES[name.removesuffix("-oracle")]
    params = ", ".join(
        f"{key}={value:g}" for key, value in zip(made.param_names, made.params, strict=True)
    )
    return params, (factory.__doc__ or "").strip(), made.reference
