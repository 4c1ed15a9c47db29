"""The single environment: Gymnasium's contract, masks, seeds, holds, rejections and padding."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics, TimeLimit

from servegym.envs.dispatch import DispatchEnv
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.policy.contract import ReplicaFeature, RequestFeature, observed
from servegym.policy.layout import scenario_actions
from servegym.scenario import scenario_names

ENV_ID = "servegym/Dispatch-v1"
OUTSTANDING = ReplicaFeature.OUTSTANDING_REQUESTS
WAITED, NUM_UP, NUM_HELD = (
    RequestFeature.WAITED_S,
    RequestFeature.NUM_UP,
    RequestFeature.NUM_HELD,
)
CRASHES = {
    "predictor": {"kind": "lognormal", "sigma": 0.5},
    "fail_stop": {"rate_per_replica_hour": 7200.0, "recovery_s": 0.3},
}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", scenario_names())
def test_bundled_scenario_passes_the_environment_checker_without_warnings(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, scenario=name, num_requests=30).unwrapped)


@pytest.mark.parametrize(
    "changes",
    [
        {"actions": {"hold": True, "reject": True}},
        {"actions": {"reject": True}},
        {"objective": "goodput"},
        {"fleet": [{"gpu": "L40S", "count": 1}]},
    ],
)
def test_own_scenario_passes_the_environment_checker_without_warnings(make_scenario, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, scenario=make_scenario(**changes)).unwrapped)


@pytest.mark.parametrize("env_id", [ENV_ID, f"servegym:{ENV_ID}"])
def test_make_knows_the_environment(env_id):
    env = gymnasium.make(env_id, num_requests=5)
    assert isinstance(env.unwrapped, DispatchEnv)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    steps = 0
    done = False
    while not done:
        observation, _, done, truncated, _ = env.step(0)
        assert observation in env.observation_space
        assert not truncated
        steps += 1
    assert steps == 5  # one decision a request


def test_extended_features_follow_the_others_and_change_nothing_else():
    plain = gymnasium.make(ENV_ID, num_requests=120)
    env = gymnasium.make(ENV_ID, num_requests=120, features="extended")
    check_env(gymnasium.make(ENV_ID, num_requests=30, features="extended").unwrapped)
    want, _ = plain.reset(seed=3)
    got, _ = env.reset(seed=3)
    rows, entries = observed(extended=False)
    ratios, lengths = [], []
    for step in range(120):
        assert got in env.observation_space
        np.testing.assert_array_equal(got["replicas"][:, :rows], want["replicas"])
        np.testing.assert_array_equal(got["request"][:entries], want["request"])
        ratios += got["replicas"][:, ReplicaFeature.STEP_TIME_RATIO].tolist()
        lengths.append(got["request"][RequestFeature.EXPECTED_TOKENS])
        want, *_ = plain.step(step % 8)
        got, *_ = env.step(step % 8)
    assert min(ratios) < max(ratios)
    assert min(ratios) > 0.3
    assert min(lengths) > 1


def test_spec_can_be_written_as_json():
    spec = gymnasium.make(ENV_ID, num_requests=5).spec
    assert type(spec).from_json(spec.to_json()).kwargs["num_requests"] == 5


def test_three_forms_of_the_mask_agree_while_replicas_crash(make_scenario, choose):
    env = DispatchEnv(make_scenario(disturbances=CRASHES, actions={"reject": True}))
    observation, info = env.reset(seed=1)
    env.action_space.seed(1)
    fewest, done = env.action_space.n, False
    while not done:
        mask = info["action_mask"]
        assert mask.dtype == np.int8
        np.testing.assert_array_equal(observation["action_mask"], mask)
        np.testing.assert_array_equal(env.action_masks(), mask == 1)
        fewest = min(fewest, int(mask.sum()))
        observation, _, done, _, info = env.step(env.action_space.sample(mask))
    assert fewest < env.action_space.n  # some mask did forbid something


def test_equal_seeds_give_equal_bytes_and_others_do_not(make_scenario):
    def play(seed: int) -> bytes:
        env = DispatchEnv(make_scenario())
        observation, _ = env.reset(seed=seed)
        parts, done, i = [], False, 0
        while not done:
            parts += [v.tobytes() for v in observation.values()]
            observation, reward, done, _, info = env.step(i % 3)
            parts.append(np.array([reward, info["dt_s"]]).tobytes())
            i += 1
        return b"".join(parts)

    assert play(3) == play(3)
    assert play(3) != play(4)


def test_episodes_differ_until_the_seed_is_given_again(make_scenario):
    env = DispatchEnv(make_scenario())
    first, _ = env.reset(seed=5)
    second, _ = env.reset()
    third, _ = env.reset()
    assert not same(first, second)
    assert not same(second, third)
    assert same(first, env.reset(seed=5)[0])
    assert same(second, env.reset()[0])


def test_seed_reproduces_through_wrappers_which_record_the_return(make_scenario):
    def play() -> tuple[float, int, float]:
        env = gymnasium.make(ENV_ID, scenario=make_scenario())
        env = RecordEpisodeStatistics(FlattenObservation(TimeLimit(env, 1000)))
        observation, _ = env.reset(seed=7)
        assert observation.shape == env.observation_space.shape
        total, done = 0.0, False
        while not done:
            _, reward, done, _, info = env.step(1)
            total += reward
        return info["episode"]["r"], info["episode"]["l"], total

    recorded, length, total = play()
    assert length == 40
    assert recorded == pytest.approx(total)
    assert play() == (recorded, length, total)


@pytest.mark.parametrize("action", [-1, 3, 5, 6, 10**6])
def test_invalid_action_is_refused_with_the_allowed_ones_and_changes_nothing(make_scenario, action):
    env, other = (DispatchEnv(make_scenario(), r_max=6) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(InvalidAction, match=rf"action {action} .* choose one of \[0, 1, 2\]"):
        env.step(action)
    got, want = env.step(2), other.step(2)
    assert same(got[0], want[0])
    assert got[1] == want[1]


def test_step_needs_a_reset_before_and_after_an_episode(make_scenario):
    env = DispatchEnv(make_scenario(), num_requests=1)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    assert env.step(0)[2]
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(0)


def test_held_request_comes_back_after_its_hold(make_scenario, make_episode):
    env = DispatchEnv(make_scenario(actions={"hold": True, "reject": True, "hold_s": 0.25}))
    assert env.action_space.n == 5
    env.reset(options={"episode": make_episode([1.0, 1.1])})
    hold = 3
    # at 1.1 s the second request arrives while the first is held
    observation, _, _, _, info = env.step(hold)
    assert info["dt_s"] == pytest.approx(0.1)
    assert observation["request"][NUM_HELD] == 1
    # at 1.25 s the first one is back; the second is at replica 0, which it takes 10 steps to leave
    observation, _, done, _, info = env.step(0)
    assert not done
    assert info["now_s"] == pytest.approx(1.25)
    assert observation["request"][WAITED] == pytest.approx(0.25)
    assert observation["request"][NUM_HELD] == 0


def test_held_request_counts_as_in_the_system(make_scenario, make_episode):
    env = DispatchEnv(make_scenario(actions={"hold": True, "hold_s": 0.25}))
    env.reset(options={"episode": make_episode([0.0])})
    _, reward, done, _, info = env.step(3)
    assert (reward, done, info["dt_s"]) == (-0.25, False, 0.25)  # one request for 0.25 s


@pytest.mark.parametrize(
    ("actions", "reject"), [({"reject": True}, 3), ({"hold": True, "reject": True}, 4)]
)
def test_rejecting_everything_costs_no_latency(make_scenario, make_episode, actions, reject):
    env = DispatchEnv(make_scenario(actions=actions))
    env.reset(options={"episode": make_episode([0.0, 2.0])})
    _, first, done, _, info = env.step(reject)
    assert (first, done, info["dt_s"]) == (0.0, False, 2.0)
    _, second, done, _, info = env.step(reject)
    assert (second, done) == (0.0, True)
    assert info["episode_metrics"]["num_rejected"] == 2


@pytest.mark.parametrize("reject", [False, True])
@pytest.mark.parametrize("hold", [False, True])
def test_masks_are_the_columns_of_the_scenario_s_actions(make_scenario, hold, reject):
    env = DispatchEnv(make_scenario(actions={"hold": hold, "reject": reject}), r_max=5)
    observation, _ = env.reset(seed=0)
    own = scenario_actions(5, hold=hold, reject=reject)
    assert env.action_space.n == len(own) == 5 + hold + reject
    allowed = env.batch.simulator.state.allowed[0]
    assert observation["action_mask"].tolist() == allowed[own].tolist()
    assert allowed.tolist() == [True] * 3 + [False] * 2 + [hold, reject]


def test_rows_of_absent_replicas_are_zero_and_masked(make_scenario):
    fleet = [{"gpu": "H100-SXM-80GB", "count": [1, 3]}, {"gpu": "L40S", "count": [1, 3]}]
    env = DispatchEnv(make_scenario(fleet=fleet), r_max=9)
    assert env.observation_space["replicas"].shape[0] == env.action_space.n == 9
    sizes = set()
    for seed in range(12):
        observation, info = env.reset(seed=seed)
        for _ in range(20):
            size = int(observation["request"][NUM_UP])
            assert 2 <= size <= 6
            np.testing.assert_array_equal(info["action_mask"], [1] * size + [0] * (9 - size))
            assert (observation["replicas"][:size, ReplicaFeature.UP] == 1).all()
            assert not observation["replicas"][size:].any()
            assert observation in env.observation_space
            observation, _, _, _, info = env.step(size - 1)
        sizes.add(size)
    assert len(sizes) >= 3


def test_observation_counts_what_was_dispatched(make_scenario, make_episode):
    env = DispatchEnv(make_scenario())
    observation, _ = env.reset(options={"episode": make_episode([0.0, 0.0, 0.0, 60.0])})
    counts = [observation["replicas"][:, OUTSTANDING].tolist()]
    for action in (0, 2, 2):
        observation, *_ = env.step(action)
        counts.append(observation["replicas"][:, OUTSTANDING].tolist())
    # three arrive at once; after a minute all have been answered
    assert counts == [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_returned_arrays_are_never_written_again(make_scenario):
    env = DispatchEnv(make_scenario())
    observation, info = env.reset(seed=0)
    kept = {k: v.copy() for k, v in observation.items()}
    for _ in range(5):
        env.step(0)
    assert same(observation, kept)
    np.testing.assert_array_equal(info["action_mask"], kept["action_mask"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"r_max": 2}, r"r_max \(2\) must be at least the 3 replicas"),
        ({"objective": "speed"}, "objective must be one of latency, goodput, got 'speed'"),
        ({"reward_scale": 0.0}, 'reward_scale must be above 0 or "auto", got 0'),
        ({"render_mode": "human"}, "render_mode must be None, rgb_array or ansi, got 'human'"),
    ],
)
def test_wrong_setting_is_refused(make_scenario, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DispatchEnv(make_scenario(), **settings)


@pytest.mark.parametrize("settings", [{"load": 0.0}, {"load": float("nan")}, {"num_requests": 0}])
def test_impossible_episode_is_refused_at_reset(make_scenario, settings):
    env = DispatchEnv(make_scenario(), **settings)
    with pytest.raises(ConfigError, match=next(iter(settings))):
        env.reset(seed=0)


def test_docstring_tabulates_every_observed_feature():
    for feature in ("outstanding_requests", "prefix_hit_tokens", "predicted_output_tokens"):
        assert f"| `{feature}` |" in DispatchEnv.__doc__
    assert "what_if" not in DispatchEnv.__doc__
