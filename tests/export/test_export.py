"""Exported policies: the same decisions as the network, and refusal of what was tampered with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import servegym
from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.agents.torch_policy import TorchPolicy
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import DECISION
from servegym.errors import ExportError
from servegym.evaluate.harness import evaluate
from servegym.export import from_torch
from servegym.export.from_torch import export_policy, graph_of
from servegym.export.manifest import NAME, WEIGHTS, digest, read_manifest, write_policy
from servegym.export.resolve import resolve_policy
from servegym.export.sample import sample_observations
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    SCHEMA_VERSION,
    Group,
    ReplicaFeature,
    RequestFeature,
    observed,
    observed_groups,
)
from servegym.policy.frozen import FrozenPolicy, NumpyPolicy
from servegym.policy.layout import GRAPH_INPUTS
from servegym.policy.observe import observe_batch
from servegym.policy.policy import Observations
from servegym.scenario import load_scenario
from servegym.serve.guards import Reason
from servegym.serve.runtime import PolicyRuntime, RuntimeConfig

SHAPES = [("mean", 0), ("attention", 0), ("mean", 1), ("attention", 2)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_network(context: str = "mean", num_extra: int = 0) -> DispatchNetwork:
    """Make a network whose every weight counts, as after training."""
    torch.manual_seed(2)
    network = DispatchNetwork(NetworkConfig(context=context, num_extra=num_extra))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        network.extra.weight.mul_(0.1)
        network.extra.bias.fill_(1.0)  # holds and rejects now and then
    return network.eval()


def draw(batch: int, size: int, num_extra: int, seed: int):
    """Draw observations of plausible size."""
    rng = np.random.default_rng(seed)
    replicas = rng.uniform(0, 20, (batch, size, NUM_OBSERVED_FEATURES)).astype(np.float32)
    replicas[..., ReplicaFeature.UP] = rng.random((batch, size)) < 0.9
    replicas[..., ReplicaFeature.PREFILL_TOKENS_PER_S] = rng.uniform(2e3, 5e4, (batch, size))
    replicas[..., ReplicaFeature.DECODE_STEP_S] = rng.uniform(0.005, 0.03, (batch, size))
    replicas[..., ReplicaFeature.DECODE_SEQ_S] = rng.uniform(1e-5, 1e-3, (batch, size))
    replicas[..., ReplicaFeature.KV_CAPACITY_TOKENS] = 1e5
    request = rng.uniform(0, 1, (batch, NUM_OBSERVED_REQUEST_FEATURES)).astype(np.float32)
    request[:, RequestFeature.PROMPT_TOKENS] = rng.integers(1, 4000, batch)
    request[:, RequestFeature.PREDICTED_OUTPUT_TOKENS] = rng.integers(1, 500, batch)
    mask = (rng.random((batch, size + num_extra)) < 0.7).astype(np.float32)
    mask[:, 0] = 1.0
    return replicas, request, mask


@pytest.fixture(scope="module")
def samples():
    return sample_observations(make_network(), "mixed-chat", num=512)


@pytest.fixture(scope="module")
def exported(samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "policy"
    return export_policy(
        make_network(), folder, samples, scenario="mixed-chat", training={"seed": 3}
    )


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """A copy of the exported policy that a test may spoil."""
    for name in ("policy.onnx", "manifest.json"):
        (tmp_path / name).write_bytes((exported.parent / name).read_bytes())
    return tmp_path / "policy.onnx"


def edit(path: Path, **changes: object) -> None:
    manifest = path.parent / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


@pytest.mark.parametrize(("context", "num_extra"), SHAPES)
def test_onnx_answers_as_the_network_for_every_fleet_size(tmp_path, context, num_extra):
    import onnxruntime

    network = make_network(context, num_extra)
    path = export_policy(network, tmp_path, draw(64, 8, num_extra, 0))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    count = different = 0
    for size in range(1, 41):
        feeds = draw(64, size, num_extra, size)
        names = ("replicas", "request", "mask")
        got = session.run(None, dict(zip(names, feeds, strict=True)))[0]
        with torch.inference_mode():
            want = network(*map(torch.from_numpy, feeds)).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
        gap = np.sort(want, -1)
        clear = np.ones(64, bool) if want.shape[1] == 1 else gap[:, -1] - gap[:, -2] > 1e-3
        different += int((got.argmax(-1) != want.argmax(-1))[clear].sum())
        count += int(clear.sum())
    assert count > 2500  # of 40 * 64; the others are ties
    assert different == 0


def test_samples_are_real_observations(samples):
    replicas, request, mask = samples
    assert len(replicas) == len(request) == len(mask) >= 500
    assert replicas.dtype == request.dtype == mask.dtype == np.float32
    assert (mask.sum(-1) >= 1).all()
    assert (request[:, RequestFeature.PROMPT_TOKENS] >= 1).all()
    assert replicas[..., ReplicaFeature.OUTSTANDING_REQUESTS].max() >= 3


def test_manifest_says_what_the_file_is(exported, samples):
    manifest = read_manifest(exported)
    assert manifest.sha256 == hashlib.sha256(exported.read_bytes()).hexdigest() == digest(exported)
    assert manifest.schema_version == SCHEMA_VERSION
    observed = [f.name for f in REPLICA_FEATURES[:NUM_OBSERVED_FEATURES]]
    assert list(manifest.features["replicas"]) == observed
    asked = [f.name for f in REQUEST_FEATURES[:NUM_OBSERVED_REQUEST_FEATURES]]
    assert list(manifest.features["request"]) == asked
    assert not manifest.extended
    assert manifest.num_extra_actions == 0
    assert manifest.information == "predictive"
    assert manifest.scenario == "mixed-chat"
    assert manifest.training == {"seed": 3}
    assert manifest.servegym_version == servegym.__version__
    assert len(manifest.ranges["replicas"]) == NUM_OBSERVED_FEATURES
    assert len(manifest.ranges["request"]) == NUM_OBSERVED_REQUEST_FEATURES
    low, high = manifest.ranges["request"][RequestFeature.PROMPT_TOKENS]
    prompts = samples[1][:, RequestFeature.PROMPT_TOKENS]
    one_more = 0.01 + 1 / len(prompts)  # quantiles are interpolated
    assert 0 < (prompts < low).mean() <= one_more
    assert 0 < (prompts > high).mean() <= one_more
    assert not list(exported.parent.glob("*.part*"))


def test_resolved_policy_has_the_name_of_its_run(exported):
    policy = resolve_policy(str(exported))
    assert policy.name == exported.parent.parent.name
    assert policy.information == "predictive"


def append_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def not_onnx_but_the_hash_fits(path: Path) -> None:
    path.write_text("not a graph")
    edit(path, sha256=digest(path))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (append_a_byte, "is not the file its manifest was written for: export again"),
        (flip_a_byte, "is not the file its manifest was written for: export again"),
        (lambda p: edit(p, sha256="0" * 64), "is not the file its manifest was written for"),
        (lambda p: edit(p, schema_version=99), "speaks observation schema 99, .* export .* again"),
        (lambda p: edit(p, replica_features=["up"]), "train and export the policy again"),
        (lambda p: edit(p, request_features=[]), "train and export the policy again"),
        (lambda p: edit(p, colour="red"), "is not a policy manifest: "),
        (lambda p: edit(p, num_extra_actions="many"), "is not a policy manifest: "),
        (lambda p: edit(p, information="clairvoyant"), "is not a policy manifest: "),
        (lambda p: edit(p, num_extra_actions=2), "policy.onnx"),
        (lambda p: edit(p, num_extra_actions=-1), "manifest"),
        (lambda p: (p.parent / "manifest.json").write_text("{"), "is not a policy manifest: "),
        (lambda p: (p.parent / "manifest.json").write_bytes(b"\xff\xfe"), "manifest"),
        (lambda p: (p.parent / "manifest.json").unlink(), "with a manifest.json beside it"),
        (lambda p: p.unlink(), "must exist"),
        (lambda p: (p.unlink(), p.mkdir()), "must exist"),
        (not_onnx_but_the_hash_fits, "policy.onnx"),
    ],
    ids=[
        "appended byte",
        "flipped byte",
        "other hash",
        "other schema",
        "other replica features",
        "other request features",
        "unknown key",
        "wrong type",
        "unknown information",
        "too many actions",
        "negative actions",
        "no json",
        "no text",
        "no manifest",
        "no graph",
        "a folder",
        "not onnx",
    ],
)
def test_spoilt_policy_is_refused_in_one_sentence(copy, spoil, sentence):
    resolve_policy(str(copy))  # it was good before
    spoil(copy)
    with pytest.raises(ExportError, match=sentence) as refused:
        resolve_policy(str(copy))
    assert "\n" not in str(refused.value)


@pytest.fixture
def with_weights(copy, exported) -> Path:
    """The same with the weights for NumPy beside it."""
    path = copy.parent / "weights.npz"
    path.write_bytes((exported.parent / "weights.npz").read_bytes())
    return copy


def test_own_networks_run_in_numpy_and_other_graphs_in_onnx_runtime(with_weights):
    assert isinstance(resolve_policy(str(with_weights)), NumpyPolicy)
    (with_weights.parent / "weights.npz").unlink()
    assert isinstance(resolve_policy(str(with_weights)), FrozenPolicy)


def save_other_weights(path: Path, **changes: np.ndarray) -> None:
    weights = path.parent / "weights.npz"
    with np.load(weights) as file:
        np.savez(weights, **(dict(file) | changes))
    edit(path, weights_sha256=digest(weights))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda p: append_a_byte(p.parent / "weights.npz"),
            "weights.npz is not the file its manifest was written for: export again",
        ),
        (lambda p: edit(p, weights_sha256=""), "weights.npz is not the file"),
        (
            lambda p: save_other_weights(p, **{"score.bias": np.array([3.0], np.float32)}),
            "weights.npz answers .* off the exported network: export again",
        ),
        (
            lambda p: save_other_weights(p, **{"score.bias": np.array([{}], object)}),
            "weights.npz cannot be run: Object arrays cannot be loaded",
        ),
        (lambda p: edit(p, network=["dispatch-9", "mean", "mct", [], 1, 0]), "dispatch-9"),
    ],
    ids=["appended byte", "no hash", "other weights", "a pickle", "other family"],
)
def test_spoilt_weights_are_refused_in_one_sentence(with_weights, spoil, sentence):
    spoil(with_weights)
    with pytest.raises(ExportError, match=sentence) as refused:
        resolve_policy(str(with_weights))
    assert "\n" not in str(refused.value)


def test_a_policy_of_the_first_schema_decides_as_before(with_weights, samples, tmp_path):
    # its manifest as the first version wrote it: the same rows, and no others
    for file in (with_weights, *(with_weights.parent / name for name in (NAME, WEIGHTS))):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    beside = tmp_path / NAME
    stated = json.loads(beside.read_text())
    assert stated["schema_version"] == 2
    beside.write_text(json.dumps(stated | {"schema_version": 1}))
    older, newer = (
        resolve_policy(str(tmp_path / with_weights.name)),
        resolve_policy(str(with_weights)),
    )
    assert older.needs == newer.needs == observed_groups(extended=False)
    replicas, request, mask = samples
    wide = np.zeros((len(replicas), NUM_REPLICA_FEATURES, replicas.shape[1]))
    wide[:, :NUM_OBSERVED_FEATURES] = replicas.transpose(0, 2, 1)
    both = np.concatenate((mask > 0, np.zeros((len(mask), 2), np.bool_)), 1)
    asked = np.full((len(request), NUM_REQUEST_FEATURES), np.nan)  # what is new, it must not read
    asked[:, :NUM_OBSERVED_REQUEST_FEATURES] = request
    wide[:, NUM_OBSERVED_FEATURES:] = np.nan
    envs = np.arange(len(replicas))
    want = TorchPolicy(make_network()).act(Observations(wide, asked, both), envs)
    np.testing.assert_array_equal(older.act(Observations(wide, asked, both), envs), want)
    assert len(want) >= 500
    for change in ({"schema_version": 3}, {"schema_version": 0}):
        beside.write_text(json.dumps(stated | change))
        with pytest.raises(ExportError, match=r"speaks observation schema [03], this .* 2: train"):
            resolve_policy(str(tmp_path / with_weights.name))


class Shortest(nn.Module):
    """Sends a request where the fewest tokens are expected to be left."""

    def forward(self, replicas: Tensor, request: Tensor, mask: Tensor) -> Tensor:
        left = replicas[..., ReplicaFeature.EXPECTED_TOKENS_LEFT]
        left = left + 0.0 * request[..., RequestFeature.EXPECTED_TOKENS :].sum(-1, keepdim=True)
        return -left + (mask - 1.0) * 1e9


def test_a_policy_may_see_what_is_inferred(tmp_path):
    shape = observed(extended=True)
    rng = np.random.default_rng(0)
    samples = {
        "replicas": rng.random((64, shape.replicas)).astype(np.float32),
        "request": rng.random((64, shape.request)).astype(np.float32),
    }
    few = tuple(
        torch.from_numpy(rng.random(size).astype(np.float32))
        for size in ((2, 3, shape.replicas), (2, shape.request), (2, 3))
    )
    axes = {"replicas": {0: "batch", 1: "R"}, "request": {0: "batch"}, "mask": {0: "batch", 1: "R"}}
    graph = graph_of(Shortest(), few, GRAPH_INPUTS, "logits", axes)
    path = write_policy(tmp_path / "policy.onnx", "dispatch", graph, samples, extended=True)
    manifest = read_manifest(path)
    assert manifest.extended
    assert manifest.features["replicas"][-1] == "pushed_over_100"
    assert manifest.features["request"][-1] == "expected_tokens_spread"
    frozen = resolve_policy(str(path))
    assert frozen.needs & Group.LIMITS
    episodes = load_scenario("mixed-chat").episode(0, num_requests=200)
    simulator = Simulator(load_scenario("mixed-chat").spec, [episodes])
    checked = 0
    while simulator.advance()[0] == DECISION:
        seen, envs = observe_batch(simulator, frozen.needs)
        action = frozen.act(seen, envs)
        left = np.where(
            seen.mask[0, :-2], seen.replicas[0, ReplicaFeature.EXPECTED_TOKENS_LEFT], np.inf
        )
        assert left[action[0]] == left.min()
        checked += left.min() > 0
        simulator.apply(action)
    assert checked > 50
    (tmp_path / NAME).write_text(
        (tmp_path / NAME).read_text().replace('"schema_version": 2', '"schema_version": 1')
    )
    with pytest.raises(ExportError, match="speaks observation schema 1"):
        read_manifest(path)


def test_the_runtime_takes_an_exported_policy_and_knows_its_ranges(with_weights, samples):
    replicas, request, mask = samples
    runtime = PolicyRuntime(
        RuntimeConfig(policy=str(with_weights), max_metrics_age_s=1e6, timeout_s=60.0)
    )
    wide = np.zeros((1, NUM_REPLICA_FEATURES, replicas.shape[1]))
    asks = np.zeros((1, NUM_REQUEST_FEATURES))
    network = TorchPolicy(make_network())
    asked = 0
    for row in range(0, len(replicas), 7):
        wide[0, :NUM_OBSERVED_FEATURES] = replicas[row].T
        both = np.concatenate((mask[row] > 0, [False, False]))
        asks[0, :NUM_OBSERVED_REQUEST_FEATURES] = request[row]
        seen = Observations(wide, asks, both[None])
        decision = runtime.decide(seen, str(row))
        if decision.by == "policy":
            asked += 1
            assert decision.action == network.act(seen, np.zeros(1, np.int64))[0]
        else:
            assert decision.reason is Reason.OUT_OF_RANGE
    assert asked > 0.9 * len(range(0, len(replicas), 7))  # few are far from training's own
    wide[0, ReplicaFeature.OUTSTANDING_REQUESTS] = 1e5
    wide[0, ReplicaFeature.OUTSTANDING_PROMPT_TOKENS] = 1e8
    wide[0, ReplicaFeature.PENDING_PREFILL_TOKENS] = 1e8
    wide[0, ReplicaFeature.RECENT_TTFT_S] = 1e5
    assert runtime.decide(seen).reason is Reason.OUT_OF_RANGE


def test_frozen_policy_plays_the_same_runs_as_the_network(exported):
    scenario = load_scenario("mixed-chat")
    learned = TorchPolicy(make_network(), "torch")
    frozen = resolve_policy(str(exported))
    result = evaluate(scenario, [learned, frozen], loads=[0.7, 1.1], num_seeds=2, num_units=300)
    for a in (run for run in result.runs if run.policy == "torch"):
        (b,) = (
            run
            for run in result.runs
            if (run.policy, run.load, run.seed) == (frozen.name, a.load, a.seed)
        )
        assert a.metrics == b.metrics
    assert result.learned == ["torch", frozen.name]


@pytest.mark.parametrize(
    ("num_extra", "hold", "reject"),
    [(1, True, False), (1, False, True), (2, True, False), (2, False, True), (2, True, True)],
)
def test_frozen_policy_holds_and_rejects_as_the_network_does(tmp_path, num_extra, hold, reject):
    network = make_network(num_extra=num_extra)
    path = export_policy(network, tmp_path, draw(64, 6, num_extra, 0))
    replicas, request, mask = draw(2000, 6, 0, 1)
    mask[:200] = 0.0  # nothing but hold and reject is left
    wide = np.zeros((2000, NUM_REPLICA_FEATURES, 6))
    wide[:, :NUM_OBSERVED_FEATURES] = replicas.transpose(0, 2, 1)
    both = np.tile([hold, reject], (2000, 1))
    seen = Observations(wide, request.astype(float), np.concatenate((mask > 0, both), 1))
    envs = np.arange(2000)
    got = resolve_policy(str(path)).act(seen, envs)
    np.testing.assert_array_equal(got, TorchPolicy(network).act(seen, envs))
    assert (got[:200] >= 6).all()  # 6 holds, 7 rejects
    assert (got < 6).sum() > 200
    assert seen.mask[envs, got].all()


def test_export_that_answers_differently_is_refused_and_leaves_nothing(
    samples, tmp_path, monkeypatch
):
    network = make_network()
    real = torch.onnx.export

    def export_other(other, *arguments, **settings):
        changed = DispatchNetwork(network.config).eval()  # untrained weights
        return real(changed, *arguments, **settings)

    monkeypatch.setattr(from_torch.torch.onnx, "export", export_other)
    with pytest.raises(ExportError, match="differs from the network: largest logit error"):
        export_policy(network, tmp_path, samples)
    assert list(tmp_path.iterdir()) == []
