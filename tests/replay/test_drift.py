"""Known distortions are found with their size, place and time; where there is none, none is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servegym.replay.sentences import identifiability, sentence

from .live import play_live, scenario, slower
from .reading import drift_of


def within(effect, truth, slack=1.0):
    """Whether a factor's interval, `slack` times as wide, has the truth."""
    reach = slack * (math.log(effect.high) - math.log(effect.low)) / 2
    return abs(math.log(truth / effect.value)) <= reach


def test_an_exact_fleet_has_factors_of_one(exact):
    replicas = drift_of(exact).replicas
    assert replicas
    for replica in replicas:
        [stretch] = replica.stretches
        assert stretch.decode.value == pytest.approx(1.0, abs=1e-3)
        assert stretch.prefill.value == pytest.approx(1.0, abs=5e-3)
        assert sentence(replica) == (
            f"replica {replica.name}: decode as expected; prefill as expected"
        )


def test_noise_is_no_drift(noisy_drift):
    found = noisy_drift
    assert not any(stretch.drifted for r in found.replicas for stretch in r.stretches)
    assert all(len(replica.stretches) == 1 for replica in found.replicas)
    assert (found.factors().values == 1.0).all()
    for replica in found.replicas:
        assert within(replica.now.decode, 1.0, slack=1.5)


def test_a_replica_that_slows_down_is_found_with_factor_and_time(slowed_drift):
    first, second, third = slowed_drift.replicas
    assert not any(stretch.drifted for r in (first, third) for stretch in r.stretches)
    before, after = second.stretches
    assert not before.drifted
    assert after.begin_s == pytest.approx(60.0, abs=5.0)
    assert after.decode.drifted
    assert within(after.decode, 1.3, slack=1.25)
    assert after.decode.high - after.decode.low < 0.15
    assert not after.prefill.drifted
    assert "s on decode 1.3" in sentence(second)
    assert sentence(second).endswith("slower than its cost model; prefill as expected")


@pytest.mark.slow
def test_prefill_and_time_outside_the_engine_are_told_from_decode(tmp_path):
    play_live(
        tmp_path,
        scenario(),
        noise=0.05,
        distorted={0: slower(1.0, 1.0, 0.8)},
        request_s=0.01,
    )
    found = drift_of(tmp_path).replicas
    [stretch] = found[0].stretches
    assert stretch.prefill.drifted
    assert within(stretch.prefill, 0.8, slack=1.25)
    assert not stretch.decode.drifted
    assert "faster than its cost model" in sentence(found[0])
    for replica in found:
        request = replica.now.terms["request"]
        assert request.drifted
        assert request.low - 5e-4 <= 0.01 <= request.high + 5e-4


def test_terms_that_always_come_together_are_said_to(slowed_drift):
    said = [identifiability(replica.now) for replica in slowed_drift.replicas]
    assert any("step and kv cannot be told apart" in text for text in said)


def test_a_replica_with_few_requests_is_not_judged(tmp_path):
    play_live(tmp_path, scenario(), num_requests=60)
    found = drift_of(tmp_path).replicas
    assert any(not replica.stretches for replica in found)
    few = next(replica for replica in found if not replica.stretches)
    assert "too few requests to tell" in sentence(few)


def test_a_small_deviation_matters_only_below_the_tolerance(tmp_path):
    play_live(tmp_path, scenario(), num_requests=500, distorted={0: slower(1.05, 1.05, 1.05)})
    assert drift_of(tmp_path).replicas[0].now.decode.drifted
    wide = drift_of(tmp_path, tolerance=0.1).replicas[0].now
    assert not wide.decode.drifted
    assert wide.decode.value == pytest.approx(1.05, abs=2e-3)


@pytest.mark.slow
def test_estimates_do_not_lean_to_a_side(tmp_path):
    errors = []
    for seed in range(4):
        folder = tmp_path / str(seed)
        play_live(
            folder,
            scenario(),
            num_requests=700,
            seed=seed + 20,
            noise=0.05,
            distorted={1: slower(1.3, 1.3, 1.0)},
        )
        now = drift_of(folder).replicas[1].now
        errors.append([math.log(now.decode.value / 1.3), math.log(now.prefill.value)])
    assert np.abs(np.mean(errors, axis=0)).max() < 0.02
    assert np.abs(np.array(errors)[:, 0]).max() < 0.03
