"""What policies see of roles and of KV that moves: small fleets, computed by hand."""

from __future__ import annotations

import numpy as np

from servegym.cluster.simulator import Simulator
from servegym.cluster.state import WHERE_IT_MATTERS, Asks
from servegym.policy.contract import (
    DECODES,
    FIRST_ROLE,
    HAS_PREFILL,
    KV_TOKENS_PER_S,
    PREFILLS,
    REPLICA_FEATURES,
    Group,
)
from servegym.policy.observe import observe_batch
from servegym.scenario import load_scenario


def test_links_are_known_by_the_tokens_whose_kv_they_move():
    scenario = load_scenario("pd-unequal")
    episode = scenario.episode(0, num_requests=3)
    simulator = Simulator(scenario.spec, [episode], asks=Asks(place=WHERE_IT_MATTERS))
    simulator.advance()
    seen = observe_batch(simulator, Group.ROLES)[0].replicas[0]
    # 32 layers, K and V, 8 heads of 128 numbers of 2 bytes: 131,072 bytes a token
    rates = [40e9 / 131_072] * 2 + [20e9 / 131_072] * 3 + [10e9 / 131_072] * 2
    np.testing.assert_allclose(seen[KV_TOKENS_PER_S], [*rates, *[20e9 / 131_072] * 2])
    assert seen[PREFILLS].tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert seen[DECODES].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert (seen[HAS_PREFILL] == 0).all()
    simulator.apply(np.array([1]))
    simulator.advance()
    while simulator.state.env["deciding"][0] != 0:  # others arrive while it is prefilled
        simulator.apply(np.array([0]))
        simulator.advance()
    assert observe_batch(simulator, Group.ROLES)[0].replicas[0, HAS_PREFILL].argmax() == 1


def test_in_a_fleet_that_moves_nothing_all_prefill_and_decode():
    scenario = load_scenario("mixed-chat")
    simulator = Simulator(scenario.spec, [scenario.episode(0, num_requests=2)])
    simulator.advance()
    seen = observe_batch(simulator, Group.ROLES)[0].replicas[0]
    rows = {f.name: row for f, row in zip(REPLICA_FEATURES, seen, strict=True)}
    assert (rows.pop("prefills") == 1).all()
    assert (rows.pop("decodes") == 1).all()
    others = [rows[f.name] for f in REPLICA_FEATURES[FIRST_ROLE + 2 :]]
    assert np.abs(others).max() == 0
