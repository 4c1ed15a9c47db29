"""The log as arrays for offline learning."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    ReplicaFeature,
    RequestFeature,
)
from servegym.replay.dataset import read_dataset

from .reading import load


def test_what_was_seen_done_and_came_of_it(exact, tmp_path):
    data = read_dataset([exact])
    log = load(exact)[0]
    assert data.replicas.shape == (400, NUM_OBSERVED_FEATURES, 3)
    assert data.request.shape == (400, NUM_OBSERVED_REQUEST_FEATURES)
    assert data.mask.shape == (400, 5)
    assert (np.diff(data.time_s) >= 0).all()
    np.testing.assert_array_equal(data.action, log.replica[data.request_id])
    np.testing.assert_allclose(data.e2e_s, log.e2e_s[data.request_id])
    np.testing.assert_array_equal(
        data.request[:, RequestFeature["PROMPT_TOKENS"]], log.table.prompt_tokens[data.request_id]
    )
    assert data.mask[np.arange(400), data.action].all()
    assert data.by_policy.all()
    assert data.is_last.all()
    assert np.isnan(data.propensity).all()
    # the rule of this log takes a replica with the fewest outstanding requests
    outstanding = data.replicas[:, ReplicaFeature["OUTSTANDING_REQUESTS"]]
    chosen = outstanding[np.arange(400), data.action]
    np.testing.assert_array_equal(chosen, outstanding.min(axis=1))
    data.save(tmp_path / "d.npz")
    with np.load(tmp_path / "d.npz") as file:
        np.testing.assert_array_equal(file["action"], data.action)


def test_a_log_without_observations_says_how_to_get_them(noisy):
    with pytest.raises(WorkloadError, match="observations: true"):
        read_dataset([noisy])


def test_observations_of_another_contract_are_refused(exact, tmp_path):
    line = json.loads(next(iter(exact.iterdir())).read_text().splitlines()[0])
    seen = line["decisions"][0]["observation"]
    seen["replicas"] = [row[:-1] for row in seen["replicas"]]
    path = tmp_path / "requests-1.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(WorkloadError, match="this version's contract"):
        read_dataset([path])


def test_propensities_are_taken_where_they_are_logged(exact, tmp_path):
    line = json.loads(next(iter(exact.iterdir())).read_text().splitlines()[0])
    line["decisions"][0]["propensity"] = 0.25
    path = tmp_path / "requests-1.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert read_dataset([path]).propensity.tolist() == [0.25]
