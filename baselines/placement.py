"""All rules for where a request decodes that is prefilled elsewhere, by name.

They are dispatch rules that look at what a decode costs. A name here is no order's, so that
`DISPATCH+PLACEMENT` and `DISPATCH+ORDER` are told apart by the name.
"""

from __future__ import annotations

from servegym.baselines.least_outstanding import least_outstanding
from servegym.baselines.least_tpot import least_tpot
from servegym.baselines.llm_d import llm_d
from servegym.baselines.min_kv import min_kv
from servegym.baselines.power_of_two import power_of_two
from servegym.baselines.registry import SCORES
from servegym.baselines.rules import Entry, Rules
from servegym.baselines.splitwise_place import splitwise_place
from servegym.policy.policy import Heuristic

PLACEMENTS: Rules[Heuristic] = Rules(
    "placement",
    {
        "least-outstanding": Entry(least_outstanding),
        "power-of-two": Entry(power_of_two),
        "min-kv": Entry(min_kv),
        "least-tpot": Entry(least_tpot),
        "splitwise": Entry(splitwise_place),
        "llm-d": Entry(llm_d, SCORES),
    },
)

#: Makes a placement rule from its name and parameters.
placement = PLACEMENTS.make
