"""All dispatch rules by name; a new one is a line here."""

from __future__ import annotations

from servegym.baselines.added_delay import added_delay
from servegym.baselines.added_delay_held import added_delay_held
from servegym.baselines.added_delay_inferred import (
    added_delay_inferred,
    added_delay_observed,
    added_delay_shrink,
)
from servegym.baselines.added_delay_reject import added_delay_reject
from servegym.baselines.class_aware import class_aware
from servegym.baselines.conductor import conductor
from servegym.baselines.conductor_predicted import conductor_predicted
from servegym.baselines.dynamo import dynamo
from servegym.baselines.hexgen import hexgen
from servegym.baselines.least_outstanding import least_outstanding
from servegym.baselines.least_tpot import least_tpot
from servegym.baselines.least_work_left import least_work_left
from servegym.baselines.linucb import linucb
from servegym.baselines.llm_d import llm_d
from servegym.baselines.llm_d_pd import llm_d_pd
from servegym.baselines.llm_d_predicted import llm_d_predicted
from servegym.baselines.llumnix import llumnix
from servegym.baselines.mct import mct
from servegym.baselines.min_kv import min_kv
from servegym.baselines.power_of_two import power_of_two
from servegym.baselines.prefix_load import prefix_load
from servegym.baselines.random_choice import random_choice
from servegym.baselines.round_robin import round_robin
from servegym.baselines.rules import Entry, Range, Rules
from servegym.baselines.sglang import sglang, sglang_older
from servegym.baselines.speed_family import speed_family
from servegym.baselines.splitwise import splitwise
from servegym.baselines.token_least_load import token_least_load
from servegym.baselines.weighted_round_robin import weighted_round_robin
from servegym.baselines.what_if import what_if
from servegym.baselines.what_if_added import what_if_added
from servegym.baselines.what_if_sampled import what_if_sampled
from servegym.policy.online import OnlinePolicy
from servegym.policy.policy import Heuristic

#: Weights of the delays in `added-delay` and its kin.
_DELAYS = dict.fromkeys(("prefill", "decode"), Range(0.05, 20.0, logarithmic=True))
#: A share of the way from a prediction to what is expected.
_SHARE = {"shrink": (0.0, 1.0)}
#: Weights of llm-d's scores.
SCORES = dict.fromkeys(("queue", "kv", "prefix"), Range(0.1, 10.0, logarithmic=True))
#: Of llm-d's scorers: a share divides by the first, the others are a share, and yes or no.
SCORE_BOUNDS = {"load_threshold": (1.0, 1e9), "busy": (0.0, 1.0), "drawn": (0.0, 1.0)}

RULES: Rules[Heuristic | OnlinePolicy] = Rules(
    "policy",
    {
        "random": Entry(random_choice),
        "round-robin": Entry(round_robin),
        "weighted-round-robin": Entry(weighted_round_robin),
        "least-outstanding": Entry(least_outstanding),
        "power-of-two": Entry(power_of_two),
        "speed-family": Entry(speed_family, {"eta": Range(0.0, 2.0)}),
        "token-least-load": Entry(token_least_load),
        "least-work-left": Entry(least_work_left, bounds=_SHARE, has_oracle=True),
        "min-kv": Entry(min_kv),
        "least-tpot": Entry(least_tpot),
        "sglang": Entry(
            sglang,
            {
                "cache_threshold": Range(0.05, 0.9),
                "balance_abs": Range(1.0, 100.0, logarithmic=True),
                "balance_rel": Range(1.0, 4.0, logarithmic=True),
            },
            bounds={"cache_threshold": (0.0, 1.0)},
        ),
        "sglang-older": Entry(sglang_older),
        "llm-d": Entry(llm_d, SCORES, bounds=SCORE_BOUNDS),
        "dynamo": Entry(
            dynamo,
            {
                "overlap": Range(0.2, 3.0, logarithmic=True),
                "prefill_scale": Range(0.1, 10.0, logarithmic=True),
                "per_request": Range(0.01, 30.0, logarithmic=True),
            },
            bounds={"block_tokens": (1.0, 1e6)},
        ),
        "prefix-load": Entry(
            prefix_load, {"weight": Range(0.002, 1.0, logarithmic=True), "eta": Range(0.0, 2.0)}
        ),
        "added-delay": Entry(added_delay, _DELAYS, has_oracle=True),
        "added-delay-shrink": Entry(added_delay_shrink, _DELAYS, bounds=_SHARE),
        "added-delay-observed": Entry(added_delay_observed, _DELAYS, bounds=_SHARE),
        "added-delay-inferred": Entry(added_delay_inferred, _DELAYS, bounds=_SHARE),
        "added-delay-held": Entry(
            added_delay_held,
            {**_DELAYS, "wait": Range(0.1, 10.0, logarithmic=True)},
            bounds=_SHARE,
        ),
        "added-delay-reject": Entry(
            added_delay_reject,
            {"decode": _DELAYS["decode"], "ttft": Range(0.1, 1.0), "tpot": Range(0.4, 1.0)},
            bounds=_SHARE,
        ),
        "conductor": Entry(conductor, {"slack": Range(0.2, 5.0, logarithmic=True)}),
        "conductor-predicted": Entry(
            conductor_predicted,
            {
                "slack": Range(0.2, 5.0, logarithmic=True),
                "decode_s": Range(0.5, 60.0, logarithmic=True),
            },
            bounds={"decode_s": (1e-3, 1e6)},
        ),
        "splitwise": Entry(splitwise, {"max_pending_tokens": Range(500.0, 1e5, logarithmic=True)}),
        "llm-d-pd": Entry(
            llm_d_pd,
            {
                **SCORES,
                "non_cached_tokens": Range(1.0, 8000.0, logarithmic=True),
                "prompt_tokens": Range(1.0, 8000.0, logarithmic=True),
            },
            bounds=SCORE_BOUNDS,
        ),
        "llm-d-predicted": Entry(
            llm_d_predicted,
            {
                "tpot": Range(0.02, 20.0, logarithmic=True),
                "quantile": Range(0.5, 0.95),
                "typed": Range(0.0, 1.0),
            },
            bounds={
                "quantile": (0.01, 0.99),
                "least": (0.0, 1.0),
                "explore": (0.0, 1.0),
                "typed": (0.0, 1.0),
            },
        ),
        "linucb": Entry(
            linucb,
            {
                "alpha": Range(0.01, 10.0, logarithmic=True),
                "price": Range(0.05, 20.0, logarithmic=True),
            },
            bounds={"memory": (10.0, 1e9)},
        ),
        "class-aware": Entry(
            class_aware,
            {
                "decode": _DELAYS["decode"],
                "ttft": Range(0.2, 1.0),
                "late": Range(0.3, 300.0, logarithmic=True),
                "tpot": Range(0.4, 1.0),
                "slow": Range(0.3, 300.0, logarithmic=True),
                "pushed": Range(0.3, 300.0, logarithmic=True),
                "most": Range(1.0, 300.0, logarithmic=True),
            },
        ),
        "hexgen": Entry(hexgen, {"alpha": Range(0.0, 0.9)}, bounds={"alpha": (0.0, 1.0), **_SHARE}),
        "llumnix": Entry(llumnix),
        "mct": Entry(mct, bounds=_SHARE, has_oracle=True),
        "what-if": Entry(what_if, has_oracle=True),
        "what-if-added": Entry(what_if_added, has_oracle=True),
        "what-if-sampled": Entry(what_if_sampled),
    },
)

#: Makes a dispatch rule from its name and parameters: `policy("speed-family:eta=0.5")`.
policy = RULES.make
