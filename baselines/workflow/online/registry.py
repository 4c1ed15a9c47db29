"""All online schedulers of jobs by name; a new one is a line here."""

from __future__ import annotations

from servegym.baselines.rules import Entry, Range, Rules
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
from servegym.workflow.online.policy import Rule

OnlineRule = Rule | HeftReplan

_ALPHA = Range(0.0, 0.9)
_ANY_ALPHA = {"alpha": (-10.0, 10.0)}

RULES: Rules[OnlineRule] = Rules(
    "policy",
    {
        "random": Entry(random_start),
        "fifo": Entry(fifo, has_oracle=True),
        "round-robin": Entry(round_robin),
        "round-robin-urgency": Entry(round_robin_urgency, has_oracle=True),
        "fair": Entry(fair, has_oracle=True),
        "weighted-fair": Entry(
            weighted_fair, {"alpha": Range(-2.0, 2.0)}, _ANY_ALPHA, has_oracle=True
        ),
        "sjf-cp": Entry(sjf_cp, has_oracle=True),
        "srpt-cp": Entry(srpt_cp, has_oracle=True),
        "heft-rt": Entry(heft_rt, has_oracle=True),
        "heft-replan": Entry(heft_replan, bounds={"eager": (0.0, 1.0)}, has_oracle=True),
        "mct": Entry(mct, has_oracle=True),
        "etf": Entry(etf, has_oracle=True),
        "edd": Entry(edd, has_oracle=True),
        "mdd": Entry(mdd, has_oracle=True),
        "atc": Entry(
            atc, {"k": Range(0.5, 8.0, logarithmic=True)}, {"k": (1e-3, 1e3)}, has_oracle=True
        ),
        "least-slack": Entry(least_slack, bounds={"hopeless_last": (0.0, 1.0)}, has_oracle=True),
        "hexgen-fcfs": Entry(hexgen_fcfs, {"alpha": _ALPHA}, _ANY_ALPHA, has_oracle=True),
        "hexgen": Entry(hexgen, {"alpha": _ALPHA}, _ANY_ALPHA, has_oracle=True),
        "hexgen-cumulative-fcfs": Entry(
            hexgen_cumulative_fcfs, {"alpha": _ALPHA}, _ANY_ALPHA, has_oracle=True
        ),
        "hexgen-cumulative": Entry(
            hexgen_cumulative, {"alpha": _ALPHA}, _ANY_ALPHA, has_oracle=True
        ),
    },
)

#: Makes an online scheduler from its name and parameters: `online_rule("hexgen:alpha=0.3")`.
online_rule = RULES.make
