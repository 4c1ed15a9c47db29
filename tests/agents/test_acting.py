"""A network in compiled code against itself in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from servegym.agents.acting import Acting
from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.policy.contract import observed


def random_network(**settings: object) -> DispatchNetwork:
    """Make a network whose every weight counts, as after training."""
    torch.manual_seed(1)
    network = DispatchNetwork(NetworkConfig(**settings))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


def both(network, observation, acting=None):
    """Return what a network makes of observations: prepared and logits, twice."""
    replicas, request, mask = observation
    acting = acting or Acting(network)
    prepared = acting.prepared(replicas.numpy(), request.numpy(), mask.numpy().astype(np.int8))
    with torch.no_grad():
        wanted = network.prepare(replicas, request, mask)
        return (prepared, acting.logits(prepared)), (wanted, network.logits(wanted))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base": "prefix-load", "relative": True, "num_extra": 1},
        {"base": "added-delay:prefill=0.5,decode=2", "hidden": 12, "num_extra": 2},
    ],
    ids=str,
)
def test_compiled_code_gives_the_scores_of_pytorch(draw_observations, settings):
    network = random_network(**settings)
    num_extra = settings.get("num_extra", 0)
    replicas, request, mask = draw_observations(100, 9, num_extra=num_extra)  # several blocks
    replicas[:, 7:] = 0.0  # a smaller fleet
    mask[:, 7:9] = 0.0
    (prepared, logits), (wanted, want) = both(network, (replicas, request, mask))
    for name, got, expected in zip(prepared._fields, prepared, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-3)
    assert logits[mask > 0].std() > 0.1  # not all the same
    assert (prepared.prior.masked_fill(mask[:, :9] == 0, -1e9).amax(-1) == 0.0).all()


def test_where_nothing_is_allowed_all_actions_are_forbidden(draw_observations):
    replicas, request, mask = draw_observations(4, 9)
    mask[:] = 0.0
    (_, logits), (_, want) = both(random_network(), (replicas, request, mask))
    assert (logits == -1e8).all()
    assert (want == -1e8).all()


def test_weights_that_learning_has_moved_are_the_ones_that_act(draw_observations):
    network, observation = random_network(), draw_observations(16, 9)
    acting = Acting(network)
    (_, before), _ = both(network, observation, acting)
    with torch.no_grad():
        network.score.weight.mul_(-2.0)
    (_, after), (_, want) = both(network, observation, acting)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"context": "attention"}, {"base": "least-outstanding"}], ids=str
)
def test_what_compiled_code_does_not_run_is_computed_by_pytorch(draw_observations, settings):
    (prepared, logits), (wanted, want) = both(random_network(**settings), draw_observations(8, 9))
    assert all(map(torch.equal, prepared, wanted))
    assert torch.equal(logits, want)


def test_an_extended_network_is_computed_by_pytorch():
    torch.manual_seed(0)
    shape = observed(extended=True)
    replicas, request = torch.rand(8, 9, shape.replicas), torch.rand(8, shape.request)
    observation = 1.0 + replicas, 1.0 + request, torch.ones(8, 9)
    (_, logits), (_, want) = both(random_network(extended=True), observation)
    assert torch.equal(logits, want)
