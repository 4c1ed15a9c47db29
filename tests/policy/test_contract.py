"""The observation contract: its rows, its words, and what the simulator fills."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.cluster import state
from servegym.cluster.nominal import nominal_facts
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import DECISION
from servegym.policy import contract, ordering
from servegym.policy.contract import (
    NO_BOUND,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.observe import observe_batch
from servegym.policy.ordering import ORDERING_FEATURES, OrderingFeature
from servegym.scenario import load_scenario, scenario_names

#: What the simulator calls the rows, where that is not the feature's name.
ROW_NAMES = {
    "OUTSTANDING": "OUTSTANDING_REQUESTS",
    "OUTSTANDING_PROMPT": "OUTSTANDING_PROMPT_TOKENS",
    "PENDING_PREFILL": "PENDING_PREFILL_TOKENS",
    "OUTSTANDING_PREDICTED": "OUTSTANDING_PREDICTED_TOKENS",
    "RECENT_TTFT": "RECENT_TTFT_S",
    "RECENT_TPOT": "RECENT_TPOT_S",
    "SINCE_DISPATCH": "SINCE_DISPATCH_S",
    "PREFILL_RATE": "PREFILL_TOKENS_PER_S",
    "DECODE_STEP": "DECODE_STEP_S",
    "DECODE_SEQ": "DECODE_SEQ_S",
    "KV_CAPACITY": "KV_CAPACITY_TOKENS",
    "KV_USAGE": "KV_CACHE_USAGE",
    "GENERATED": "GENERATED_TOKENS",
    "METRICS_AGE": "METRICS_AGE_S",
    "PREFIX_HIT": "PREFIX_HIT_TOKENS",
    "RECENT_ITL": "RECENT_ITL_S",
    "EXPECTED_LEFT": "EXPECTED_TOKENS_LEFT",
    "AS_TIGHT": "OUTSTANDING_AS_TIGHT",
    "WHAT_IF_E2E": "WHAT_IF_E2E_S",
    "WHAT_IF_ADDED": "WHAT_IF_ADDED_S",
}
#: What policies saw that were exported with schema 1.
FIRST_SCHEMA = {
    "replicas": [
        "up",
        "outstanding_requests",
        "outstanding_prompt_tokens",
        "pending_prefill_tokens",
        "outstanding_predicted_tokens",
        "recent_ttft_s",
        "recent_tpot_s",
        "since_dispatch_s",
        "relative_speed",
        "prefill_tokens_per_s",
        "decode_step_s",
        "decode_seq_s",
        "kv_capacity_tokens",
        "max_num_seqs",
        "max_num_batched_tokens",
        "num_running",
        "num_waiting",
        "kv_cache_usage",
        "generated_tokens",
        "metrics_age_s",
        "prefix_hit_tokens",
    ],
    "request": [
        "prompt_tokens",
        "predicted_output_tokens",
        "ttft_slo_s",
        "tpot_slo_s",
        "slo_weight",
        "waited_s",
        "arrival_rate_rps",
        "num_up",
        "num_held",
    ],
}
UNITS = {"-", "s", "requests", "tokens", "tokens/s", "requests/s", "replicas"}
FEATURES = [*REPLICA_FEATURES, *REQUEST_FEATURES]


@pytest.mark.parametrize(
    ("module", "features", "by_name"),
    [
        (contract, REPLICA_FEATURES, ReplicaFeature),
        (contract, REQUEST_FEATURES, RequestFeature),
        (ordering, ORDERING_FEATURES, OrderingFeature),
    ],
)
def test_plain_constants_number_the_features(module, features, by_name):
    names = [feature.name.upper() for feature in features]
    numbers = list(range(len(features)))
    assert [getattr(module, name) for name in names] == numbers
    assert [by_name[name] for name in names] == numbers


def test_rows_of_the_state_are_the_features_in_order():
    rows = {
        ROW_NAMES.get(name.removeprefix("OBSERVED_"), name.removeprefix("OBSERVED_")): getattr(
            state, name
        )
        for name in dir(state)
        if name.startswith("OBSERVED_")
    }
    assert rows == {f.name.upper(): i for i, f in enumerate(REPLICA_FEATURES)}
    assert state.NUM_OBSERVED_ROWS == contract.NUM_REPLICA_FEATURES == len(REPLICA_FEATURES)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
def test_a_feature_has_name_range_unit_and_meaning(feature):
    assert feature.name.isidentifier()
    assert feature.name == feature.name.lower()
    assert 0 <= feature.low < feature.high <= NO_BOUND
    assert feature.unit in UNITS
    assert feature.name.endswith("_s") == (feature.unit == "s") or feature.unit == "tokens/s"
    assert isinstance(feature.group, Group)
    assert len(feature.meaning.split()) >= 2


@pytest.mark.parametrize("features", [REPLICA_FEATURES, REQUEST_FEATURES])
def test_feature_names_and_meanings_are_unique(features):
    assert len({f.name for f in features}) == len(features)
    assert len({f.meaning for f in features}) == len(features)


@pytest.mark.parametrize("extended", [False, True])
def test_what_environments_show_are_the_first_features_and_all_of_its_groups(extended):
    shape = contract.observed(extended=extended)
    groups = contract.observed_groups(extended=extended)
    for features, count in zip((REPLICA_FEATURES, REQUEST_FEATURES), shape, strict=True):
        assert 0 < count <= len(features)
        assert [f for f in features if f.group & groups] == list(features[:count])
    hidden = [f.name for f in REPLICA_FEATURES if f.group == Group.WHAT_IF]
    assert hidden == ["what_if_e2e_s", "what_if_added_s"]
    behind = [f for f in REPLICA_FEATURES[shape.replicas :] if f.group != Group.ROLES]
    assert [f.name for f in behind][-2:] == hidden
    assert bool(groups & Group.LIMITS) == extended


def test_rows_about_roles_are_the_last():
    roles = [f for f in REPLICA_FEATURES if f.group == Group.ROLES]
    assert roles == list(REPLICA_FEATURES[contract.FIRST_ROLE :])
    assert len(roles) == contract.NUM_ROLE_FEATURES == 7


def test_rows_of_the_first_schema_are_what_they_were():
    shape = contract.observed(extended=False)
    assert [f.name for f in REPLICA_FEATURES[: shape.replicas]] == FIRST_SCHEMA["replicas"]
    assert [f.name for f in REQUEST_FEATURES[: shape.request]] == FIRST_SCHEMA["request"]


def test_each_margin_has_its_row():
    rows = [f.name for f in REPLICA_FEATURES if f.name.startswith("pushed_over_")]
    assert rows == [f"pushed_over_{round(100 * margin)}" for margin in contract.MARGINS]
    assert list(contract.MARGINS) == sorted(contract.MARGINS)


def test_predicted_lengths_are_there_for_the_request_and_for_each_replica():
    assert REQUEST_FEATURES[RequestFeature.PREDICTED_OUTPUT_TOKENS].unit == "tokens"
    assert REPLICA_FEATURES[ReplicaFeature.OUTSTANDING_PREDICTED_TOKENS].unit == "tokens"
    assert not any("output_tokens" in f.name for f in FEATURES if "predicted" not in f.name)


def test_nominal_rows_are_the_known_facts_at_the_replicas_speed():
    scenario = load_scenario("mixed-chat")
    episode = scenario.episode(0, num_requests=1)
    episode.speed[:] = np.linspace(0.5, 2.0, len(episode.speed))
    simulator = Simulator(scenario.spec, [episode])
    simulator.advance()
    observed = observe_batch(simulator, Group.COUNTERS)[0].replicas[0]
    facts = nominal_facts(scenario.spec)[episode.type_idx]
    speed = episode.speed
    names = [f.name for f in REPLICA_FEATURES[contract.FIRST_NOMINAL :][: contract.NUM_NOMINAL]]
    factors = {
        "relative_speed": speed,
        "prefill_tokens_per_s": speed,
        "decode_step_s": 1 / speed,
        "decode_seq_s": 1 / speed,
        "kv_capacity_tokens": 1,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 1,
    }
    assert names == list(factors)
    for column, (name, factor) in enumerate(factors.items()):
        row = observed[ReplicaFeature[name.upper()]]
        np.testing.assert_allclose(row, facts[:, column] * factor, rtol=1e-12, err_msg=name)


def test_relative_speed_has_the_fastest_replica_of_the_fleet_at_one():
    scenario = load_scenario("hetero-prefix")
    simulator = Simulator(scenario.spec, [scenario.episode(0, num_requests=1)])
    simulator.advance()
    observed = observe_batch(simulator, Group.COUNTERS)[0].replicas[0]
    speed = observed[ReplicaFeature.RELATIVE_SPEED]
    assert speed.max() == 1.0
    assert speed.argmax() == 0  # the H100
    assert speed[1] == speed[2] > speed[3] == speed[5]  # A100s, A40s


@pytest.mark.parametrize("name", scenario_names())
def test_observations_stay_within_the_ranges_of_the_contract(name):
    scenario = load_scenario(name)
    simulator = Simulator(scenario.spec, [scenario.episode(1, num_requests=150)])
    low, high = (
        np.array([getattr(f, x) for f in REPLICA_FEATURES])[:, None] for x in ("low", "high")
    )
    low_q, high_q = (np.array([getattr(f, x) for f in REQUEST_FEATURES]) for x in ("low", "high"))
    rng = np.random.default_rng(2)
    while simulator.advance()[0] == DECISION:
        seen, _ = observe_batch(simulator, contract.observed_groups(extended=True))
        assert (seen.replicas[0] >= low).all()
        assert (seen.replicas[0] <= high).all()
        assert (seen.request[0] >= low_q).all()
        assert (seen.request[0] <= high_q).all()
        simulator.apply(np.array([rng.choice(np.flatnonzero(seen.mask[0, :-2]))]))
    assert simulator.state.env[0]["num_ended"] == 150
