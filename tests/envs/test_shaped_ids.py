"""The ids with defaults that stock algorithms learn from, and the costs they show."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from servegym.baselines.added_delay import added_delay
from servegym.envs.costs import COST_FEATURES, cost_features
from servegym.envs.dispatch import DispatchEnv
from servegym.errors import ConfigError

NAMES = [f.name for f in COST_FEATURES]


@pytest.fixture
def shaped_id(problem) -> str:
    return problem.env_id.replace("-v", "Shaped-v")


def test_shaped_form_passes_the_checker_and_is_one_bounded_vector(problem, shaped_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(shaped_id, **problem.settings)
        check_env(env.unwrapped)
    space = env.observation_space
    assert isinstance(space, gymnasium.spaces.Box)
    assert len(space.shape) == 1
    assert space.low.min() >= -1.0
    assert space.high.max() <= 1.0


def test_shaped_form_is_the_other_with_arguments(problem, shaped_id):
    settings = {
        "shaping": "cost-to-go",
        "reward_scale": "auto",
        "normalise": True,
        "flat": True,
        "invalid_action": "resample",
        **problem.settings,
    }
    if "Dispatch" in shaped_id:
        settings |= {"features": "costs", "num_requests": 1024}
    shaped = gymnasium.make(shaped_id, **problem.settings).unwrapped
    same = gymnasium.make(problem.env_id, **settings).unwrapped
    np.testing.assert_array_equal(shaped.reset(seed=0)[0], same.reset(seed=0)[0])
    done = False
    while not done:
        action = int(shaped.action_masks().argmax())
        seen, reward, done, _, _ = shaped.step(action)
        want, expected, *_ = same.step(action)
        np.testing.assert_array_equal(seen, want)
        assert reward == expected


def test_vector_forms_are_made_by_id(problem, shaped_id):
    sb3 = pytest.importorskip("stable_baselines3")
    from servegym.envs.sb3 import make_vec

    vector = gymnasium.make_vec(shaped_id, num_envs=2, **problem.settings)
    envs = make_vec(shaped_id, 2, **problem.settings)
    assert envs.observation_space == vector.unwrapped.single_observation_space
    for algorithm, settings in ((sb3.A2C, {}), (sb3.PPO, {"batch_size": 16})):
        model = algorithm("MlpPolicy", envs, n_steps=8, seed=0, device="cpu", **settings)
        model.learn(32)
        assert model.num_timesteps == 32
    with pytest.raises(ConfigError, match=r"unknown environment 'servegym/Dispatch-v7'"):
        make_vec("servegym/Dispatch-v7", 2)


def test_costs_are_those_of_the_rule(make_scenario):
    env = DispatchEnv(make_scenario(), load=3.0, features="costs")
    rule = added_delay()
    rule.reset(1, 0)
    seen, _ = env.reset(seed=0)
    agreed, done = 0, False
    while not done:
        assert seen in env.observation_space
        best = int(seen["replicas"][:, NAMES.index("cost")].argmin())
        assert seen["replicas"][best, NAMES.index("excess")] == 0.0
        raw = np.ascontiguousarray(env.batch.replicas[0].T, np.float64)
        request = env.batch.request[0].astype(np.float64)
        mask = np.array([*(env.batch.mask[0] == 1), False, False])
        agreed += best == rule.decide(raw, request, mask, rule.params, rule.memory[0], rule.rng[0])
        seen, _, done, _, _ = env.step(best)
    assert agreed == 40


def test_costs_by_hand():
    replicas = np.zeros((1, 3, 21), np.float32)
    # half as fast in everything: an excess of log 2 over log 4
    replicas[0, 2, [0, 1, 3, 9, 10, 11, 13]] = [1, 4, 500, 500, 0.02, 0.002, 8]
    replicas[0, 2, 20] = 100
    replicas[0, 0, [0, 1, 3, 9, 10, 11, 13, 17, 20]] = [1, 4, 500, 1000, 0.01, 0.001, 8, 0.25, 100]
    request = np.array([[300, 50, 1.4, 0.014, 0.0, 0, 0, 0, 0]], np.float32)
    found = cost_features(replicas, request)
    assert not found[0, 1].any()  # absent
    assert found[0, 2, NAMES.index("excess")] == pytest.approx(0.5, abs=1e-6)
    queue, prefill, decode, delay = 0.5, 0.2, 50 * 0.014, 4 * (0.2 + 50 * 0.001)
    seconds = np.array([queue, prefill, decode, delay, queue + prefill + decode + delay])
    np.testing.assert_allclose(
        found[0, 0],
        [
            1.0,
            0.5,
            0.25,
            *np.log1p(seconds / 0.1) / np.log1p(2000.0),
            0.0,
            0.5 * 0.7 / 1.4,
            0.5,
        ],
        rtol=1e-5,
    )


def test_a_model_is_judged_by_the_harness_as_it_was_trained(make_scenario):
    pytest.importorskip("torch")
    from servegym.agents.sb3_policy import StockPolicy
    from servegym.baselines.least_outstanding import least_outstanding
    from servegym.evaluate.harness import evaluate

    scenario = make_scenario()
    batch = DispatchEnv(scenario, features="costs", normalise=True, flat=True).batch
    width, columns = batch.width, len(COST_FEATURES)

    class FewestSeats:
        """Stands for a model: reads the observation, chooses the replica with fewest requests."""

        def predict(self, seen, deterministic, action_masks=None):
            assert seen.shape[1:] == batch.observer.space.shape
            rows = seen[:, : width * columns].reshape(-1, width, columns)
            seats = rows[..., NAMES.index("seats")]
            if action_masks is not None:
                seats = np.where(action_masks, seats, np.inf)
            return seats.argmin(-1), None

    model = FewestSeats()
    policies = [
        StockPolicy(model, batch, name, masked=masked, deterministic=True)
        for name, masked in (("masked", True), ("plain", False))
    ]
    result = evaluate(scenario, [least_outstanding(), *policies], num_seeds=2)
    want = result.values("least-outstanding", 1.0, "e2e_mean_s")
    for policy in policies:
        got = result.values(policy.name, 1.0, "e2e_mean_s")
        np.testing.assert_allclose(got, want, rtol=1e-12)
