"""The warm start: demonstrations are what a teacher did, and a network learns to do the same."""

from __future__ import annotations

import pytest
import torch

from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.baselines.registry import policy
from servegym.errors import ConfigError
from servegym.scenario import load_scenario
from servegym.train.imitation import demonstrations, imitate
from servegym.train.ppo import PPOConfig


def test_demonstrations_are_what_the_teacher_does(write_scenario):
    scenario = load_scenario(write_scenario())
    teacher = policy("least-outstanding")
    replicas, request, mask, action = demonstrations(
        scenario, teacher, 500, num_extra=0, num_requests=40
    )
    assert len(replicas) == len(request) == len(mask) == len(action) >= 500
    assert (mask.gather(1, action[:, None]) == 1).all()
    want = torch.where(mask > 0, replicas[:, :, 1], torch.inf).argmin(-1)  # the first of equals
    assert torch.equal(action, want)


def test_network_learns_what_another_rule_does(write_scenario):
    scenario = load_scenario(write_scenario())
    teacher = policy("added-delay")
    data = demonstrations(scenario, teacher, 6000, num_extra=0, num_requests=100)
    torch.manual_seed(0)
    network = DispatchNetwork(NetworkConfig(base="least-outstanding", base_params=(), eta=1.0))
    with torch.no_grad():
        before = float((network(*data[:3]).argmax(-1) == data[3]).double().mean())
    shares: list[float] = []
    after = imitate(network, data, epochs=6, progress=shares.append)
    assert before < 0.2
    assert after > 0.85
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_oracle_cannot_be_imitated(write_scenario, tmp_path):
    with pytest.raises(ConfigError, match="cannot imitate mct-oracle"):
        PPOConfig(scenario=write_scenario(), total_decisions=8192, imitate="mct-oracle")
