"""The loss of PPO: hand numbers, and its written-out gradient against PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch

from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.train.compiled_loss import CompiledLoss
from servegym.train.ppo_loss import AutogradLoss, LossWeights

WEIGHTS = LossWeights(clip=0.2, value=0.5, entropy=0.01, warm=False)


def network_of(**settings: object) -> DispatchNetwork:
    torch.manual_seed(1)
    network = DispatchNetwork(NetworkConfig(eta=0.1, **settings))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def decisions(network, observation, spread):
    """Prepare observations, with actions that were taken by a policy that differs by `spread`."""
    prepared = network.prepare(*observation)
    with torch.no_grad():
        log_probs = network.logits(prepared).log_softmax(-1)
    size = len(log_probs)
    action = log_probs.exp().multinomial(1).squeeze(-1)
    batch = {
        "action": action,
        "log_prob": log_probs.gather(-1, action[:, None]).squeeze(-1) + spread * torch.randn(size),
        "advantage": torch.randn(size),
        "target": torch.randn(size),
    }
    return prepared, batch


def gradients(network, loss, prepared, batch, weights):
    parts = loss.backward(prepared, batch, weights)
    return parts, {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("num_extra", [0, 2])
def test_the_gradient_that_is_written_out_is_that_of_pytorch(draw_observations, num_extra, warm):
    network = network_of(num_extra=num_extra, hidden=12)
    replicas, request, mask = draw_observations(60, 7, num_extra=num_extra)
    replicas[:, 1] = replicas[:, 0]  # replicas that are alike have the most of a unit together
    replicas[:30, 5:] = 0.0  # smaller fleets
    mask[:30, 5:7] = 0.0
    mask[:, 0] = 1.0
    prepared, batch = decisions(network, (replicas, request, mask), spread=0.3)
    weights = WEIGHTS._replace(warm=warm)
    wanted, want = gradients(network, AutogradLoss(network), prepared, batch, weights)
    loss = CompiledLoss(network)
    gradients(network, loss, *decisions(network, (replicas, request, mask), 1.0), weights)
    found, got = gradients(network, loss, prepared, batch, weights)  # nothing is left of the first
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert 0.1 < found.clipped < 0.9
    assert want.keys() == got.keys()
    assert sum(g is not None for g in got.values()) == (8 if warm else 18 + 2 * (num_extra > 0))
    # of the largest: what shifts all scores alike has a gradient of rounding errors alone
    atol = 1e-5 * max(float(g.abs().max()) for g in want.values() if g is not None)
    for name, expected in want.items():
        if expected is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize("make", [AutogradLoss, CompiledLoss])
def test_a_critic_without_weight_has_no_gradient(draw_observations, make):
    network = network_of()
    prepared, batch = decisions(network, draw_observations(8, 3), spread=0.1)
    parts, got = gradients(network, make(network), prepared, batch, WEIGHTS._replace(value=0.0))
    assert parts.value_loss == 0.0
    of_critic = {name for name in got if name.startswith(("critic.", "value."))}
    assert len(of_critic) == 8
    assert all((got[name] is None) == (name in of_critic) for name in got if "extra" not in name)


@pytest.mark.parametrize("make", [AutogradLoss, CompiledLoss])
def test_the_parts_of_the_loss_are_those_of_two_decisions_by_hand(make):
    # a network that has learned nothing, between two replicas that cost the same: even odds
    network = DispatchNetwork(NetworkConfig(base="least-outstanding"))
    replicas = torch.rand(1, 2, 21).expand(2, 2, 21).clone() + 1.0
    replicas[:, 1] = replicas[:, 0]
    prepared = network.prepare(replicas, torch.ones(2, 9), torch.ones(2, 2))
    batch = {
        "action": torch.tensor([0, 1]),
        "log_prob": torch.tensor([0.25, 0.5]).log(),  # ratios 2 and 1
        "advantage": torch.tensor([1.0, -3.0]),
        "target": network.values(prepared).detach() + torch.tensor([1.0, 3.0]),
    }
    parts = make(network).backward(prepared, batch, WEIGHTS)
    assert parts.value_loss == pytest.approx((1 + 9) / 4, rel=1e-4)
    assert parts.gain == pytest.approx((1.2 - 3.0) / 2, rel=1e-5)
    assert parts.entropy == pytest.approx(math.log(2), rel=1e-5)
    assert parts.kl == pytest.approx((2 - 1 - math.log(2)) / 2, rel=1e-5)
    assert parts.clipped == 0.5


def test_networks_with_attention_are_left_to_pytorch():
    assert CompiledLoss.runs(DispatchNetwork(NetworkConfig(extended=True)))
    assert not CompiledLoss.runs(DispatchNetwork(NetworkConfig(context="attention")))
