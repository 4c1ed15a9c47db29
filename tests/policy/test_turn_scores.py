"""What becomes of ended turns by weights: terms, answers, and what a simulator says of a turn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servegym.baselines.retention.registry import retention
from servegym.cluster.state import DECISION, DROP, HOST, KEEP, LEAVE, OFFLOAD, RETAIN
from servegym.export.resolve import resolve_policy
from servegym.policy.retention import Kept, Turn
from servegym.policy.run_kept import Turns, make_simulator, run_kept
from servegym.policy.turn_scores import (
    NUM_TURN_TERMS,
    TURN_TERMS,
    TurnWeights,
    scored_turns,
    turn_terms,
)
from servegym.scenario import load_scenario

TURN = Turn(
    now_s=100.0,
    kept_tokens=7000,
    kv_share=0.1,
    recompute_s=2.0,
    tiered=True,
    tool=0,
    gaps_s=np.array([1.0, 4.0] * 4),
    back_s=math.nan,
    free_share=0.25,
    num_waiting=3,
    host_share=0.75,
    writing_s=math.e - 1.0,
)


def weighed(**given: dict[str, float]) -> TurnWeights:
    made = TurnWeights(*np.zeros((4, NUM_TURN_TERMS)))
    for name, terms in given.items():
        for term, weight in terms.items():
            getattr(made, name)[TURN_TERMS.index(term)] = weight
    return made


def decided(turn: Turn = TURN, **given: dict[str, float]) -> tuple[int, float]:
    return scored_turns(weighed(**given), "one").retain(turn)


def test_terms_by_hand():
    wanted = [1.0, math.log(2.0), math.log(2.0), math.log(8.0), math.log(2.0), 0.25]
    wanted += [math.log(4.0), 0.75, 1.0]
    np.testing.assert_allclose(turn_terms(TURN), wanted)
    few = TURN._replace(gaps_s=TURN.gaps_s[:7])
    assert turn_terms(few)[1:3].tolist() == [math.log(10.0), 0.0]


@pytest.mark.parametrize("term", TURN_TERMS)
def test_each_term_moves_each_answer_and_the_time(term):
    value = turn_terms(TURN)[TURN_TERMS.index(term)]
    assert decided(offload={term: 1.0}) == (OFFLOAD, 0.0)
    assert decided(drop={term: 1.0}) == (DROP, 0.0)
    assert decided(keep={term: 1.0}, seconds={term: 2.0}) == (
        KEEP,
        pytest.approx(math.exp(2.0 * value)),
    )
    for name in ("keep", "offload", "drop"):
        assert decided(**{name: {term: -1.0}}) == (LEAVE, 0.0)


def test_the_highest_score_is_the_answer_if_it_can_be_given():
    scores = {"keep": {"constant": 1.0}, "offload": {"constant": 3.0}, "drop": {"constant": 2.0}}
    assert decided(**scores) == (OFFLOAD, 0.0)
    assert decided(TURN._replace(tiered=False), **scores) == (DROP, 0.0)
    assert decided(keep={"constant": 1.0}, seconds={"constant": 99.0})[1] == math.exp(9.0)


def test_a_turn_has_what_its_replica_and_its_first_tier_hold():
    agents = load_scenario("agents-tiers")
    slow = agents.fleet[2].host_kv.model_copy(update={"gb_per_s": 0.2})
    fleet = (agents.fleet[2].model_copy(update={"count": 2, "host_kv": slow}),)
    scenario = agents.model_copy(update={"fleet": fleet, "kv_store": None})
    simulator = make_simulator(scenario.spec, [scenario.episode(0, load=2.0, num_requests=60)])
    turns, seen = Turns(simulator), []
    while simulator.advance()[0] == DECISION:
        env = simulator.state.env[0]
        if env["decision"] != RETAIN:
            simulator.apply(np.array([int(env["now_s"] * 7) % 2]))
            continue
        turn, r = turns.due(0, tell=False), int(env["asking"])
        size = scenario.spec.types[0].num_blocks
        blocks = simulator.state.block[0, r][:size]
        unused = ((blocks["holders"] == 0) & (blocks["keepers"] == 0)).sum()
        assert turn.free_share == unused / size
        host = scenario.spec.types[0].host_kv
        held = simulator.state.tier[0, r, HOST]["num_blocks"]
        assert turn.host_share == held / host.num_blocks
        assert turn.num_waiting == simulator.state.replica[0, r]["num_waiting"]
        seen.append(turn)
        simulator.apply(np.array([OFFLOAD]))
    assert len(seen) > 15
    for name in ("free_share", "host_share"):
        values = {getattr(turn, name) for turn in seen}
        assert len(values) > 10
        assert all(0.0 <= value <= 1.0 for value in values)
    assert max(turn.writing_s for turn in seen) > 0.0


def test_what_is_left_on_the_gpu_is_not_written():
    agents = load_scenario("agents-tiers")
    stored = {}
    for name, rule in (
        ("lru", retention("lru")),
        ("all", scored_turns(weighed(offload={"constant": 1.0}), "all")),
        ("none", scored_turns(weighed(), "none")),
    ):
        simulator = make_simulator(agents.spec, [agents.episode(0, num_requests=120)])
        run_kept(simulator, Kept(resolve_policy("mct"), rule, name))
        stored[name] = simulator.outcomes()["stored_bytes"].sum()
    assert stored["all"] == stored["lru"]
    assert stored["none"] < 0.9 * stored["lru"]
