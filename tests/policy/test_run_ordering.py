"""Orders inside the simulated engine: what they are told, and that they are obeyed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from servegym.baselines.ordering.registry import RULES, ordering_policy
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType, SloClass
from servegym.cluster.state import (
    DECISION,
    EV_PREEMPT,
    NEVER,
    PREEMPT,
    WHERE_IT_MATTERS,
    Asks,
)
from servegym.errors import ConfigError, PolicyError
from servegym.policy.learned_ordering import MlpOrdering, OrderingWeights
from servegym.policy.ordering import NUM_ORDERING_FEATURES, OrderingFeature, OrderingRule
from servegym.policy.play_perceptron import Perceptrons, play_perceptrons
from servegym.policy.run_ordering import (
    make_simulator,
    read_asked,
    run_ordering,
    time_orders,
)
from servegym.serve.vllm.config import PluginConfig
from servegym.serve.vllm.hints import hints
from servegym.serve.vllm.rows import RequestRows
from servegym.workloads.table import RequestTable

from ..cluster.strategies import random_grid  # noqa: TID252

RUNNING = int(OrderingFeature["IS_RUNNING"])
PROMPT = int(OrderingFeature["PROMPT_TOKENS"])
IDLE = int(OrderingFeature["IDLE_S"])
PREEMPTIONS = int(OrderingFeature["NUM_PREEMPTIONS"])
STEP = int(OrderingFeature["STEP_S"])
SLO = (SloClass("tight", 0.5, 0.05), SloClass("none"))


def make_case(seed: int, **changes) -> tuple[ClusterSpec, Episode]:
    """One engine that is short of blocks, and more requests than it can take."""
    rng = np.random.default_rng(seed)
    kind = ReplicaType(
        "t",
        random_grid(rng),
        num_blocks=40,
        max_num_batched_tokens=32,
        max_num_seqs=6,
        engine="vllm-priority",
    )
    n = 40
    spec = ClusterSpec((kind,), SLO, block_size=4, **changes)
    output = rng.integers(1, 50, n)
    table = RequestTable.build(
        np.cumsum(rng.exponential(0.05, n)),
        rng.permutation(n) + 5,  # all different: a prompt's length names the request
        output,
        predicted_output_tokens=np.maximum(output * np.exp(0.5 * rng.standard_normal(n)), 1.0),
        slo_class=rng.integers(0, 2, n).astype(np.int16),
    )
    return spec, Episode(table, np.zeros(1, np.int16), np.ones(1))


def by_hash(features: np.ndarray) -> np.ndarray:
    """Scores that change from step to step, the same for equal rows."""
    generated = features[:, int(OrderingFeature["GENERATED_TOKENS"])]
    return (features[:, PROMPT] * 7919.0 + generated * 104729.0) % 1009.0


class Watching:
    """An order that keeps what it is told."""

    name, information = "watching", "blind"

    def __init__(self, memory_size):
        self.memory_size = memory_size
        self.told = []

    def score(self, features, memory):
        self.told.append(features[np.argsort(features[:, PROMPT])].copy())
        return by_hash(features)


def told_by_the_plugin(spec, episode):
    """What the live plug-in would tell in the plain simulator, before every step."""
    table = episode.table
    live, told = {}, []
    kind = spec.types[0]
    rows = RequestRows(
        PluginConfig(),
        block_size=spec.block_size,
        max_num_batched_tokens=kind.max_num_batched_tokens,
        memory_size=0,
    )
    victims = [0] * len(table)

    def as_live(q):
        level = spec.slo_classes[table.slo_class[q.idx]]
        limits = (level.ttft_s, level.tpot_s) if level.name == "tight" else (None, None)
        given = live.setdefault(
            q.idx,
            SimpleNamespace(
                arrival_time=q.arrival_s,
                priority=int(table.slo_class[q.idx]),
                num_prompt_tokens=q.prompt,
                max_tokens=10**6,
                sampling_params=SimpleNamespace(
                    extra_args=hints(table.predicted_output_tokens[q.idx], *limits)
                ),
            ),
        )
        given.num_computed_tokens = q.computed
        given.num_output_tokens = q.generated
        given.num_preemptions = victims[q.idx]
        return given

    def order(engine):
        for event in engine.sim._events[order.seen :]:
            if event[4] == EV_PREEMPT:
                victims[event[2]] += 1
        order.seen = len(engine.sim._events)
        waiting = [Hashable(as_live(q)) for q in engine.waiting]
        running = [Hashable(as_live(q)) for q in engine.running]
        usage = 1.0 - len(engine.pool.free) / kind.num_blocks
        _, features, _ = rows.read(
            waiting, running, engine.sim.now_s, kv_cache_usage=usage, step_s=engine.step_s
        )
        told.append(features[np.argsort(features[:, PROMPT])].copy())
        scores = by_hash(features)
        for q, score in zip(engine.waiting + engine.running, scores, strict=True):
            q.key = float(score)

    order.seen = 0
    ReferenceSimulator(spec, episode, order=order, each_step=True).run(lambda *_: 0)
    return told


class Hashable:
    """A live request: hashed by whose it is, its fields read through."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __hash__(self):
        return id(self.inner)

    def __eq__(self, other):
        return self.inner is other.inner


@pytest.mark.parametrize("caching", [False, True])
def test_simulated_engine_tells_what_the_live_plugin_tells(caching):
    num_preempted = 0
    for seed in range(8):
        spec, episode = make_case(seed, prefix_caching=caching)
        watching = Watching(memory_size=1)
        run_ordering(make_simulator(spec, [episode], watching), watching)
        want = told_by_the_plugin(spec, episode)
        assert len(watching.told) == len(want)
        for got, live in zip(watching.told, want, strict=True):
            # the plug-in notices a preemption when it is asked next: idle since a step later
            again = live[:, PREEMPTIONS] > 0
            num_preempted += again.sum()
            assert (got[again, IDLE] >= live[again, IDLE] - 1e-9).all()
            got[again, IDLE] = live[again, IDLE]
            np.testing.assert_allclose(got, live, rtol=1e-9, atol=1e-9)
    assert num_preempted > 100


def play_picks(spec, episode, score):
    """Pick by score, one request at a time."""
    asks = Asks(dispatch=NEVER, admit=WHERE_IT_MATTERS, preempt=WHERE_IT_MATTERS)
    simulator = Simulator(spec, [episode], record=True, asks=asks)
    p, s = simulator.params, simulator.state
    picks = 0
    while simulator.advance()[0] == DECISION:
        rows, ids = read_rows(p, s)
        scores = score(rows)
        victims = s.env[0]["decision"] == PREEMPT
        arrival_s = s.request["arrival_s"][0, ids]
        order = np.lexsort((ids, arrival_s, scores))
        mine = [i for i in order if (rows[i, RUNNING] > 0) == victims]
        simulator.apply(np.array([ids[mine[-1] if victims else mine[0]]]))
        picks += 1
    return simulator, picks


def read_rows(p, s):
    v = s.replica[0, 0]
    n = int(v["num_waiting"] + v["num_running"])
    rows, ids, envs = np.empty((n, NUM_ORDERING_FEATURES)), np.empty(n, int), np.empty(n, int)
    read_asked(p, s, np.full(1, DECISION), rows, ids, envs)
    return rows, ids


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("text", ["srpt", "footprint", "edf", "fcfs"])
def test_picking_one_at_a_time_by_a_rule_is_to_follow_its_order(text, caching):
    rule = ordering_policy(text)
    total = 0
    for seed in range(6):
        spec, episode = make_case(seed, prefix_caching=caching)
        ordered = make_simulator(spec, [episode], rule, record=True)
        run_ordering(ordered, rule)
        picked, picks = play_picks(
            spec, episode, lambda rows: rule.score(rows, np.zeros((len(rows), 0)))
        )
        total += picks
        np.testing.assert_array_equal(picked.events(), ordered.events())
    assert total > 200


@pytest.mark.parametrize("text", RULES.names())
def test_every_order_serves_everybody_and_does_not_mind_its_neighbours(text):
    cases = [make_case(seed) for seed in range(3)]
    spec = cases[0][0]
    episodes = [episode for _, episode in cases]
    policy = ordering_policy(text)
    together = make_simulator(spec, episodes, policy)
    asked = run_ordering(together, policy)
    assert (asked > 0).all()
    for env, episode in enumerate(episodes):
        fate = together.outcomes(env)
        assert np.isfinite(fate["finish_s"]).all()
        assert (fate["first_token_s"] <= fate["finish_s"]).all()
        if text == "random":  # draws of one stream
            continue
        policy = ordering_policy(text)
        alone = make_simulator(spec, [episode], policy)
        assert run_ordering(alone, policy)[0] == asked[env]
        np.testing.assert_array_equal(alone.outcomes()["finish_s"], fate["finish_s"])


def test_an_oracle_is_told_the_truth():
    spec, episode = make_case(0)
    told = Watching(memory_size=0)
    told.information = "oracle"
    run_ordering(make_simulator(spec, [episode], told), told)
    true = dict(zip(episode.table.prompt_tokens, episode.table.output_tokens, strict=True))
    remaining = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])
    generated = int(OrderingFeature["GENERATED_TOKENS"])
    rows = np.concatenate(told.told)
    want = [true[int(row[PROMPT])] - row[generated] for row in rows]
    assert rows[:, remaining].tolist() == want


def test_shortest_first_is_faster_on_average_than_longest_first():
    longest = OrderingRule("longest", "predictive", lambda f, m, p: -by_remaining(f))
    means = {}
    for rule in (ordering_policy("srpt"), longest):
        cases = [make_case(seed) for seed in range(5)]
        simulator = make_simulator(cases[0][0], [episode for _, episode in cases], rule)
        run_ordering(simulator, rule)
        means[rule.name] = simulator.state.env["area"].sum()
    assert means["srpt"] < 0.7 * means["longest"]


def by_remaining(features):
    return features[:, int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_compiled_perceptrons_play_as_exported_ones_do(num_threads):
    rng = np.random.default_rng(0)
    spec, first = make_case(0)
    episodes = [first, make_case(1)[1]]
    mean = rng.normal(2.0, 1.0, NUM_ORDERING_FEATURES)
    scale = rng.uniform(0.5, 2.0, NUM_ORDERING_FEATURES)
    nets = Perceptrons(
        mean.astype(np.float32).astype(float),
        scale.astype(np.float32).astype(float),
        rng.normal(size=(3, NUM_ORDERING_FEATURES, 5)),
        rng.normal(size=(3, 5)),
        rng.normal(size=(3, 5, 2)),
    )
    together = play_perceptrons(spec, episodes, nets, num_threads)
    finish = {}
    for c in range(3):
        weights = OrderingWeights(
            mean.astype(np.float32),
            scale.astype(np.float32),
            (nets.hidden[c].astype(np.float32), nets.out[c].astype(np.float32)),
            (nets.hidden_bias[c].astype(np.float32), np.zeros(2, np.float32)),
        )
        policy = MlpOrdering(weights, information="predictive", name="net")
        alone = make_simulator(spec, episodes, policy)
        run_ordering(alone, policy)
        for env in range(2):
            finish[c, env] = alone.outcomes(env)["finish_s"]
            got = together.outcomes(2 * c + env)["finish_s"]
            np.testing.assert_array_equal(got, finish[c, env])
    assert (finish[0, 0] != finish[1, 0]).any()


def test_scores_that_are_not_finite_are_refused():
    spec, episode = make_case(0)
    rule = OrderingRule("broken", "blind", lambda f, m, p: np.full(len(f), np.nan))
    with pytest.raises(PolicyError, match=r"broken must give .* finite scores, got 0"):
        run_ordering(make_simulator(spec, [episode], rule), rule)


def test_orders_need_one_engine_that_goes_by_priorities():
    spec, episode = make_case(0)
    rule = ordering_policy("srpt")
    plain = replace(spec, types=(replace(spec.types[0], engine="vllm"),))
    two = replace(episode, type_idx=np.zeros(2, np.int16), speed=np.ones(2))
    for case in ((plain, episode), (spec, two)):
        with pytest.raises(ConfigError, match="one replica with engine: vllm-priority"):
            run_ordering(make_simulator(case[0], [case[1]], rule), rule)


def test_orders_are_timed():
    spec, episode = make_case(0)
    rule = ordering_policy("mlfq")
    taken = time_orders(rule, make_simulator(spec, [episode], rule), 20)
    assert len(taken) == 20
    assert (taken > 0).all()
