"""Episodes whose ended turns are decided by weights: in compiled code, and one by one."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION, DROP, KEEP, LEAVE, OFFLOAD, RETAIN
from servegym.policy.retention import Kept, RetentionRule
from servegym.policy.run_kept import Turns, make_simulator, run_kept
from servegym.policy.turn_memory import MOST_GAPS
from servegym.policy.turn_scores import NUM_TURN_TERMS, TurnWeights, scored_turns
from servegym.scenario import load_scenario

from ..cluster.strategies import (  # noqa: TID252 - tests are no package
    random_case,
    with_conversations,
    with_tiers,
)


def random_turns(seed: int) -> tuple[ClusterSpec, Episode]:
    """Draw a cluster whose requests go on from the texts of others, and what runs between them."""
    case = with_conversations(*random_case(seed), seed)
    spec, episode = with_tiers(*case, seed) if seed % 3 else case
    tool = np.random.default_rng((seed, 10)).integers(-1, 2, len(episode.table))
    table = replace(episode.table, tool=tool.astype(np.int16))
    return spec, replace(episode, table=table)


def random_rule(seed: int) -> RetentionRule:
    weights = np.random.default_rng((seed, 11)).normal(size=(4, NUM_TURN_TERMS))
    return scored_turns(TurnWeights(*weights), "random weights")


def counted(rule: RetentionRule, answers: Counter[int]) -> RetentionRule:
    """The same rule, asked turn by turn, whose answers are counted."""

    def retain(turn):
        answer, keep_s = rule.retain(turn)
        answers[answer] += 1
        return answer, keep_s

    return replace(rule, retain=retain, weights=None)


@pytest.mark.parametrize("dispatch", ["added-delay", "random"])
def test_compiled_code_decides_as_turns_that_are_asked_about_one_by_one(dispatch):
    answers: Counter[int] = Counter()
    for seed in range(40):
        spec, episode = random_turns(seed)
        rule, played = random_rule(seed), []
        for one in (rule, counted(rule, answers)):
            simulator = make_simulator(spec, [episode, episode], record=True)
            run_kept(simulator, Kept(policy(dispatch), one, "kept"), seed=seed)
            played.append(simulator)
        for env in range(2):
            fast, slow = (simulator.outcomes(env) for simulator in played)
            assert fast.tobytes() == slow.tobytes()
            fast, slow = (simulator.events(env) for simulator in played)
            np.testing.assert_array_equal(fast, slow)
    assert all(answers[answer] > 50 for answer in (DROP, LEAVE, OFFLOAD, KEEP)), answers


def test_a_turn_has_the_latest_gaps_of_its_tool_and_the_time_of_its_steps():
    agents = load_scenario("agents-tiers")
    scenario = agents.model_copy(update={"fleet": (agents.fleet[0],)})
    episode = scenario.episode(0, load=2.0, num_requests=1300)
    table = replace(episode.table, tool=(episode.table.tool % 2).astype(np.int16))
    simulator = make_simulator(scenario.spec, [replace(episode, table=table)])
    turns, seen, most = Turns(simulator), 0, 0
    ended: list[int] = []
    gaps_s: dict[int, list[float]] = defaultdict(list)
    kind = scenario.spec.types[0]
    budget = kind.max_num_batched_tokens
    ends = np.arange(65) * budget
    steps_s = [kind.grid.step_s([(budget, begin)]) for begin in ends[:-1].tolist()]
    while simulator.advance()[0] == DECISION:
        env, request = simulator.state.env[0], simulator.state.request[0]
        if env["decision"] != RETAIN:
            simulator.apply(np.array([seen % 2]))
            continue
        turn, now_s, due = turns.due(0, tell=True), float(env["now_s"]), int(env["deciding"])
        for i in list(ended):  # those that have come, in the order in which their turns ended
            if request[i]["arrival_s"] <= now_s:
                ended.remove(i)
                gap_s = float(request[i]["arrival_s"] - request[table.after[i]]["finish_s"])
                gaps_s[int(table.tool[i])].append(gap_s)
        following = np.flatnonzero(table.after == due)
        ended.append(int(following[0]))
        assert turn.tool == table.tool[following[0]]
        assert turn.gaps_s.tolist() == gaps_s[turn.tool][-MOST_GAPS:]
        assert turn.back_s == table.delay_s[following].min()
        assert turn.recompute_s == np.interp(
            turn.kept_tokens, ends, np.concatenate(([0.0], np.cumsum(steps_s)))
        )
        seen, most = seen + 1, max(most, len(gaps_s[turn.tool]))
        simulator.apply(np.array([OFFLOAD]))
    assert most > MOST_GAPS
