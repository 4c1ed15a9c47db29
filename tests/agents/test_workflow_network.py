"""The learned scheduler of jobs: base rules, the compiled rule against PyTorch, sizes, symmetry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from servegym.agents.workflow_features import (
    NUM_PAIR_FEATURES,
    NUM_STAGE_FEATURES,
    PAIR_FEATURES,
)
from servegym.agents.workflow_network import Graph, WorkflowNetwork, WorkflowNetworkConfig
from servegym.agents.workflow_policy import (
    EMBED,
    NUM_ROWS,
    ROW_BASE,
    ROW_FEATURES,
    ROW_STAGE,
    ROW_WIDTH,
    ROWS,
    WorkflowWeights,
    learned_rule,
)
from servegym.baselines.workflow.online.registry import online_rule
from servegym.errors import ConfigError
from servegym.train.workflow_arrays import as_graph, as_pairs
from servegym.train.workflow_rollout import play
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.run import begin, run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec
from servegym.workflow.online.state import DECISION, WAIT
from servegym.workflow_scenario import load_workflow_scenario

SCENARIOS = ("text-to-sql", "random-dags")


def linear(base: str = "none", **theta: float) -> WorkflowWeights:
    weights = np.zeros(NUM_PAIR_FEATURES)
    for name, value in theta.items():
        weights[PAIR_FEATURES.index(name)] = value
    return WorkflowWeights(base, 5.0, 2.0, weights)


def random_network(seed: int = 0, **settings) -> WorkflowNetwork:
    torch.manual_seed(seed)
    network = WorkflowNetwork(WorkflowNetworkConfig(hidden=12, tau_s=3.0, **settings))
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(std=0.3)
    return network


@pytest.fixture(scope="module")
def loaded():
    return {name: load_workflow_scenario(name) for name in SCENARIOS}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("base", ["srpt-cp", "sjf-cp", "edd"])
def test_untrained_network_is_its_base_action_for_action(loaded, name, base):
    scenario = loaded[name]
    load = 2.5 if name == "text-to-sql" else 1.0
    episodes = [scenario.episode(i, load=load, num_jobs=25) for i in range(3)]
    network = WorkflowNetwork(WorkflowNetworkConfig(base=base))
    want, got = Simulator(scenario.spec, episodes), Simulator(scenario.spec, episodes)
    run(want, online_rule(base))
    run(got, learned_rule(network.weights()))
    for column in ("device", "start_s", "finish_s"):
        np.testing.assert_array_equal(got.state.stage[column], want.state.stage[column])
    assert want.state.env["num_decisions"].sum() > 1000


def test_rank_base_takes_the_longest_way_first_where_it_ends_first():
    spec = FleetSpec((DeviceType("fast"), DeviceType("slow")))
    builder = JobBuilder("two", spec.task_types)
    builder.task(0, {"fast": 1.0, "slow": 2.0})
    long = builder.task(0, {"fast": 1.0, "slow": 2.0})
    builder.edge(long, builder.task(1, {"fast": 5.0, "slow": 5.0}))
    simulator = Simulator(spec, [Episode.of([builder.build()], [1, 0])])
    policy = learned_rule(linear("rank"))
    begin(simulator, policy)
    simulator.advance()
    assert policy.act(simulator, np.zeros(1, np.int64)).tolist() == [1 * 2 + 1]


def test_trained_network_is_not_its_base(loaded):
    scenario = loaded["random-dags"]
    episodes = [scenario.episode(0, num_jobs=10)]
    starts = []
    for weights in (linear("srpt-cp"), random_network(base="srpt-cp").weights()):
        simulator = Simulator(scenario.spec, episodes)
        run(simulator, learned_rule(weights))
        starts.append(simulator.state.stage["start_s"])
    assert not np.array_equal(*starts)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("message_passing", [True, False])
def test_compiled_rule_scores_as_pytorch_does(loaded, name, message_passing):
    # the rule's choice, drawn without noise, is the greatest of PyTorch's scores and 0
    scenario = loaded[name]
    network = random_network(message_passing=message_passing)
    with torch.no_grad():
        network.theta.weight[0, 0] = 2.0
    episodes = [scenario.episode(i, load=1.5, num_jobs=8) for i in range(2)]
    played = play(
        scenario.spec, episodes, learned_rule(network.weights()), objective="jct", tau_s=3.0
    )
    checked = waits = 0
    for one in played:
        with torch.no_grad():
            scores = network.scores(as_pairs([one]), as_graph([one])).numpy()
        for t, choice in enumerate(one.chosen.tolist()):
            mine = scores[one.first[t] : one.first[t + 1]]
            best = mine.max()
            if choice == len(mine):
                assert best <= 1e-3
                waits += 1
            else:
                assert mine[choice] >= best - 1e-3
                assert mine[choice] >= -1e-3 or not one.may_wait[t]
            checked += 1
    assert checked > 200
    assert waits > 0


def test_exported_form_scores_as_the_one_that_learns(loaded):
    scenario = loaded["random-dags"]
    network = random_network(1)
    (one,) = play(
        scenario.spec,
        [scenario.episode(3, num_jobs=4)],
        learned_rule(network.weights()),
        objective="jct",
        tau_s=3.0,
    )
    pairs, graph = as_pairs([one]), as_graph([one])
    stages = torch.from_numpy(one.stages)
    children = torch.zeros(len(stages), len(stages))
    children[graph.parent, graph.child] = 1.0
    members = torch.zeros(graph.num_jobs, len(stages))
    members[graph.job, graph.member] = 1.0
    members /= members.sum(-1, keepdim=True)
    with torch.no_grad():
        want = network.scores(pairs, graph)
        for t in (0, 5, len(one.chosen) - 1):
            mine = slice(int(one.first[t]), int(one.first[t + 1]))
            got = network(
                pairs.features[mine],
                pairs.base[mine],
                pairs.stage[mine],
                pairs.job[mine],
                stages,
                children,
                members,
            )
            torch.testing.assert_close(got, want[mine], rtol=1e-4, atol=1e-4)


def test_messages_go_from_children_to_parents_by_hand():
    network = random_network(2)
    # 0 -> 1 -> 2 and 0 -> 2: the embedding of 2 has no messages, that of 0 has two
    stages = torch.randn(3, NUM_STAGE_FEATURES)
    graph = Graph(
        stages,
        torch.tensor([0, 0, 1]),
        torch.tensor([1, 2, 2]),
        3,
        torch.arange(3),
        torch.zeros(3, dtype=torch.int64),
        1,
    )
    own = network.embed_own(stages)
    two = torch.relu(own[2])
    one = torch.relu(own[1] + network.embed_sum(torch.relu(network.embed_child(two))))
    messages = torch.relu(network.embed_child(one)) + torch.relu(network.embed_child(two))
    zero = torch.relu(own[0] + network.embed_sum(messages))
    torch.testing.assert_close(network.embed(graph), torch.stack((zero, one, two)))
    assert (zero != torch.relu(own[0])).any()


def test_features_by_hand():
    spec = FleetSpec((DeviceType("fast"), DeviceType("slow")))
    builder = JobBuilder("chain", spec.task_types)
    first = builder.task(0, {"fast": 1.0, "slow": 3.0})
    builder.edge(first, builder.task(1, {"fast": 2.0, "slow": 6.0}))
    simulator = Simulator(spec, [Episode.of([builder.build(deadline_s=12.0)], [0, 1])])
    policy = learned_rule(linear("none", one=1.0))
    begin(simulator, policy)
    simulator.advance()
    policy.act(simulator, np.zeros(1, np.int64))
    memory = policy.memory[0]
    assert memory[NUM_ROWS] == 2

    def feature(row: int, name: str) -> float:
        at = ROWS + row * ROW_WIDTH + ROW_FEATURES
        return float(memory[at + PAIR_FEATURES.index(name)])

    def units(x_s: float) -> float:
        return pytest.approx(math.log1p(8 * x_s / 2.0))

    assert memory[ROWS + ROW_STAGE] == 0
    assert memory[ROWS + ROW_BASE] == 0
    for row, (finish, regret) in enumerate([(1.0, 0.0), (3.0, 2.0)]):
        assert feature(row, "job_work_left") == units(2.0 + 4.0)  # means over the two devices
        assert feature(row, "rank") == units(6.0)
        assert feature(row, "mean") == units(2.0)
        assert feature(row, "slack") == pytest.approx((12.0 - 6.0) / 6.0)
        assert feature(row, "finish") == units(finish)
        assert feature(row, "regret") == units(regret)
        assert feature(row, "is_best") == (regret == 0.0)
        assert feature(row, "stages_behind") == pytest.approx(math.log(2.0))
        assert feature(row, "queue") == units(2.0 / 2)
        assert feature(row, "load") == units(6.0 / 2)
        assert feature(row, "is_idle") == 1.0


def test_alike_stages_have_one_row():
    spec = FleetSpec((DeviceType("any"),))
    builder = JobBuilder("fan", spec.task_types)
    root = builder.task(0, {"any": 1.0})
    for length in (2.0, 2.0, 2.0, 3.0):
        builder.edge(root, builder.task(1, {"any": length}))
    simulator = Simulator(spec, [Episode.of([builder.build()], [0])])
    policy = learned_rule(linear("rank"))
    begin(simulator, policy)
    rows = []
    while simulator.advance()[0] == DECISION:
        action = policy.act(simulator, np.zeros(1, np.int64))
        rows.append(int(policy.memory[0][NUM_ROWS]))
        simulator.apply(action)
    assert rows == [1, 2, 1, 1, 1]  # the root; then 3 s and one of three; the three in turn


def test_waiting_is_chosen_below_zero_and_never_without_a_start():
    spec = FleetSpec((DeviceType("any", slots=4),))
    jobs = []
    for _ in range(3):
        builder = JobBuilder("one", spec.task_types)
        builder.task(0, {"any": 1.0})
        jobs.append(builder.build())
    simulator = Simulator(spec, [Episode.of(jobs, [0])])
    policy = learned_rule(linear("none", one=-1.0))
    begin(simulator, policy)
    actions = []
    while simulator.advance()[0] == DECISION:
        actions.append(int(policy.act(simulator, np.zeros(1, np.int64))[0]))
        simulator.apply(np.array(actions[-1:]))
    # one after the other, though all three could run at once
    assert actions == [0, WAIT, 1, WAIT, 2]
    assert simulator.jobs()["finish_s"].tolist() == [1.0, 2.0, 3.0]


def test_draws_follow_the_softmax():
    spec = FleetSpec((DeviceType("a"), DeviceType("b")))
    builder = JobBuilder("one", spec.task_types)
    builder.task(0, {"a": 1.0, "b": 3.0})
    episodes = [Episode.of([builder.build()], [0, 1])] * 400
    simulator = Simulator(spec, episodes)
    policy = learned_rule(linear("none", is_best=1.0), sample=True)
    begin(simulator, policy, seed=1)
    simulator.advance()
    actions = policy.act(simulator, np.arange(400))
    share = math.e / (1.0 + math.e)  # nothing runs, so it cannot wait
    assert (actions == 0).mean() == pytest.approx(share, abs=3 * math.sqrt(share / 4 / 400))


def test_weights_of_another_shape_are_refused():
    theta = np.zeros(NUM_PAIR_FEATURES)
    with pytest.raises(ConfigError, match="base must be one of none, srpt-cp"):
        WorkflowWeights("fifo", 1.0, 1.0, theta)
    with pytest.raises(ConfigError, match="tau_s above 0"):
        WorkflowWeights("none", 1.0, 0.0, theta)
    with pytest.raises(ConfigError, match=r"theta .* must be finite numbers of shape"):
        WorkflowWeights("none", 1.0, 1.0, theta[1:])
    with pytest.raises(ConfigError, match="at most 64 units"):
        WorkflowWeights("none", 1.0, 1.0, theta, bias=np.zeros(65))
    with pytest.raises(ConfigError, match=f"embeddings have {EMBED} numbers or none"):
        WorkflowWeights("none", 1.0, 1.0, theta, embed_bias=np.zeros(3))
