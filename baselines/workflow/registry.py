"""All static DAG schedulers by name."""

from __future__ import annotations

from collections.abc import Callable

from servegym.baselines.workflow.atc import atc
from servegym.baselines.workflow.cp_sat import cp_sat
from servegym.baselines.workflow.cpop import cpop
from servegym.baselines.workflow.edd import edd
from servegym.baselines.workflow.etf import etf
from servegym.baselines.workflow.fifo import fifo
from servegym.baselines.workflow.heft import heft
from servegym.baselines.workflow.lawler import lawler
from servegym.baselines.workflow.local_search import edd_ls, mdd_ls
from servegym.baselines.workflow.lopnr import lopnr
from servegym.baselines.workflow.lpt import lpt
from servegym.baselines.workflow.lwkr import lwkr
from servegym.baselines.workflow.max_min import max_min
from servegym.baselines.workflow.mct import mct
from servegym.baselines.workflow.mdd import mdd
from servegym.baselines.workflow.met import met
from servegym.baselines.workflow.min_min import min_min
from servegym.baselines.workflow.moore_hodgson import moore_hodgson
from servegym.baselines.workflow.mopnr import mopnr
from servegym.baselines.workflow.mwkr import mwkr
from servegym.baselines.workflow.olb import olb
from servegym.baselines.workflow.peft import peft
from servegym.baselines.workflow.spt import spt
from servegym.baselines.workflow.sufferage import sufferage
from servegym.baselines.workflow.wspt import wspt
from servegym.errors import ConfigError, unknown_name
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule

WorkflowRule = Callable[[Workflow], Schedule]

#: For any DAG, in the order of the comparison table.
DAG_RULES: dict[str, WorkflowRule] = {
    "heft": heft,
    "cpop": cpop,
    "peft": peft,
    "min-min": min_min,
    "max-min": max_min,
    "sufferage": sufferage,
    "mct": mct,
    "met": met,
    "olb": olb,
    "etf": etf,
}
#: For job shops only.
JOB_SHOP_RULES: dict[str, WorkflowRule] = {
    "spt": spt,
    "lpt": lpt,
    "fifo": fifo,
    "mwkr": mwkr,
    "lwkr": lwkr,
    "mopnr": mopnr,
    "lopnr": lopnr,
}
#: For independent tasks on one device; `spt`, a job-shop rule, is one of them too.
SINGLE_MACHINE_RULES: dict[str, WorkflowRule] = {
    "edd": edd,
    "mdd": mdd,
    "atc": atc,
    "wspt": wspt,
    "moore-hodgson": moore_hodgson,
    "edd+ls": edd_ls,
    "mdd+ls": mdd_ls,
    "lawler": lawler,
}
#: Solvers, which take as long as they are given.
EXACT_RULES: dict[str, WorkflowRule] = {"cp-sat": cp_sat}


def rule_names() -> list[str]:
    """Names of all rules."""
    return [*DAG_RULES, *JOB_SHOP_RULES, *SINGLE_MACHINE_RULES, *EXACT_RULES]


def workflow_rule(name: str) -> WorkflowRule:
    """Return a rule by its name.

    Raises:
        ConfigError: If there is none of that name.
    """
    rules = DAG_RULES | JOB_SHOP_RULES | SINGLE_MACHINE_RULES | EXACT_RULES
    if name not in rules:
        raise ConfigError(unknown_name("policy", name, rules))
    return rules[name]
