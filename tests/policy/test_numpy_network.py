"""The network in NumPy scores as the one in PyTorch, whatever its shape and the fleet's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.policy.contract import (
    EXPECTED_TOKENS,
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    ReplicaFeature,
    observed,
)
from servegym.policy.costs import BASES, HELD_BASES, INFERRED_BASES
from servegym.policy.frozen import NumpyPolicy
from servegym.policy.numpy_network import NetworkShape, NumpyNetwork, family_of
from servegym.policy.policy import Observations, Scoring

PARAMS = {
    "added-delay": (1.9, 0.4),
    "prefix-load": (0.03, 0.7),
    "speed-family": (0.8,),
    "least-outstanding": (),
    "added-delay-inferred": (1.9, 0.4, 0.6, 0.8, 30.0),
    "added-delay-held": (1.9, 0.4, 0.001, 0.8, 0.6),
}


def make(
    base: str,
    context: str,
    num_extra: int,
    *,
    extended: bool = False,
    relative: bool = False,
    arrivals: bool = False,
) -> tuple[DispatchNetwork, NumpyNetwork]:
    torch.manual_seed(1)
    config = NetworkConfig(
        context=context,
        num_extra=num_extra,
        base=base,
        base_params=PARAMS[base],
        hidden=20,
        extended=extended,
        relative=relative,
        arrivals=arrivals,
    )
    network = DispatchNetwork(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    family = family_of(extended=extended, arrivals=arrivals, holds=base in HELD_BASES)
    shape = NetworkShape(family, context, base, PARAMS[base], config.eta, num_extra, relative)
    return network, NumpyNetwork(shape, {k: v.numpy() for k, v in network.state_dict().items()})


def draw(batch: int, size: int, num_extra: int, *, extended: bool = False):
    rng = np.random.default_rng(size)
    shape = observed(extended=extended)
    replicas = rng.uniform(0, 20, (batch, size, shape.replicas)).astype(np.float32)
    replicas[..., 0] = rng.random((batch, size)) < 0.9
    for name, low, high in (
        ("PREFILL_TOKENS_PER_S", 2e3, 5e4),
        ("DECODE_STEP_S", 0.005, 0.03),
        ("DECODE_SEQ_S", 1e-5, 1e-3),
        ("KV_CAPACITY_TOKENS", 1e5, 1e6),
        ("OUTSTANDING_PREDICTED_TOKENS", 0, 1e4),
    ):
        replicas[..., ReplicaFeature[name]] = rng.uniform(low, high, (batch, size))
    request = rng.uniform(0, 1, (batch, shape.request)).astype(np.float32)
    request[:, 0] = rng.integers(1, 4000, batch)
    request[:, 1] = rng.integers(1, 500, batch)
    if extended:
        request[:, EXPECTED_TOKENS] = rng.integers(1, 500, batch)
        replicas[:, :, observed(extended=False).replicas :] *= 0.1
        replicas[:, 0, ReplicaFeature["STEP_TIME_RATIO"]] = 0.0  # nothing is known of it
    mask = (rng.random((batch, size + num_extra)) < 0.7).astype(np.float32)
    mask[:, 0] = 1
    return replicas, request, mask


def test_every_base_of_training_is_known_here():
    assert set(PARAMS) == set(BASES)


@pytest.mark.parametrize(
    ("base", "extended"),
    [(base, e) for base in BASES for e in (False, True) if e or base not in INFERRED_BASES],
)
@pytest.mark.parametrize("context", ["mean", "attention"])
@pytest.mark.parametrize("num_extra", [0, 1, 2])
def test_logits_are_those_of_pytorch(base, extended, context, num_extra):
    num_extra = max(num_extra, base in HELD_BASES)  # who holds has the action to
    relative, arrivals = num_extra == 1, extended and num_extra == 2
    network, other = make(
        base, context, num_extra, extended=extended, relative=relative, arrivals=arrivals
    )
    for size in (1, 2, 7, 16, 128, 400):  # the large ones are multiplied in pieces
        replicas, request, mask = draw(6, size, num_extra, extended=extended)
        with torch.inference_mode():
            want = network(*map(torch.from_numpy, (replicas, request, mask))).numpy()
        for i in range(6):
            got = other.logits(replicas[i].T.astype(float), request[i].astype(float), mask[i])
            within = 5e-5 if extended else 2e-5  # more inputs, more rounding
            np.testing.assert_allclose(got, want[i], rtol=2e-5, atol=within)


def test_policies_of_before_the_price_on_displaced_prefixes_have_one_of_nothing():
    _, network = make("added-delay-inferred", "mean", 0, extended=True)
    replicas, request, mask = draw(1, 7, 0, extended=True)
    four, five = PARAMS["added-delay-inferred"][:4], PARAMS["added-delay-inferred"]
    logits = []
    for params in (four, (*four, 0.0), five):
        network._params = [np.float32(value) for value in params]
        got = network.logits(replicas[0].T.astype(float), request[0].astype(float), mask[0])
        logits.append(got.copy())
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 1e-3


def test_a_call_leaves_nothing_behind_for_the_next():
    _, network = make("added-delay", "attention", 2)
    one, two = draw(1, 9, 2), draw(2, 9, 2)
    first = network.logits(one[0][0].T, one[1][0], one[2][0]).copy()
    network.logits(two[0][1].T, two[1][1], two[2][1])
    np.testing.assert_array_equal(network.logits(one[0][0].T, one[1][0], one[2][0]), first)


def test_nan_is_no_choice():
    _, network = make("added-delay", "mean", 0)
    policy = NumpyPolicy(network, information="predictive", name="n")
    replicas, request, _ = draw(1, 3, 0)
    wide = np.zeros((1, NUM_REPLICA_FEATURES, 3))
    wide[:, : observed(extended=False).replicas] = replicas.transpose(0, 2, 1)
    mask = np.array([[True, True, True, False, False]])
    envs = np.zeros(1, np.int64)
    assert 0 <= policy.act(Observations(wide, request.astype(float), mask), envs)[0] < 3
    wide[0, ReplicaFeature["DECODE_STEP_S"], 1] = np.nan
    assert policy.act(Observations(wide, request.astype(float), mask), envs)[0] == -1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"family": "dispatch-9"}, "networks of family 'dispatch-9' are unknown"),
        ({"base": "magic"}, "no base cost 'magic'"),
        ({"base": "added-delay-inferred"}, "base cost added-delay-inferred needs a network of"),
    ],
)
def test_another_kind_of_network_is_refused(change, sentence):
    _, network = make("added-delay", "mean", 0)
    with pytest.raises(ValueError, match=sentence):
        NumpyNetwork(network.shape._replace(**change), {})


def test_wrong_weights_are_refused():
    torch_network, network = make("added-delay", "mean", 0)
    weights = {k: v.numpy() for k, v in torch_network.state_dict().items()}
    with pytest.raises(ValueError, match=r"the weights of score are missing"):
        NumpyNetwork(network.shape, {k: v for k, v in weights.items() if k != "score.bias"})
    with pytest.raises(ValueError, match=r"the first layer has shape"):
        NumpyNetwork(network.shape, weights | {"actor.own.0.weight": np.zeros((20, 7))})
    with pytest.raises(ValueError, match=r"the weights of score are not all finite"):
        NumpyNetwork(network.shape, weights | {"score.bias": np.array([np.nan])})
    with pytest.raises(ValueError, match=r"actor.query"):
        NumpyNetwork(network.shape._replace(context="attention"), weights)


def test_what_a_policy_gives_each_action_is_what_it_chooses_by():
    _, network = make("added-delay", "mean", 1)
    policy = NumpyPolicy(network, information="predictive", name="x")
    rng = np.random.default_rng(0)
    replicas = rng.uniform(0.1, 1.0, (1, NUM_REPLICA_FEATURES, 3))
    request = rng.uniform(0.1, 1.0, (1, NUM_REQUEST_FEATURES))
    for allowed in ([1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 1]):
        seen = Observations(replicas, request, np.array([allowed], bool))
        scores = policy.scores(seen)
        assert scores.shape == (5,)
        assert np.isfinite(scores).tolist() == [bool(x) for x in allowed]
        assert scores.argmax() == policy.act(seen, np.zeros(1, np.int64))[0]
    assert isinstance(policy, Scoring)
