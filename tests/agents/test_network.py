"""The network: equivariant, indifferent to size, masked, and a heuristic before it has learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from servegym.agents.features import arriving_shares, replica_inputs
from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.envs.dispatch import DispatchVectorEnv
from servegym.errors import ConfigError
from servegym.export.sample import sample_observations
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.numpy_network import num_inputs
from servegym.scenario import load_scenario

CONTEXTS = ("mean", "attention")


def random_network(**settings: object) -> DispatchNetwork:
    """Make a network whose every weight counts, as after training."""
    torch.manual_seed(1)
    network = DispatchNetwork(NetworkConfig(**settings))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("num_extra", [0, 1, 2])
@torch.no_grad()
def test_relabelling_replicas_permutes_the_logits(draw_observations, context, num_extra):
    network = random_network(context=context, num_extra=num_extra)
    replicas, request, mask = draw_observations(64, 9, num_extra=num_extra)
    order = torch.randperm(9)
    whole = torch.cat((order, torch.arange(9, 9 + num_extra)))  # hold and reject stay in place
    logits = network(replicas, request, mask)
    permuted = network(replicas[:, order], request, mask[:, whole])
    torch.testing.assert_close(permuted, logits[:, whole], rtol=1e-4, atol=1e-3)
    values = network.values(network.prepare(replicas, request, mask))
    again = network.values(network.prepare(replicas[:, order], request, mask[:, whole]))
    torch.testing.assert_close(again, values, rtol=1e-4, atol=1e-3)
    assert logits[mask > 0].std() > 0.1  # not all the same


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_rows_of_absent_replicas_change_nothing(draw_observations, context):
    network = random_network(context=context, num_extra=1)
    replicas, request, mask = draw_observations(64, 5, num_extra=1)
    padded = torch.cat((replicas, torch.zeros(64, 7, replicas.shape[2])), 1)
    padded_mask = torch.cat((mask[:, :5], torch.zeros(64, 7), mask[:, 5:]), 1)
    logits, wide = network(replicas, request, mask), network(padded, request, padded_mask)
    torch.testing.assert_close(wide[:, :5], logits[:, :5], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(wide[:, 12], logits[:, 5], rtol=1e-4, atol=1e-3)
    assert (wide[:, 5:12] < -1e7).all()
    torch.testing.assert_close(
        network.values(network.prepare(padded, request, padded_mask)),
        network.values(network.prepare(replicas, request, mask)),
        rtol=1e-4,
        atol=1e-3,
    )


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_every_fleet_size_is_accepted_and_the_others_matter(draw_observations, context):
    network = random_network(context=context)
    for size in range(1, 41):
        logits = network(*draw_observations(8, size, seed=size))
        assert logits.shape == (8, size)
        assert logits.isfinite().all()
    replicas, request, mask = draw_observations(8, 6)
    mask[:] = 1.0
    before = network(replicas, request, mask) - network.prepare(replicas, request, mask).prior
    replicas[:, 5, 1] += 50.0  # only replica 5 gets busier
    after = network(replicas, request, mask) - network.prepare(replicas, request, mask).prior
    assert (after - before)[:, :5].abs().max() > 1e-3


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_learned_part_is_exactly_zero_at_the_start(draw_observations, context):
    network = DispatchNetwork(NetworkConfig(context=context, num_extra=2))
    replicas, request, mask = draw_observations(128, 7, num_extra=2)
    logits = network(replicas, request, mask)
    prior = network.prepare(replicas, request, mask).prior
    allowed = mask[:, :7] > 0
    assert torch.equal(logits[:, :7][allowed], prior[allowed])
    # the best allowed replica has logit 0; hold and reject, 10 less, are never preferred to it
    assert torch.equal(prior.masked_fill(~allowed, -1e9).amax(-1), torch.zeros(128))
    assert (logits[:, 7:][mask[:, 7:] > 0] == -10.0).all()


@pytest.mark.parametrize("context", CONTEXTS)
def test_masked_actions_have_no_probability_and_no_gradient(draw_observations, context):
    network = random_network(context=context, num_extra=2)
    observation = draw_observations(5000, 12, num_extra=2)
    mask = observation[2]
    prepared = network.prepare(*observation)
    prepared.prior.requires_grad_()
    log_probs = network.logits(prepared).log_softmax(-1)
    assert (log_probs.exp()[mask == 0] == 0.0).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5000))
    (log_probs * mask).sum().backward()
    gradient = prepared.prior.grad
    assert (gradient[mask[:, :12] == 0] == 0.0).all()
    assert (gradient[mask[:, :12] == 1] != 0.0).any()
    # as PPO samples: a million draws, none forbidden
    with torch.no_grad():
        logits = network.logits(prepared)
        for _ in range(200):
            noise = torch.empty_like(logits).exponential_().log_()
            action = (logits - noise).argmax(-1)
            assert (mask.gather(1, action[:, None]) == 1).all()


@torch.no_grad()
def test_real_episodes_with_crashes_accept_every_sampled_action():
    # the environment raises InvalidAction at the first forbidden one
    env = DispatchVectorEnv(16, load_scenario("failures"), r_max=9, num_requests=300)
    network = random_network()
    observation, _ = env.reset(seed=0)
    forbidden = 0
    for _ in range(500):
        arrays = (observation[k] for k in ("replicas", "request", "action_mask"))
        logits = network(*(torch.from_numpy(a).float() for a in arrays))
        action = torch.distributions.Categorical(logits=logits).sample().numpy()
        # 6 of the 9 rows are replicas; less than 6 allowed means that some are down
        forbidden += int((observation["action_mask"].sum(-1) < 6).sum())
        observation, *_ = env.step(action)
    assert forbidden > 100


@torch.no_grad()
def test_down_replica_is_not_counted_as_present(draw_observations):
    network = random_network()
    replicas, request, mask = draw_observations(16, 4)
    mask[:, 3], mask[:, 0] = 0.0, 1.0
    replicas[:, 3, 0] = 0.0
    first = network(replicas, request, mask)
    replicas[:, 3, 1:] *= 2.0
    torch.testing.assert_close(network(replicas, request, mask)[:, :3], first[:, :3])


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden": 3},
        {"context": "max"},
        {"base": "random"},
        {"eta": 0.0},
        {"num_extra": 3},
        {"arrivals": True},
        {"x": 1},
    ],
)
def test_wrong_setting_is_refused(settings):
    with pytest.raises(ConfigError):
        NetworkConfig(**settings)


def test_inputs_are_of_order_one_on_real_observations():

    replicas, request, mask = sample_observations(random_network(), "mixed-chat", num=512)
    inputs = replica_inputs(torch.from_numpy(replicas), torch.from_numpy(request)).numpy()
    assert inputs.shape == (*mask.shape, num_inputs(extended=False))
    assert np.isfinite(inputs).all()
    assert np.quantile(np.abs(inputs), 0.999) < 20.0


def test_what_arrives_is_stated_in_shares_of_what_the_fleet_can_do():
    replicas = torch.zeros(1, 3, NUM_OBSERVED_FEATURES)
    for name, values in {
        "UP": (1, 1, 0),  # the third is down: it counts for nothing
        "PREFILL_TOKENS_PER_S": (10_000, 30_000, 1_000_000),
        "DECODE_SEQ_S": (1e-3, 5e-4, 1e-6),
        "OUTSTANDING_REQUESTS": (3, 0, 50),
        "OUTSTANDING_PROMPT_TOKENS": (2_700, 0, 1_000_000),
        "OUTSTANDING_PREDICTED_TOKENS": (300, 0, 1_000_000),
    }.items():
        replicas[0, :, ReplicaFeature[name]] = torch.tensor(values, dtype=torch.float32)
    request = torch.zeros(1, NUM_OBSERVED_REQUEST_FEATURES)
    for name, value in {
        "PROMPT_TOKENS": 1_300,
        "PREDICTED_OUTPUT_TOKENS": 100,
        "ARRIVAL_RATE_RPS": 8,
    }.items():
        request[0, RequestFeature[name]] = value
    prefill, decode = arriving_shares(replicas, request)
    assert prefill.item() == pytest.approx(8 * 1_000 / 40_000)
    assert decode.item() == pytest.approx(8 * 100 / 3_000, rel=1e-5)
    request[0, RequestFeature.ARRIVAL_RATE_RPS] = 1e6
    assert [x.item() for x in arriving_shares(replicas, request)] == [4.0, 4.0]
