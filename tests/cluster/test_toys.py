"""Episodes small enough to be computed by hand; both programs must get every timestamp right.

Unless a test says otherwise, a step lasts 1 s, 0.1 s per token in it, 0.01 s per pair of a
prefilled token and a token of its context, and 0.001 s per KV token the decodes attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from servegym.cluster.outcome import outcomes_from_events
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Faults, ReplicaType
from servegym.cluster.state import (
    DECISION,
    FAULT_DOWN,
    FAULT_UP,
)
from servegym.costs.grid import (
    CostGrid,
)
from servegym.errors import ConfigError, InvalidAction
from servegym.workloads.table import RequestTable

from ..toys import linear_grid  # noqa: TID252 - tests are no package

#: Actions of each request, visit by visit; replica 0 where nothing is said.
Script = Mapping[int, Sequence[int]]


def replica_type(
    grid: CostGrid | None = None, *, num_blocks: int = 64, budget: int = 64, seqs: int = 8
) -> ReplicaType:
    """Make a toy engine."""
    return ReplicaType("toy", grid or linear_grid(), num_blocks, budget, seqs)


def toy_cluster(*types: ReplicaType, block_size: int = 4, **rules: object) -> ClusterSpec:
    """Make a cluster of toy engines."""
    return ClusterSpec(types or (replica_type(),), block_size=block_size, **rules)


def toy_episode(
    requests: Sequence[tuple[float, int, int]],
    *,
    texts: Sequence[tuple[int, int]] = (),
    type_idx: Sequence[int] = (0,),
    speed: Sequence[float] | None = None,
    faults: Sequence[tuple[float, int, int, float]] = (),
    noise_seed: int = 0,
) -> Episode:
    """Make an episode of `(arrival_s, prompt, output)` rows.

    Each request may have one prefix segment `(key, end)` in `texts`.
    """
    arrival, prompt, output = zip(*requests, strict=True)
    table = RequestTable.build(
        np.array(arrival, float),
        np.array(prompt),
        np.array(output),
        prefix_offsets=np.arange(len(arrival) + 1) if texts else None,
        prefix_keys=np.array([key for key, _ in texts], np.int64),
        prefix_ends=np.array([end for _, end in texts], np.int32),
    )
    time_s, replica, kind, value = zip(*faults, strict=True) if faults else ((), (), (), ())
    return Episode(
        table,
        np.array(type_idx, np.int16),
        np.array(speed or [1.0] * len(type_idx)),
        Faults(
            np.array(time_s, float),
            np.array(replica, np.int16),
            np.array(kind, np.int8),
            np.array(value, float),
        ),
        noise_seed,
    )


def bits(array: np.ndarray) -> list[bytes]:
    """Return the values of an array bit by bit, without the padding between its fields."""
    return [array[name].tobytes() for name in array.dtype.names or ()] or [array.tobytes()]


@dataclass
class Played:
    """What became of an episode, and which request was decided when."""

    outcomes: np.ndarray
    decided: list[tuple[float, int]]


def follow(script: Script, decided: list[tuple[float, int]], now_s: float, request: int) -> int:
    visit = sum(seen == request for _, seen in decided)
    decided.append((now_s, request))
    actions = script.get(request, ())
    return actions[visit] if visit < len(actions) else 0


def play_compiled(spec: ClusterSpec, episode: Episode, script: Script) -> Played:
    sim = Simulator(spec, [episode], record=True)
    decided: list[tuple[float, int]] = []
    while sim.advance()[0] == DECISION:
        env = sim.state.env[0]
        sim.apply(np.array([follow(script, decided, float(env["now_s"]), int(env["deciding"]))]))
    return Played(sim.outcomes(), decided)


def play_plain(spec: ClusterSpec, episode: Episode, script: Script) -> Played:
    sim = ReferenceSimulator(spec, episode)
    decided: list[tuple[float, int]] = []
    sim.run(lambda s, request: follow(script, decided, s.now_s, request))
    return Played(outcomes_from_events(sim.events(), episode.table), decided)


Play = Callable[[ClusterSpec, Episode, Script], Played]


@pytest.fixture(params=[play_compiled, play_plain], ids=["compiled", "plain"])
def play(request: pytest.FixtureRequest) -> Play:
    return request.param


def assert_times(played: Played, **columns: Sequence[float]) -> None:
    for name, expected in columns.items():
        assert played.outcomes[name] == pytest.approx(expected, rel=1e-12), name


def test_one_request_prefills_then_decodes(play):
    played = play(toy_cluster(), toy_episode([(0, 10, 3)]), {})
    # prefill 1 + 10 * 0.1 = 2; decodes 1 + 0.1 + 0.001 * 11 and 1 + 0.1 + 0.001 * 12
    assert_times(played, scheduled_s=[0], first_token_s=[2], finish_s=[2 + 1.111 + 1.112])


def test_a_request_of_one_output_token_never_decodes(play):
    played = play(toy_cluster(), toy_episode([(0.5, 10, 1)]), {})
    assert_times(played, scheduled_s=[0.5], first_token_s=[2.5], finish_s=[2.5])


def test_a_replica_twice_as_fast_takes_half_the_time(play):
    played = play(toy_cluster(), toy_episode([(0, 10, 3)], speed=[2.0]), {})
    assert_times(played, first_token_s=[1], finish_s=[(2 + 1.111 + 1.112) / 2])


def test_requests_that_arrive_together_share_every_step(play):
    played = play(toy_cluster(), toy_episode([(0, 10, 3), (0, 10, 3)]), {})
    # prefill 1 + 20 * 0.1 = 3; decodes 1 + 0.2 + 0.001 * 22 and 1 + 0.2 + 0.001 * 24
    assert_times(played, first_token_s=[3, 3], finish_s=[3 + 1.222 + 1.224] * 2)


@pytest.mark.parametrize(
    ("arrival_s", "scheduled_s", "first_token_s", "finish_s"),
    [
        # in the prefill of the first, which ends at 2. Then 1 decode (kv 11) + 10 prefilled:
        # 1 + 1.1 + 0.011 = 2.111; two decodes (kv 12 + 11): 1.223; one decode (kv 12): 1.112
        (0.5, 2, 4.111, [5.334, 6.446]),
        # in the first decode of the first, which ends at 3.111. Then 1 decode (kv 12) + 10
        # prefilled: 2.112; the first ends; decodes of kv 11 and 12: 1.111 and 1.112
        (2.5, 3.111, 5.223, [5.223, 7.446]),
        # at the very end of the prefill: the decode of the first has begun by then
        (2.0, 3.111, 5.223, [5.223, 7.446]),
    ],
)
def test_a_late_request_joins_at_the_next_step(
    play, arrival_s, scheduled_s, first_token_s, finish_s
):
    played = play(toy_cluster(), toy_episode([(0, 10, 3), (arrival_s, 10, 3)]), {})
    assert_times(
        played,
        scheduled_s=[0, scheduled_s],
        first_token_s=[2, first_token_s],
        finish_s=finish_s,
    )


def test_running_requests_take_the_budget_first_and_a_prompt_gets_the_rest_in_chunks(play):
    played = play(
        toy_cluster(replica_type(budget=4, seqs=4)), toy_episode([(0, 2, 4), (0, 6, 1)]), {}
    )
    # 1. 2 + chunk 2:                              1.4                  -> 1.4, the first emits
    # 2. decode (kv 3) + chunk 3 over 2:           1.4 + 0.06 + 0.003   -> 2.863
    # 3. decode (kv 4) + chunk 1 over 5:           1.2 + 0.05 + 0.004   -> 4.117, the second ends
    # 4. decode (kv 5):                            1.1 + 0.005          -> 5.222
    assert_times(played, scheduled_s=[0, 0], first_token_s=[1.4, 4.117], finish_s=[5.222, 4.117])


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_holds_it_whole(play):
    spec = toy_cluster(replica_type(budget=8), chunked_prefill=False)
    played = play(spec, toy_episode([(0, 5, 2), (0, 4, 2)]), {})
    # 1. prefill 5 (4 more do not fit in 8): 1.5
    # 2. decode (kv 6) + prefill 4: 1.506; 3. decode (kv 5): 1.105
    assert_times(played, scheduled_s=[0, 1.5], first_token_s=[1.5, 3.006], finish_s=[3.006, 4.111])


def test_max_num_seqs_keeps_the_rest_of_the_queue_waiting(play):
    spec = toy_cluster(replica_type(seqs=2))
    played = play(spec, toy_episode([(0, 10, 1), (0, 10, 1), (0, 10, 1)]), {})
    assert_times(played, scheduled_s=[0, 0, 3], finish_s=[3, 3, 5])


def test_the_last_running_request_is_preempted_and_computed_anew(play):
    spec = toy_cluster(replica_type(num_blocks=2))
    played = play(spec, toy_episode([(0, 4, 2), (0, 2, 3)]), {})
    # 1. prefill 4 and 2, one block each: 1.6
    # 2. the first needs a second block, the second request gives its own: kv 5, 1.105 -> 2.705
    # 3. prefill 2 + 1 tokens again: 1.3 -> 4.005; 4. decode kv 4: 1.104 -> 5.109
    assert_times(played, first_token_s=[1.6, 1.6], finish_s=[2.705, 5.109])
    assert played.outcomes["num_preemptions"].tolist() == [0, 1]


def test_a_step_that_preempts_admits_nobody_and_the_victim_goes_first(play):
    spec = toy_cluster(replica_type(num_blocks=3, budget=4, seqs=4))
    played = play(spec, toy_episode([(0, 3, 5), (0, 3, 4), (3, 1, 1)]), {})
    # 1. A 3, B chunk 1:                           1.4                  -> 1.4, A emits
    # 2. A decode (kv 4), B chunk 2 over 1:        1.3 + 0.02 + 0.004   -> 2.724, B emits
    # 3. A (kv 5, takes the last block), B (kv 4): 1.2 + 0.009          -> 3.933
    # 4. A (kv 6); B needs a block and preempts itself, which frees one. Budget and that block
    #    would hold all of C, but the step admits nobody: 1.1 + 0.006   -> 5.039
    # 5. A (kv 7); B's 5 tokens do not fit whole, C stays behind it:    -> 6.146, A ends
    # 6. B chunk 4 of 5, C lacks budget:           1.4                  -> 7.546
    # 7. B chunk 1 over 4, C 1:                    1.2 + 0.04           -> 8.786, C ends
    # 8. B (kv 6):                                 1.1 + 0.006          -> 9.892
    assert_times(
        played,
        scheduled_s=[0, 0, 7.546],
        first_token_s=[1.4, 2.724, 8.786],
        finish_s=[6.146, 9.892, 8.786],
    )
    assert played.outcomes["num_preemptions"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("shared", "prompt", "cached"),
    [
        (12, 13, 12),  # three blocks of 4, one token left to compute
        (12, 12, 8),  # the block of the last token is computed although it is there
        (12, 9, 8),
        (12, 8, 4),
        (12, 4, 0),
        (10, 13, 8),  # the text differs in the third block
        (3, 13, 0),
    ],
)
def test_a_prefix_hit_is_whole_blocks_and_never_the_last_token(play, shared, prompt, cached):
    spec = toy_cluster(prefix_caching=True)
    played = play(
        spec, toy_episode([(0, 12, 1), (100, prompt, 1)], texts=[(1, shared), (1, shared)]), {}
    )
    assert played.outcomes["cached_tokens"].tolist() == [0, cached]
    rest = prompt - cached
    assert_times(played, finish_s=[2.2, 100 + 1 + 0.1 * rest + 0.01 * rest * cached])


def test_different_texts_share_nothing(play):
    spec = toy_cluster(prefix_caching=True)
    played = play(spec, toy_episode([(0, 12, 1), (100, 13, 1)], texts=[(1, 12), (2, 12)]), {})
    assert played.outcomes["cached_tokens"].tolist() == [0, 0]


def test_a_request_hits_what_another_fills_in_the_same_step(play):
    spec = toy_cluster(prefix_caching=True)
    played = play(spec, toy_episode([(0, 12, 1), (0, 12, 1)], texts=[(1, 12), (1, 12)]), {})
    assert played.outcomes["cached_tokens"].tolist() == [0, 8]
    # 12 + 4 tokens, the 4 over a context of 8: 1 + 1.6 + 0.32
    assert_times(played, finish_s=[2.92, 2.92])


@pytest.mark.parametrize(("output", "cached"), [(7, 12), (6, 8)])
def test_a_later_turn_hits_the_output_of_an_earlier_one(play, output, cached):
    # the last output token is never computed: 6 + 7 - 1 tokens fill three blocks, 6 + 6 - 1 two
    spec = toy_cluster(prefix_caching=True)
    played = play(spec, toy_episode([(0, 6, output), (100, 13, 1)], texts=[(1, 12), (1, 12)]), {})
    assert played.outcomes["cached_tokens"].tolist() == [0, cached]


@pytest.mark.parametrize(
    ("before", "probe", "cached"),
    [
        # a replica of 4 blocks; texts A and B fill two each, C takes what was used least recently
        ([("A", 8), ("B", 8), ("C", 4)], "A", 4),  # within a request the later blocks go first
        ([("A", 8), ("B", 8), ("C", 4)], "B", 8),
        ([("A", 8), ("B", 8), ("C", 8)], "A", 0),
        ([("A", 8), ("B", 8), ("C", 8)], "B", 8),
        ([("A", 8), ("B", 8), ("C", 12)], "B", 4),
        ([("A", 8), ("B", 8), ("C", 16)], "B", 0),
        ([("A", 8), ("B", 8), ("A", 8), ("C", 8)], "A", 8),  # a hit makes A more recent than B
        ([("A", 8), ("B", 8), ("A", 8), ("C", 8)], "B", 0),
    ],
)
def test_the_least_recently_used_blocks_are_evicted_first(play, before, probe, cached):
    sequence = [*before, (probe, 9)]
    spec = toy_cluster(replica_type(num_blocks=4), prefix_caching=True)
    requests = [(100.0 * i, prompt, 1) for i, (_, prompt) in enumerate(sequence)]
    texts = [(ord(text), 16) for text, _ in sequence]
    played = play(spec, toy_episode(requests, texts=texts), {})
    assert played.outcomes["cached_tokens"][-1] == cached


@pytest.mark.parametrize("simulator", [lambda s, e: Simulator(s, [e]), ReferenceSimulator])
def test_a_request_larger_than_every_replica_is_refused(simulator):
    spec = toy_cluster(replica_type(num_blocks=4))
    simulator(spec, toy_episode([(0, 10, 7)]))  # 16 tokens fill the 4 blocks exactly
    with pytest.raises(ConfigError, match="request 0 needs 17 KV tokens"):
        simulator(spec, toy_episode([(0, 10, 8)]))


def test_a_request_may_only_go_where_it_fits():
    spec = toy_cluster(replica_type(num_blocks=4), replica_type(num_blocks=5))
    sim = Simulator(spec, [toy_episode([(0, 10, 8)], type_idx=[0, 1])])
    sim.advance()
    with pytest.raises(InvalidAction, match=r"choose one of \[1\]"):
        sim.apply(np.array([0]))
    sim.apply(np.array([1]))
    sim.advance()
    assert sim.outcomes()["replica"].tolist() == [1]


@pytest.mark.parametrize("answers", [[], [0, 0], [[0]]])
def test_another_number_of_answers_than_environments_is_refused(answers):
    sim = Simulator(toy_cluster(replica_type()), [toy_episode([(0, 10, 4)], type_idx=(0, 0))])
    assert sim.advance()[0] == DECISION
    wanted = r"answers must have shape \(1,\), one per environment, got \("
    with pytest.raises(InvalidAction, match=wanted):
        sim.apply(np.array(answers))


def test_a_request_waits_unasked_while_all_that_could_hold_it_are_down(play):
    spec = toy_cluster(replica_type(num_blocks=4), replica_type(num_blocks=5), hold_s=1.5)
    faults = [(0, 1, FAULT_DOWN, 0), (4, 1, FAULT_UP, 0)]
    played = play(spec, toy_episode([(1, 10, 8)], type_idx=[0, 1], faults=faults), {0: [1]})
    assert played.decided == [(4.0, 0)]  # tried at 1, 2.5 and 4, when the replica is back
    assert played.outcomes["num_holds"].tolist() == [2]


def test_a_request_of_a_failed_replica_goes_on_elsewhere_with_its_tokens(play):
    faults = [(3.5, 0, FAULT_DOWN, 0), (50, 0, FAULT_UP, 0)]
    episode = toy_episode([(0, 10, 4)], type_idx=[0, 0], faults=faults)
    played = play(toy_cluster(), episode, {0: [0, 1]})
    # prefill to 2, decode to 3.111, the next decode is lost; then prefill 10 + 2 tokens: 2.2
    # -> 5.7 with the third token; decode of kv 13: 1.113 -> 6.813
    assert_times(played, dispatch_s=[3.5], scheduled_s=[0], first_token_s=[2], finish_s=[6.813])
    assert played.outcomes["replica"].tolist() == [1]
    assert played.outcomes["num_restarts"].tolist() == [1]


def test_a_step_that_ends_as_its_replica_fails_still_counts(play):
    faults = [(2.0, 0, FAULT_DOWN, 0), (50, 0, FAULT_UP, 0)]
    episode = toy_episode([(0, 10, 1), (0.5, 10, 1)], type_idx=[0, 0], faults=faults)
    played = play(toy_cluster(), episode, {1: [0, 1]})
    assert_times(played, finish_s=[2, 4])
    assert played.outcomes["num_restarts"].tolist() == [0, 1]


def test_returned_requests_are_decided_before_held_ones_and_these_before_arrivals(play):
    spec = toy_cluster(replica_type(seqs=1), allow_hold=True, hold_s=0.75)
    faults = [(1.0, 0, FAULT_DOWN, 0), (50, 0, FAULT_UP, 0)]
    requests = [(0, 10, 1), (0, 10, 1), (0.25, 10, 1), (1.0, 10, 1)]
    episode = toy_episode(requests, type_idx=[0, 0], faults=faults)
    played = play(spec, episode, {0: [0, 1], 1: [0, 1], 2: [2, 1], 3: [1]})  # 2 holds
    assert played.decided[3:] == [(1.0, 0), (1.0, 1), (1.0, 2), (1.0, 3)]
    assert_times(played, finish_s=[3, 5, 7, 9])


def test_a_held_request_is_decided_again_after_the_hold(play):
    spec = toy_cluster(allow_hold=True, hold_s=0.25)
    played = play(spec, toy_episode([(1, 10, 1)]), {0: [1, 1, 0]})  # 1 holds
    assert played.decided == [(1.0, 0), (1.25, 0), (1.5, 0)]
    assert_times(played, arrival_s=[1], dispatch_s=[1.5], finish_s=[3.5])
    assert played.outcomes["num_holds"].tolist() == [2]


def test_a_rejected_request_leaves_at_once_and_costs_nothing(play):
    spec = toy_cluster(allow_reject=True)
    played = play(spec, toy_episode([(1, 10, 3), (1, 10, 1)]), {0: [2]})  # 2 rejects
    assert played.outcomes["rejected"].tolist() == [True, False]
    assert played.outcomes["replica"].tolist() == [-1, 0]
    assert_times(played, finish_s=[1, 3])
    assert np.isnan(played.outcomes["first_token_s"][0])


@pytest.mark.parametrize("action", [-1, 1, 2, 3, 10**9])  # 1 would hold, 2 reject
def test_an_action_that_is_not_allowed_is_refused_and_nothing_happens(action):
    spec, episode = toy_cluster(), toy_episode([(0, 10, 1)])
    sim = Simulator(spec, [episode, episode])
    sim.advance()
    before = sim.snapshot()
    with pytest.raises(InvalidAction, match=r"of environment 1 .* choose one of \[0\] \(1 holds"):
        sim.apply(np.array([0, action]))
    assert [bits(array) for array in sim.state] == [bits(array) for array in before.state]


def test_a_replica_that_is_down_is_not_allowed():
    faults = [(0.5, 0, FAULT_DOWN, 0), (5, 0, FAULT_UP, 0)]
    sim = Simulator(toy_cluster(), [toy_episode([(1, 10, 1)], type_idx=[0, 0], faults=faults)])
    sim.advance()
    with pytest.raises(InvalidAction, match=r"choose one of \[1\]"):
        sim.apply(np.array([0]))


def test_one_second_later_everything_happens_one_second_later(play):
    spec = toy_cluster(replica_type(num_blocks=3, budget=4, seqs=4))
    episode = toy_episode([(0, 3, 5), (0, 3, 4), (3, 1, 1)])
    later = replace(episode, table=replace(episode.table, arrival_s=episode.table.arrival_s + 1))
    shifted = play(spec, later, {}).outcomes
    for column in ("dispatch_s", "scheduled_s", "first_token_s", "finish_s"):
        expected = play(spec, episode, {}).outcomes[column] + 1
        assert shifted[column] == pytest.approx(expected, rel=1e-12)
