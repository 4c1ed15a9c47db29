"""The untrained network is its base rule, action for action, on real episodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from servegym.agents.features import base_cost
from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.agents.torch_policy import TorchPolicy
from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.policy.contract import (
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.costs import (
    BASES,
    HELD_BASES,
    INFERRED_BASES,
    added_delay_s,
    delay_s,
    load_by_speed,
    prefix_load_s,
    step_s,
)
from servegym.policy.policy import Observations
from servegym.policy.run import run
from servegym.scenario import load_scenario

HELD = "added-delay-held:prefill=2,decode=0.3,wait=0.02,most=0.22,shrink=0.5"
RULES = (
    *(base for base in BASES if base not in HELD_BASES),
    "speed-family:eta=0.5",
    "prefix-load:weight=0.3,eta=0.7",
    "added-delay:prefill=3,decode=0.2",
    "added-delay-inferred:prefill=3,decode=0.2,shrink=0.5,observed=0.7,displaced=20",
)


def network_on(rule, **settings) -> DispatchNetwork:
    base = rule.name.partition(":")[0]
    return DispatchNetwork(
        NetworkConfig(
            base=base,
            base_params=tuple(rule.params.tolist()),
            extended=base in INFERRED_BASES,
            **settings,
        )
    )


class Twins:
    """Acts as the rule does and counts how often the network would not."""

    name, information = "twins", "predictive"

    def __init__(self, rule, network: DispatchNetwork) -> None:
        self.rule, self.learned = rule, TorchPolicy(network)
        self.needs = self.learned.needs
        self.num_decisions = self.num_different = 0
        self.chosen: set[int] = set()

    def reset(self, num_envs: int, seed: int) -> None:
        self.rule.reset(num_envs, seed)

    def act(self, observations, env_ids):
        action = self.rule.act(observations, env_ids)
        self.num_decisions += len(action)
        self.num_different += int((action != self.learned.act(observations, env_ids)).sum())
        self.chosen |= set(action.tolist())
        return action


@pytest.mark.parametrize(
    ("rule", "relative"),
    [*((rule, False) for rule in RULES), ("added-delay", True), (RULES[-1], True)],
)
@pytest.mark.parametrize("scenario", ["mixed-chat", "hetero-prefix", "failures"])
def test_untrained_network_is_its_base_action_for_action(rule, relative, scenario):
    loaded = load_scenario(scenario)
    episodes = [loaded.episode(seed, num_requests=400) for seed in range(3)]
    twins = Twins(policy(rule), network_on(policy(rule), relative=relative))
    run(Simulator(loaded.spec, episodes), twins)
    assert twins.num_decisions >= 1200
    assert twins.num_different == 0
    assert len(twins.chosen) >= 3


@pytest.mark.parametrize("extras", [{"hold": True}, {"hold": True, "reject": True}])
def test_untrained_network_holds_as_its_base_does(extras):
    loaded = load_scenario("hetero-prefix")
    actions = loaded.actions.model_copy(update=extras)
    loaded = loaded.model_copy(update={"actions": actions})
    rule = policy(HELD)
    twins = Twins(rule, network_on(rule, num_extra=len(extras)))
    simulator = Simulator(loaded.spec, [loaded.episode(s, num_requests=400) for s in range(3)])
    run(simulator, twins)
    holds = np.concatenate([simulator.outcomes(env)["num_holds"] for env in range(3)])
    assert twins.num_different == 0
    assert twins.num_decisions == 1200 + holds.sum()
    assert holds.max() == 5  # of 0.05 s: after 0.22 s it is let go
    assert 20 < (holds > 0).sum() < 1200


def test_where_nobody_may_be_held_an_untrained_network_dispatches():
    loaded = load_scenario("hetero-prefix")
    rule = policy(HELD)
    twins = Twins(rule, network_on(rule, num_extra=1))
    run(Simulator(loaded.spec, [loaded.episode(0, num_requests=400)]), twins)
    assert (twins.num_decisions, twins.num_different) == (400, 0)
    assert twins.chosen <= set(range(6))


def test_a_network_that_holds_must_have_the_action():
    with pytest.raises(ConfigError, match=r"starts as added-delay-held must have the action to"):
        network_on(policy(HELD))


def test_trained_network_is_not_its_base():
    loaded = load_scenario("mixed-chat")
    rule = policy("added-delay")
    network = network_on(rule)
    with torch.no_grad():
        network.score.weight.normal_()
    twins = Twins(rule, network)
    run(Simulator(loaded.spec, [loaded.episode(0, num_requests=200)]), twins)
    assert twins.num_different > 20


@pytest.mark.parametrize(
    "extras", [{"hold": True}, {"reject": True}, {"hold": True, "reject": True}]
)
def test_untrained_network_neither_holds_nor_rejects(extras):
    loaded = load_scenario("mixed-chat").model_copy(
        update={"actions": load_scenario("mixed-chat").actions.model_copy(update=extras)}
    )
    network = network_on(policy("least-outstanding"), num_extra=len(extras))
    simulator = Simulator(loaded.spec, [loaded.episode(0, num_requests=200)])
    run(simulator, TorchPolicy(network))
    fate = simulator.outcomes()
    assert not fate["rejected"].any()
    assert not fate["num_holds"].any()


def test_network_runs_on_fleets_it_was_not_made_for():
    network = network_on(policy("added-delay"))
    for name, size in (("homogeneous-light", 4), ("bench", 16)):
        loaded = load_scenario(name)
        simulator = Simulator(loaded.spec, [loaded.episode(0, num_requests=150)])
        run(simulator, TorchPolicy(network))
        fate = simulator.outcomes()
        assert set(fate["replica"].tolist()) == set(range(size))
        assert np.isfinite(fate["finish_s"]).all()


def test_base_costs_agree_with_a_hand_computation():
    replicas = torch.zeros(1, 1, 21)
    request = torch.zeros(1, 9)
    for name, value in (
        ("OUTSTANDING_REQUESTS", 3.0),
        ("RELATIVE_SPEED", 0.25),
        ("PENDING_PREFILL_TOKENS", 400.0),
        ("PREFILL_TOKENS_PER_S", 1000.0),
        ("PREFIX_HIT_TOKENS", 100.0),
        ("DECODE_STEP_S", 0.02),
        ("DECODE_SEQ_S", 0.001),
    ):
        replicas[..., ReplicaFeature[name]] = value
    request[..., RequestFeature.PROMPT_TOKENS] = 300.0
    request[..., RequestFeature.PREDICTED_OUTPUT_TOKENS] = 50.0

    def cost(name: str, *params: float) -> float:
        return float(base_cost(name, replicas, request, params))

    assert cost("least-outstanding") == 3.0
    assert cost("speed-family", 0.5) == pytest.approx(8.0)  # (3 + 1) / 0.25^0.5
    # prefill (400 + 300 - 100) / 1000 = 0.6 s; load 0.05 * 4 / 0.25 = 0.8
    assert cost("prefix-load", 0.05, 1.0) == pytest.approx(1.4)
    # own: 0.4 + 0.2 + 50 * (0.02 + 3 * 0.001) = 1.75; to the others: 3 * (2 * 0.2 + 4 * 0.05)
    assert cost("added-delay", 2.0, 4.0) == pytest.approx(1.75 + 1.8)
    with pytest.raises(ValueError, match="no base cost 'random'"):
        cost("random")


@pytest.mark.parametrize("base", BASES)
def test_costs_of_networks_and_rules_are_those_of_one_formula(base):
    rng = np.random.default_rng(5)
    params = {
        "speed-family": (0.7,),
        "prefix-load": (0.3, 0.7),
        "added-delay": (1.9, 0.4),
        "added-delay-inferred": (1.9, 0.4, 0.6, 0.8, 40.0),
        "added-delay-held": (1.9, 0.4, 1.0, 60.0, 0.6),
    }
    ranges = {
        "UP": (1, 1),
        "OUTSTANDING_REQUESTS": (0, 60),
        "RELATIVE_SPEED": (0.1, 1),
        "PENDING_PREFILL_TOKENS": (0, 9000),
        "PREFILL_TOKENS_PER_S": (2e3, 5e4),
        "PREFIX_HIT_TOKENS": (0, 900),
        "KV_CAPACITY_TOKENS": (1e4, 1e6),
        "DECODE_STEP_S": (0.005, 0.03),
        "DECODE_SEQ_S": (1e-5, 1e-3),
        "STEP_TIME_RATIO": (0.8, 4),
    }
    replicas = np.zeros((300, NUM_REPLICA_FEATURES, 5))
    for name, (low, high) in ranges.items():
        replicas[:, ReplicaFeature[name]] = rng.uniform(low, high, (300, 5))
    request = np.ones((300, NUM_REQUEST_FEATURES))
    request[:, RequestFeature.PROMPT_TOKENS] = rng.uniform(1, 4000, 300)
    request[:, RequestFeature.PREDICTED_OUTPUT_TOKENS] = rng.uniform(1, 500, 300)

    def column(name):
        return replicas[:, ReplicaFeature[name]]

    load, speed, rate = map(
        column, ("OUTSTANDING_REQUESTS", "RELATIVE_SPEED", "PREFILL_TOKENS_PER_S")
    )
    predicted = request[:, RequestFeature.PREDICTED_OUTPUT_TOKENS, None]
    hit = column("PREFIX_HIT_TOKENS")
    new = np.maximum(request[:, RequestFeature.PROMPT_TOKENS, None] - hit, 0.0)
    queue_s, alone_s, seq_s = (
        column("PENDING_PREFILL_TOKENS") / rate,
        column("DECODE_STEP_S"),
        column("DECODE_SEQ_S"),
    )
    given = params.get(base, ())
    request[:, RequestFeature.EXPECTED_TOKENS] = rng.uniform(1, 500, 300)
    tokens = predicted + 0.6 * (request[:, RequestFeature.EXPECTED_TOKENS, None] - predicted)
    cost = {
        "least-outstanding": lambda: load,
        "speed-family": lambda: load_by_speed(load, speed, *given),
        "prefix-load": lambda: prefix_load_s(queue_s + new / rate, load, speed, *given),
        "added-delay": lambda: added_delay_s(
            queue_s,
            new / rate,
            predicted * step_s(alone_s, seq_s, load),
            delay_s(load, new / rate, seq_s, predicted, *given),
        ),
        "added-delay-inferred": lambda: (
            added_delay_s(
                queue_s,
                new / rate,
                tokens * step_s(alone_s, seq_s, load),
                delay_s(load, new / rate, seq_s, tokens, *given[:2]),
            )
            * column("STEP_TIME_RATIO") ** given[3]
            + given[4] * new / column("KV_CAPACITY_TOKENS")
        ),
        "added-delay-held": lambda: added_delay_s(
            queue_s,
            new / rate,
            tokens * step_s(alone_s, seq_s, load),
            delay_s(load, new / rate, seq_s, tokens, *given[:2]),
        ),
    }[base]()
    of_network = base_cost(
        base, torch.from_numpy(replicas).transpose(1, 2), torch.from_numpy(request), given
    )
    np.testing.assert_allclose(of_network.numpy(), cost, rtol=1e-12)
    rule = policy(base)
    rule.params[:] = given
    rule.reset(1, 0)
    mask = np.tile([True] * 5 + [False] * 2, (300, 1))
    chosen = rule.act(Observations(replicas, request, mask), np.zeros(300, np.int64))
    np.testing.assert_array_equal(chosen, cost.argmin(-1))


def test_a_relative_base_weighs_shares_of_its_costs():
    # costs 2 and 1 in the fleet of one request more: a half less counts as log 2, at any scale
    replicas, request = torch.zeros(2, 2, 21), torch.ones(2, 9)
    replicas[..., ReplicaFeature.UP] = 1.0
    replicas[..., ReplicaFeature.OUTSTANDING_REQUESTS] = torch.tensor([[2.0, 1.0], [60.0, 30.0]])
    config = NetworkConfig(base="least-outstanding", relative=True, eta=3.0)
    prior = DispatchNetwork(config).prepare(replicas, request, torch.ones(2, 2)).prior
    torch.testing.assert_close(prior, -3.0 * np.log(2.0) * torch.tensor([[1.0, 0.0]] * 2))


def test_a_base_that_goes_by_what_is_inferred_must_see_it():
    with pytest.raises(ConfigError, match=r"added-delay-inferred goes by .*: give --extended"):
        NetworkConfig(base="added-delay-inferred")
