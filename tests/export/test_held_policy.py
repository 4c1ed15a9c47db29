"""Exported policies that hold: in NumPy, in ONNX Runtime and in a router with its guards."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.agents.torch_policy import TorchPolicy
from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.errors import ExportError
from servegym.export.from_torch import export_policy
from servegym.export.manifest import read_manifest
from servegym.export.resolve import resolve_policy
from servegym.export.sample import sample_observations
from servegym.policy.contract import Group, ReplicaFeature, RequestFeature
from servegym.policy.frozen import FrozenPolicy, NumpyPolicy
from servegym.policy.policy import Observations
from servegym.policy.run import run as play
from servegym.scenario import load_scenario

from ..serve.running import RATES, run, running, until  # noqa: TID252 - tests are no package

#: Holds while more than 0.05 s of prefill wait, 30 s at most.
BASE = "added-delay-held:wait=0.05,most=30"
NUM_DECISIONS = 400


@pytest.fixture(scope="module")
def network() -> DispatchNetwork:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    network = DispatchNetwork(NetworkConfig(base=BASE, extended=True, num_extra=1)).eval()
    with torch.no_grad():
        network.hold.weight.add_(0.05 * torch.randn_like(network.hold.weight))
        network.score.weight.add_(0.05 * torch.randn_like(network.score.weight))
    return network


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory) -> Path:
    scenario = load_scenario("hetero-prefix")
    actions = scenario.actions.model_copy(update={"hold": True})
    scenario = scenario.model_copy(update={"actions": actions})
    samples = sample_observations(network, scenario, num=256)
    return export_policy(network, tmp_path_factory.mktemp("held") / "policy", samples)


@pytest.fixture
def graph(exported, tmp_path) -> Path:
    """The policy without the weights that NumPy runs."""
    for name in ("policy.onnx", "manifest.json"):
        (tmp_path / name).write_bytes((exported.parent / name).read_bytes())
    return tmp_path / "policy.onnx"


def draw(*, hold: bool, reject: bool) -> Observations:
    """Draw decisions about five replicas, at some of which more than 0.05 s of prefill wait."""
    rng = np.random.default_rng(7)
    replicas = np.zeros((NUM_DECISIONS, len(ReplicaFeature), 5))
    for name, low, high in (
        ("UP", 1, 1),
        ("OUTSTANDING_REQUESTS", 0, 30),
        ("PENDING_PREFILL_TOKENS", 0, 4000),
        ("RELATIVE_SPEED", 0.2, 1),
        ("PREFILL_TOKENS_PER_S", 5e3, 5e4),
        ("DECODE_STEP_S", 0.005, 0.03),
        ("DECODE_SEQ_S", 1e-5, 1e-4),
        ("KV_CAPACITY_TOKENS", 1e5, 1e5),
        ("MAX_NUM_SEQS", 128, 128),
        ("STEP_TIME_RATIO", 1, 1),
    ):
        replicas[:, ReplicaFeature[name]] = rng.uniform(low, high, (NUM_DECISIONS, 5))
    request = np.zeros((NUM_DECISIONS, len(RequestFeature)))
    for name, low, high in (
        ("PROMPT_TOKENS", 1, 2000),
        ("PREDICTED_OUTPUT_TOKENS", 1, 500),
        ("EXPECTED_TOKENS", 1, 500),
        ("WAITED_S", 0, 40),
        ("NUM_HELD", 0, 50),
    ):
        request[:, RequestFeature[name]] = rng.uniform(low, high, NUM_DECISIONS)
    mask = np.tile([True] * 5 + [hold, reject], (NUM_DECISIONS, 1))
    mask[:, :5] &= rng.random((NUM_DECISIONS, 5)) < 0.8
    mask[:, 0] = True
    return Observations(replicas, request, mask)


@pytest.mark.parametrize("kind", [NumpyPolicy, FrozenPolicy])
def test_a_file_holds_as_the_network_does(exported, graph, network, kind):
    frozen = resolve_policy(str(exported if kind is NumpyPolicy else graph))
    assert isinstance(frozen, kind)
    assert frozen.needs & Group.LENGTHS
    seen, envs = draw(hold=True, reject=True), np.arange(NUM_DECISIONS)
    chosen = frozen.act(seen, envs)
    np.testing.assert_array_equal(chosen, TorchPolicy(network).act(seen, envs))
    waited = seen.request[:, RequestFeature.WAITED_S]
    assert 50 < (chosen == 5).sum() < 350
    assert (chosen[waited >= 30.0] < 5).all()
    assert (chosen < 6).all()  # it was not made to reject


@pytest.mark.parametrize("kind", [NumpyPolicy, FrozenPolicy])
def test_who_may_not_hold_any_longer_dispatches_and_does_not_reject(exported, graph, kind):
    frozen = resolve_policy(str(exported if kind is NumpyPolicy else graph))
    seen, envs = draw(hold=False, reject=True), np.arange(NUM_DECISIONS)
    chosen = frozen.act(seen, envs)
    assert (chosen < 5).all()
    assert seen.mask[envs, chosen].all()


def test_a_file_of_another_rule_is_refused(exported, tmp_path):
    manifest = json.loads((exported.parent / "manifest.json").read_text())
    assert read_manifest(exported).network.base == "added-delay-held"
    manifest["network"][2] = "added-delay-inferred"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name in ("policy.onnx", "weights.npz"):
        (tmp_path / name).write_bytes((exported.parent / name).read_bytes())
    with pytest.raises(ExportError, match="of family dispatch-held-1, and no others, hold"):
        resolve_policy(str(tmp_path / "policy.onnx"))


def test_the_router_holds_by_it_until_there_is_room_or_time_is_up(exported):
    stream = {"model": "m", "prompt": [1] * 400, "max_tokens": 5, "stream": True}

    async def test() -> None:
        # one small engine is far from what was trained on, and this machine may be busy
        runtime = {"policy": str(exported), "max_features_out": 99, "timeout_s": 5.0}
        dispatch = {"runtime": runtime, "allow_hold": True, "allow_reject": True}
        request = {"hold_s": 0.02, "max_hold_s": 0.5}
        async with running(1, dispatch=dispatch, request=request) as it:
            (replica,) = it.replicas
            replica.mode = "headers"  # it says nothing: 400 tokens, 0.4 s of prefill, wait there
            first = asyncio.create_task(it.post(stream))
            await until(lambda: len(replica.bodies) == 1)
            replica.mode = "ok"
            begin_s = asyncio.get_running_loop().time()
            second = asyncio.create_task(it.post(stream))
            await until(lambda: it.state.num_held == 1)
            assert (await second)[0] == 200  # neither held for ever nor rejected
            assert asyncio.get_running_loop().time() - begin_s >= 0.4
            counters = it.router.dispatcher.runtime.counters
            assert counters.num_policy > 10  # asked anew every 0.02 s
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await until(it.idle)
            before = counters.num_policy
            assert (await it.post(stream))[0] == 200
            assert counters.num_policy == before + 1  # there is room: at once
            assert counters.num_fallback == 0

    assert RATES["prefill_tokens_per_s"] == 1000.0
    run(test)


def test_the_one_that_comes_with_it_is_ahead_of_the_tuned_rule_where_kv_is_short():
    scenario, learned = load_scenario("short-kv-hold"), resolve_policy("held")
    tuned = policy("added-delay-held:prefill=2.306,decode=0.4906,wait=0.7424")
    simulators = []
    for by in (learned, tuned):
        episode = scenario.episode(0, load=1.2, num_requests=400)
        simulators.append(Simulator(scenario.spec, [episode]))
        play(simulators[-1], by)
    ends = [s.outcomes() for s in simulators]
    assert ends[0]["num_holds"].any()
    means = [np.mean(x["finish_s"] - x["arrival_s"]) for x in ends]
    assert means[0] < 0.97 * means[1]
