"""All online schedulers by name, with their tunable parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from servegym.baselines.parameters import read_parameters
from servegym.baselines.workflow.online.due_date import atc, edd, least_slack, mdd
from servegym.baselines.workflow.online.etf import etf
from servegym.baselines.workflow.online.fair import fair, weighted_fair
from servegym.baselines.workflow.online.fifo import fifo
from servegym.baselines.workflow.online.heft_replan import HeftReplan, heft_replan
from servegym.baselines.workflow.online.heft_rt import heft_rt
from servegym.baselines.workflow.online.hexgen import (
    hexgen,
    hexgen_cumulative,
    hexgen_cumulative_fcfs,
    hexgen_fcfs,
    mct,
    round_robin,
    round_robin_urgency,
)
from servegym.baselines.workflow.online.random_start import random_start
from servegym.baselines.workflow.online.sjf_cp import sjf_cp, srpt_cp
from servegym.errors import ConfigError, unknown_name
from servegym.workflow.online.policy import Rule

OnlineRule = Rule | HeftReplan

#: In the order of the comparison table.
ONLINE_RULES: dict[str, Callable[..., OnlineRule]] = {
    "random": random_start,
    "fifo": fifo,
    "round-robin": round_robin,
    "round-robin-urgency": round_robin_urgency,
    "fair": fair,
    "weighted-fair": weighted_fair,
    "sjf-cp": sjf_cp,
    "srpt-cp": srpt_cp,
    "heft-rt": heft_rt,
    "heft-replan": heft_replan,
    "mct": mct,
    "etf": etf,
    "edd": edd,
    "mdd": mdd,
    "atc": atc,
    "least-slack": least_slack,
    "hexgen-fcfs": hexgen_fcfs,
    "hexgen": hexgen,
    "hexgen-cumulative-fcfs": hexgen_cumulative_fcfs,
    "hexgen-cumulative": hexgen_cumulative,
}
#: Rules that use no expectations: the truth is of no use to them.
_WITHOUT_ORACLE = ("random", "round-robin")

#: `(low, high, logarithmic)` within which a parameter is tuned.
ONLINE_RANGES: dict[str, dict[str, tuple[float, float, bool]]] = {
    "weighted-fair": {"alpha": (-2.0, 2.0, False)},
    "atc": {"k": (0.5, 8.0, True)},
    "hexgen-fcfs": {"alpha": (0.0, 0.9, False)},
    "hexgen": {"alpha": (0.0, 0.9, False)},
    "hexgen-cumulative-fcfs": {"alpha": (0.0, 0.9, False)},
    "hexgen-cumulative": {"alpha": (0.0, 0.9, False)},
}
#: `(low, high)` that a parameter may have.
_BOUNDS = {"alpha": (-10.0, 10.0), "k": (1e-3, 1e3), "hopeless_last": (0.0, 1.0), "eager": (0, 1)}


def online_rule_names() -> list[str]:
    """Names of all online rules, oracles included."""
    oracles = [f"{name}-oracle" for name in ONLINE_RULES if name not in _WITHOUT_ORACLE]
    return [*ONLINE_RULES, *oracles]


def online_rule(text: str) -> OnlineRule:
    """Make an online rule from its name and parameters.

    Args:
        text: A name, optionally with parameters: `"hexgen:alpha=0.3"`. With `-oracle` behind the
            name the rule is shown true durations and lengths, and hidden stages.

    Raises:
        ConfigError: If the name or a parameter is unknown, a parameter is given twice, or a value
            is not allowed.
    """
    name, _, given = text.partition(":")
    if name not in online_rule_names():
        raise ConfigError(unknown_name("policy", name, online_rule_names()))
    factory = ONLINE_RULES[name.removesuffix("-oracle")]
    values = read_parameters(name, factory, given, _BOUNDS)
    made = factory(**values)
    if name.endswith("-oracle"):
        return replace(made, name=text, information="oracle")
    return replace(made, name=text)
