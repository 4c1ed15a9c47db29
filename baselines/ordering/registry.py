"""All orders inside an engine by name; a new one is a line here."""

from __future__ import annotations

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
from servegym.baselines.rules import Entry, Range, Rules
from servegym.policy.ordering import OrderingRule

_HOPELESS = {"hopeless_last": (0.0, 1.0)}

RULES: Rules[OrderingRule] = Rules(
    "order",
    {
        "edf": Entry(edf, {"hopeless_last": Range(0.0, 1.0)}, _HOPELESS, has_oracle=True),
        "fcfs": Entry(fcfs),
        "footprint": Entry(
            footprint,
            {"weight": Range(0.0, 4.0), "victim_weight": Range(-2.0, 2.0)},
            bounds=dict.fromkeys(("weight", "victim_weight"), (-10.0, 10.0)),
            has_oracle=True,
        ),
        "least-slack": Entry(
            least_slack, {"hopeless_last": Range(0.0, 1.0)}, _HOPELESS, has_oracle=True
        ),
        "ltr": Entry(
            ltr,
            {
                "starvation": Range(50.0, 20000.0, logarithmic=True),
                "period": Range(5.0, 500.0, logarithmic=True),
            },
            bounds=dict.fromkeys(("period", "starvation"), (1.0, 1e9)),
            has_oracle=True,
        ),
        "mlfq": Entry(
            mlfq,
            {
                "quantum_s": Range(0.05, 50.0, logarithmic=True),
                "starvation_s": Range(1.0, 1000.0, logarithmic=True),
            },
            bounds={"growth": (1.1, 100.0), "quantum_s": (1e-6, 1e6)},
        ),
        "priority": Entry(priority),
        "random": Entry(random_order),
        "sjf": Entry(sjf, has_oracle=True),
        "srpt": Entry(srpt, has_oracle=True),
        "trail": Entry(
            trail, {"young": Range(0.1, 1.0)}, bounds={"young": (0.0, 1.0)}, has_oracle=True
        ),
    },
)

#: Makes an order from its name and parameters: `ordering_policy("ltr:starvation=200,period=20")`.
ordering_policy = RULES.make
