"""The observation contract: every feature a policy may use, live or simulated.

Values are in raw physical units; a learned policy brings its own normalisation. The simulator and
the live adapters fill the same rows, and the tables in the documentation are made from this file.
Features are rows and replicas columns, but for agents: see `policy.layout`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

#: 2 has added rows behind those of 1, which are what they were.
SCHEMA_VERSION = 2


class Group(IntFlag):
    """Which source fills a feature; a policy pays only for the groups it needs."""

    COUNTERS = 1  # the router's own book-keeping and static facts: always there
    METRICS = 2  # engine metrics, as old as `metrics_age_s` says
    PREFIX = 4  # prefix index
    WHAT_IF = 8  # forward simulation of each choice; not part of the environment's observation
    STEP_TIMES = 16  # what the router infers: from when tokens come,
    LENGTHS = 32  # from how long answers have become,
    LIMITS = 64  # and from both, about every request that is there: this costs the most
    SAMPLED = 128  # with WHAT_IF: over drawn output lengths, not the predicted ones
    ROLES = 256  # who prefills and who decodes, links, and KV that is on its way


#: What a router works out from its own book-keeping, if a policy asks for it.
INFERRED = Group.STEP_TIMES | Group.LENGTHS | Group.LIMITS


class Feature(NamedTuple):
    """One number of the observation."""

    name: str
    low: float
    high: float
    unit: str
    group: Group
    meaning: str


#: Stands for "no bound": spaces must be finite.
NO_BOUND = 1e9

#: Shares of TPOT limits for which requests are counted that a choice would push over them.
MARGINS = (0.4, 0.5, 0.6, 0.8, 1.0)


def _pushed_over(margin: float) -> Feature:
    return Feature(
        f"pushed_over_{100 * margin:.0f}",
        0,
        NO_BOUND,
        "requests",
        Group.LIMITS,
        f"requests there whose TPOT would stay within {100 * margin:.0f} % of its limit without "
        "this one, and would not with it",
    )


REPLICA_FEATURES: tuple[Feature, ...] = (
    Feature("up", 0, 1, "-", Group.COUNTERS, "1 if the replica takes requests"),
    Feature(
        "outstanding_requests",
        0,
        NO_BOUND,
        "requests",
        Group.COUNTERS,
        "dispatched to it and not ended",
    ),
    Feature(
        "outstanding_prompt_tokens", 0, NO_BOUND, "tokens", Group.COUNTERS, "prompt tokens of those"
    ),
    Feature(
        "pending_prefill_tokens",
        0,
        NO_BOUND,
        "tokens",
        Group.COUNTERS,
        "prompt tokens, less the prefix believed cached, of those without a first token",
    ),
    Feature(
        "outstanding_predicted_tokens",
        0,
        NO_BOUND,
        "tokens",
        Group.COUNTERS,
        "predicted output tokens of the outstanding requests",
    ),
    Feature(
        "recent_ttft_s",
        0,
        NO_BOUND,
        "s",
        Group.COUNTERS,
        "moving average of TTFT (weight 0.1 on the newest), 0 before the first",
    ),
    Feature(
        "recent_tpot_s",
        0,
        NO_BOUND,
        "s",
        Group.COUNTERS,
        "moving average of TPOT of ended requests (weight 0.1), 0 before the first",
    ),
    Feature(
        "since_dispatch_s",
        0,
        1e6,
        "s",
        Group.METRICS,
        "since the last request went there, at most 1e6",
    ),
    Feature(
        "relative_speed",
        0,
        NO_BOUND,
        "-",
        Group.COUNTERS,
        "known throughput on a reference request, the fastest replica of the fleet being 1",
    ),
    Feature(
        "prefill_tokens_per_s",
        0,
        NO_BOUND,
        "tokens/s",
        Group.COUNTERS,
        "known prefill rate at a full token budget",
    ),
    Feature(
        "decode_step_s",
        0,
        NO_BOUND,
        "s",
        Group.COUNTERS,
        "known duration of a step that decodes one sequence",
    ),
    Feature(
        "decode_seq_s",
        0,
        NO_BOUND,
        "s",
        Group.COUNTERS,
        "known extra step time of each further decoding sequence of 1,024 tokens",
    ),
    Feature("kv_capacity_tokens", 0, NO_BOUND, "tokens", Group.COUNTERS, "KV cache size"),
    Feature("max_num_seqs", 0, NO_BOUND, "requests", Group.COUNTERS, "running requests at most"),
    Feature(
        "max_num_batched_tokens", 0, NO_BOUND, "tokens", Group.COUNTERS, "token budget of a step"
    ),
    Feature("num_running", 0, NO_BOUND, "requests", Group.METRICS, "requests in its running list"),
    Feature("num_waiting", 0, NO_BOUND, "requests", Group.METRICS, "requests in its waiting queue"),
    Feature("kv_cache_usage", 0, 1, "-", Group.METRICS, "share of KV blocks held"),
    Feature(
        "generated_tokens",
        0,
        NO_BOUND,
        "tokens",
        Group.METRICS,
        "output tokens emitted so far by its requests that have not ended",
    ),
    Feature("metrics_age_s", 0, NO_BOUND, "s", Group.METRICS, "age of the engine metrics"),
    Feature(
        "prefix_hit_tokens",
        0,
        NO_BOUND,
        "tokens",
        Group.PREFIX,
        "leading prompt tokens of this request in its prefix cache",
    ),
    Feature(
        "step_time_ratio",
        0,
        NO_BOUND,
        "-",
        Group.STEP_TIMES,
        "observed over expected time of its recent steps, 1 if there are none",
    ),
    Feature(
        "recent_itl_s",
        0,
        NO_BOUND,
        "s",
        Group.STEP_TIMES,
        "recent time from token to token there, with the prefills in between; `decode_step_s` if "
        "there is none",
    ),
    Feature(
        "expected_tokens_left",
        0,
        NO_BOUND,
        "tokens",
        Group.LIMITS,
        "output tokens still expected of the outstanding requests, given what has come",
    ),
    Feature(
        "outstanding_as_tight",
        0,
        NO_BOUND,
        "requests",
        Group.LIMITS,
        "outstanding requests whose TPOT limit is not above this one's",
    ),
    *map(_pushed_over, MARGINS),
    Feature(
        "what_if_e2e_s",
        0,
        NO_BOUND,
        "s",
        Group.WHAT_IF,
        "simulated time to the end of this request there, with predicted lengths",
    ),
    Feature(
        "what_if_added_s",
        0,
        NO_BOUND,
        "s",
        Group.WHAT_IF,
        "simulated growth of the summed times to the end of all its requests",
    ),
    Feature("prefills", 0, 1, "-", Group.ROLES, "1 if it may be sent a request to prefill"),
    Feature("decodes", 0, 1, "-", Group.ROLES, "1 if requests decode there"),
    Feature(
        "kv_tokens_per_s",
        0,
        NO_BOUND,
        "tokens/s",
        Group.ROLES,
        "known rate at which its link moves KV, 0 in fleets that move none",
    ),
    Feature(
        "num_holding",
        0,
        NO_BOUND,
        "requests",
        Group.ROLES,
        "requests beside the running ones that hold its KV blocks: prefilled there and not yet "
        "fetched, or coming to decode",
    ),
    Feature(
        "arriving_tokens",
        0,
        NO_BOUND,
        "tokens",
        Group.ROLES,
        "prompt tokens whose KV comes to it from elsewhere: of its queue, on their way, and landed "
        "but not admitted",
    ),
    Feature(
        "link_busy_s",
        0,
        NO_BOUND,
        "s",
        Group.ROLES,
        "until all that has begun to move from it or to it is over",
    ),
    Feature(
        "has_prefill",
        0,
        1,
        "-",
        Group.ROLES,
        "1 where this request was prefilled or will be, if it is to be placed",
    ),
)

REQUEST_FEATURES: tuple[Feature, ...] = (
    Feature("prompt_tokens", 1, NO_BOUND, "tokens", Group.COUNTERS, "prompt length"),
    Feature(
        "predicted_output_tokens",
        1,
        NO_BOUND,
        "tokens",
        Group.COUNTERS,
        "output length as predicted; the true one only for an oracle",
    ),
    Feature("ttft_slo_s", 0, 1e6, "s", Group.COUNTERS, "TTFT limit of its class, at most 1e6"),
    Feature("tpot_slo_s", 0, 1e6, "s", Group.COUNTERS, "TPOT limit of its class, at most 1e6"),
    Feature("slo_weight", 0, NO_BOUND, "-", Group.COUNTERS, "worth of meeting them"),
    Feature("waited_s", 0, NO_BOUND, "s", Group.COUNTERS, "since it arrived"),
    Feature(
        "arrival_rate_rps",
        0,
        NO_BOUND,
        "requests/s",
        Group.COUNTERS,
        "one over the moving average of inter-arrival times (weight 0.02)",
    ),
    Feature("num_up", 0, NO_BOUND, "replicas", Group.COUNTERS, "replicas that take requests"),
    Feature("num_held", 0, NO_BOUND, "requests", Group.COUNTERS, "requests on hold"),
    Feature(
        "expected_tokens",
        0,
        NO_BOUND,
        "tokens",
        Group.LENGTHS,
        "mean output length of requests so predicted, as learnt from those that have ended",
    ),
    Feature(
        "expected_tokens_spread",
        0,
        NO_BOUND,
        "-",
        Group.LENGTHS,
        "standard deviation of that length over its mean",
    ),
)

NUM_REPLICA_FEATURES = len(REPLICA_FEATURES)
NUM_REQUEST_FEATURES = len(REQUEST_FEATURES)

#: Row of each feature of a replica, plain for kernels: `replicas[OUTSTANDING_REQUESTS, r]`.
(
    UP,
    OUTSTANDING_REQUESTS,
    OUTSTANDING_PROMPT_TOKENS,
    PENDING_PREFILL_TOKENS,
    OUTSTANDING_PREDICTED_TOKENS,
    RECENT_TTFT_S,
    RECENT_TPOT_S,
    SINCE_DISPATCH_S,
    RELATIVE_SPEED,
    PREFILL_TOKENS_PER_S,
    DECODE_STEP_S,
    DECODE_SEQ_S,
    KV_CAPACITY_TOKENS,
    MAX_NUM_SEQS,
    MAX_NUM_BATCHED_TOKENS,
    NUM_RUNNING,
    NUM_WAITING,
    KV_CACHE_USAGE,
    GENERATED_TOKENS,
    METRICS_AGE_S,
    PREFIX_HIT_TOKENS,
    STEP_TIME_RATIO,
    RECENT_ITL_S,
    EXPECTED_TOKENS_LEFT,
    OUTSTANDING_AS_TIGHT,
    PUSHED_OVER_40,
    PUSHED_OVER_50,
    PUSHED_OVER_60,
    PUSHED_OVER_80,
    PUSHED_OVER_100,
    WHAT_IF_E2E_S,
    WHAT_IF_ADDED_S,
    PREFILLS,
    DECODES,
    KV_TOKENS_PER_S,
    NUM_HOLDING,
    ARRIVING_TOKENS,
    LINK_BUSY_S,
    HAS_PREFILL,
) = range(NUM_REPLICA_FEATURES)
#: Place of each feature of the request: `request[PROMPT_TOKENS]`.
(
    PROMPT_TOKENS,
    PREDICTED_OUTPUT_TOKENS,
    TTFT_SLO_S,
    TPOT_SLO_S,
    SLO_WEIGHT,
    WAITED_S,
    ARRIVAL_RATE_RPS,
    NUM_UP,
    NUM_HELD,
    EXPECTED_TOKENS,
    EXPECTED_TOKENS_SPREAD,
) = range(NUM_REQUEST_FEATURES)

#: The same by name, e.g. `ReplicaFeature["OUTSTANDING_REQUESTS"]`.
ReplicaFeature = IntEnum(  # type: ignore[misc]
    "ReplicaFeature", [(f.name.upper(), i) for i, f in enumerate(REPLICA_FEATURES)]
)
RequestFeature = IntEnum(  # type: ignore[misc]
    "RequestFeature", [(f.name.upper(), i) for i, f in enumerate(REQUEST_FEATURES)]
)

#: Rows an environment shows of a replica, and of the request: what costs next to nothing.
NUM_OBSERVED_FEATURES = sum(f.group < Group.WHAT_IF for f in REPLICA_FEATURES)
NUM_OBSERVED_REQUEST_FEATURES = sum(f.group < Group.WHAT_IF for f in REQUEST_FEATURES)
#: Rows of the extended observation: with what is inferred.
NUM_EXTENDED_FEATURES = sum(f.group not in (Group.WHAT_IF, Group.ROLES) for f in REPLICA_FEATURES)
#: Rows about roles, the last: environments of disaggregated fleets show them behind the plain ones.
FIRST_ROLE = PREFILLS
NUM_ROLE_FEATURES = NUM_REPLICA_FEATURES - FIRST_ROLE
#: Static rows, filled from `Params.nominal` (same order), from this one on.
FIRST_NOMINAL = RELATIVE_SPEED
NUM_NOMINAL = MAX_NUM_BATCHED_TOKENS - FIRST_NOMINAL + 1


class Shape(NamedTuple):
    """How many features an observation has.

    Attributes:
        replicas: Of each replica: the first so many rows.
        request: Of the request.
    """

    replicas: int
    request: int


def observed(*, extended: bool) -> Shape:
    """Return the shape of what environments show and networks take, plain or extended."""
    if extended:
        return Shape(NUM_EXTENDED_FEATURES, NUM_REQUEST_FEATURES)
    return Shape(NUM_OBSERVED_FEATURES, NUM_OBSERVED_REQUEST_FEATURES)


def observed_groups(*, extended: bool) -> Group:
    """Return the groups of features in such an observation."""
    plain = Group.COUNTERS | Group.METRICS | Group.PREFIX
    return plain | INFERRED if extended else plain
