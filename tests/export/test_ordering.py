"""Learned orders as files."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from servegym.baselines.ordering.registry import ordering_policy
from servegym.errors import ExportError
from servegym.export.ordering import load_ordering, save_ordering, write_ordering_manifest
from servegym.policy.learned_ordering import OrderingWeights
from servegym.policy.ordering import NUM_ORDERING_FEATURES, OrderingFeature

REMAINING = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])
RUNNING = int(OrderingFeature["IS_RUNNING"])


def shortest_first(victim_sign=1.0):
    """One hidden unit that holds log(1 + remaining), passed on to both heads."""
    w0 = np.zeros((NUM_ORDERING_FEATURES, 1), np.float32)
    w0[REMAINING, 0] = 1.0
    return OrderingWeights(
        mean=np.zeros(NUM_ORDERING_FEATURES, np.float32),
        scale=np.ones(NUM_ORDERING_FEATURES, np.float32),
        weights=(w0, np.array([[1.0, victim_sign]], np.float32)),
        biases=(np.zeros(1, np.float32), np.array([0.0, 0.5], np.float32)),
    )


def random_weights(rng):
    widths = (NUM_ORDERING_FEATURES, 16, 8, 2)
    pairs = list(pairwise(widths))
    return OrderingWeights(
        mean=rng.normal(size=widths[0]).astype(np.float32),
        scale=rng.uniform(0.5, 2, widths[0]).astype(np.float32),
        weights=tuple(rng.normal(size=p).astype(np.float32) for p in pairs),
        biases=tuple(rng.normal(size=n).astype(np.float32) for _, n in pairs),
    )


def samples(rng, n=40):
    features = rng.lognormal(2, 2, (n, NUM_ORDERING_FEATURES))
    features[:, RUNNING] = rng.integers(0, 2, n)
    return features


@pytest.fixture
def saved(tmp_path):
    return save_ordering(shortest_first(), tmp_path / "mine", samples(np.random.default_rng(0)))


def test_each_head_scores_its_own_set(tmp_path):
    path = save_ordering(shortest_first(-1.0), tmp_path, samples(np.random.default_rng(0)))
    features = np.zeros((4, NUM_ORDERING_FEATURES))
    features[:, REMAINING] = (1, 3, 1, 3)
    features[2:, RUNNING] = 1
    got = load_ordering(path).score(features, np.zeros((4, 0)))
    wanted = [np.log(2), np.log(4), 0.5 - np.log(2), 0.5 - np.log(4)]
    assert got == pytest.approx(wanted, abs=1e-6)
    assert got.dtype == np.float64


def test_a_network_gives_what_its_definition_says(tmp_path):
    rng = np.random.default_rng(1)
    weights, features = random_weights(rng), samples(rng)
    path = save_ordering(weights, tmp_path / "net", features)
    policy = load_ordering(path)
    assert policy.name == "net"
    for row, got in zip(features, policy.score(features, np.zeros((40, 0))), strict=True):
        x = np.clip((np.sign(row) * np.log1p(np.abs(row)) - weights.mean) / weights.scale, -10, 10)
        x = np.maximum(x @ weights.weights[0] + weights.biases[0], 0)
        x = np.maximum(x @ weights.weights[1] + weights.biases[1], 0)
        scores = x @ weights.weights[2] + weights.biases[2]
        assert got == pytest.approx(scores[int(row[RUNNING])], rel=1e-4, abs=1e-4)


def test_powers_are_written_and_make_footprint(tmp_path):
    rng = np.random.default_rng(0)
    powers = np.array([[1.0, 3.293], [1.0, -1.81]])
    still = tuple(np.zeros_like(w) for w in shortest_first().weights)
    zeros = tuple(np.zeros_like(b) for b in shortest_first().biases)
    weights = shortest_first()._replace(weights=still, biases=zeros, powers=powers)
    features, memory = samples(rng, 200), np.zeros((200, 0))
    features[:, REMAINING] = np.maximum(features[:, REMAINING], 1.0)
    got = load_ordering(save_ordering(weights, tmp_path, features)).score(features, memory)
    rule = ordering_policy("footprint:weight=3.293,victim_weight=-1.81")
    np.testing.assert_allclose(got, np.log(rule.score(features, memory)), rtol=1e-12, atol=1e-12)
    with pytest.raises(ExportError, match=r"powers must be two of each score, got \(2,\)"):
        save_ordering(weights._replace(powers=powers[0]), tmp_path, features)


def test_the_manifest_states_the_range_of_each_feature(saved):
    manifest = json.loads((saved.parent / "manifest.json").read_text())
    assert manifest["features"]["requests"][REMAINING] == "predicted_remaining_tokens"
    low, high = manifest["ranges"]["requests"][RUNNING]
    assert (low, high) == (0, 1)


def test_a_changed_file_is_refused(saved):
    with saved.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ExportError, match="is not the file its manifest was written for"):
        load_ordering(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "speaks ordering schema 9"),
        ({"features": ["a"]}, "speaks ordering schema"),
        ({"problem": "dispatch"}, "is a policy of problem dispatch, and this is problem order"),
        ({"more": 1}, "is not a policy manifest"),
    ],
)
def test_another_schema_is_refused(saved, change, message):
    beside = saved.parent / "manifest.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | change))
    with pytest.raises(ExportError, match=message):
        load_ordering(saved)


def test_a_missing_or_foreign_file_is_refused(saved, tmp_path):
    with pytest.raises(ExportError, match=r"must be a file in \.npz or \.onnx"):
        load_ordering(tmp_path / "order.pkl")
    with pytest.raises(ExportError, match=r"must exist with a manifest\.json"):
        load_ordering(tmp_path / "none.npz")
    saved.write_bytes(b"PK nonsense")
    write_ordering_manifest(saved, samples(np.random.default_rng(0)), information="blind")
    with pytest.raises(ExportError, match="cannot be read as an order"):
        load_ordering(saved)


def test_pickles_are_not_read(saved):
    np.savez(saved, mean=np.array([{"a": 1}], object))
    write_ordering_manifest(saved, samples(np.random.default_rng(0)), information="blind")
    with pytest.raises(ExportError, match=r"cannot be read as an order.*allow_pickle"):
        load_ordering(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": np.zeros(NUM_ORDERING_FEATURES, np.float32)}, "scales greater than 0"),
        ({"mean": np.zeros(3, np.float32)}, "mean and scale must have"),
        ({"biases": (np.zeros(2, np.float32), np.zeros(2, np.float32))}, "must lead from"),
        ({"weights": (np.full((NUM_ORDERING_FEATURES, 1), np.nan, np.float32),)}, "must lead from"),
    ],
)
def test_layers_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ExportError, match=message):
        save_ordering(
            shortest_first()._replace(**change), tmp_path, samples(np.random.default_rng(0))
        )
    assert not (tmp_path / "ordering.npz").exists()


def graph(path, num_scores=2):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.zeros((NUM_ORDERING_FEATURES, num_scores), np.float32)
    weight[REMAINING] = np.arange(1, num_scores + 1)
    features = helper.make_tensor_value_info(
        "features", TensorProto.FLOAT, ["n", NUM_ORDERING_FEATURES]
    )
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", num_scores])
    node = helper.make_node("MatMul", ["features", "weight"], ["scores"])
    made = helper.make_graph(
        [node], "order", [features], [scores], [numpy_helper.from_array(weight, "weight")]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    write_ordering_manifest(path, samples(np.random.default_rng(0)), information="blind")


def test_a_graph_is_run_by_onnx_runtime(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "order.onnx"
    graph(path)
    policy = load_ordering(path)
    features = np.zeros((2, NUM_ORDERING_FEATURES))
    features[:, REMAINING] = 3
    features[1, RUNNING] = 1
    assert policy.information == "blind"
    assert policy.score(features, np.zeros((2, 0))).tolist() == [3.0, 6.0]


def test_a_graph_with_other_outputs_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "order.onnx"
    graph(path, num_scores=3)
    with pytest.raises(ExportError, match=r"two scores a request, gave \(3, 3\)"):
        load_ordering(path)
