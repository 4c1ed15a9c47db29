"""What users of Gymnasium expect of every environment, in all its forms."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import re
import warnings

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RenderCollection, TimeLimit

from servegym.cluster.outcome import within_slo
from servegym.envs.preemption import PreemptionEnv
from servegym.errors import ConfigError, EnvironmentClosed, InvalidAction, ResetNeeded


def assert_same(got, want, path="") -> None:
    """Compare observations or infos: kinds, dtypes, shapes and every number."""
    assert type(got) is type(want), path
    if isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for key in want:
            assert_same(got[key], want[key], f"{path}/{key}")
    elif isinstance(want, np.ndarray) and want.dtype == object:
        assert got.dtype == object, path
        for e, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{path}/{e}")
    elif isinstance(want, np.ndarray):
        assert got.dtype == want.dtype, path
        np.testing.assert_array_equal(got, want, err_msg=path)
    else:
        assert got == want, path


def allowed(mask, rng):
    return (rng.random(mask.shape) * mask).argmax(-1)


def without_input_ids(info):
    """Drop what differs: a single environment is always the first."""
    return {
        key: without_input_ids(value) if isinstance(value, dict) else value
        for key, value in info.items()
        if key not in ("input_id", "_input_id")
    }


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("max_steps", [None, 7])
@pytest.mark.parametrize(
    "settings", [{}, {"invalid_action": "penalise", "normalise": True, "flat": True}]
)
def test_vector_form_is_like_gymnasiums_own(problem, mode, max_steps, settings):
    settings = {**problem.settings, **settings}

    def single():
        env = problem.single(**settings)
        return env if max_steps is None else TimeLimit(env, max_steps)

    ours = problem.vector(3, autoreset_mode=mode, max_episode_steps=max_steps, **settings)
    theirs = SyncVectorEnv([single] * 3, autoreset_mode=mode)
    assert ours.autoreset_mode is theirs.autoreset_mode
    assert ours.metadata == theirs.metadata
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.observation_space == theirs.observation_space
    assert ours.single_action_space == theirs.single_action_space
    assert ours.action_space == theirs.action_space

    def check(got, want):
        assert len(got) == len(want)
        for a, b in zip(got[:-1], want[:-1], strict=True):
            assert_same(a, b)
        assert_same(without_input_ids(got[-1]), without_input_ids(want[-1]))
        assert got[0] in ours.observation_space

    got, want = ours.reset(seed=[5, 6, 7]), theirs.reset(seed=[5, 6, 7])
    check(got, want)
    rng, ends = np.random.default_rng(0), np.zeros(2, int)
    for step in range(60):
        masks = ours.action_masks()
        actions = allowed(masks, rng)
        if step % 5 == 0 and "invalid_action" in settings:
            actions[step % 3] = (masks[step % 3]).argmin()  # a forbidden one
        got, want = ours.step(actions), theirs.step(actions)
        check(got, want)
        assert got[1].dtype == np.float64
        ends += got[2].sum(), got[3].sum()
        over = got[2] | got[3]
        if mode is AutoresetMode.DISABLED and over.any():
            with pytest.raises(ResetNeeded, match="reset_mask"):
                ours.step(actions)
            got = ours.reset(options={"reset_mask": over})
            check(got, theirs.reset(options={"reset_mask": over.copy()}))
    assert ends[0 if max_steps is None else 1] >= 2


def test_info_has_the_same_keys_at_every_step_and_results_at_the_last(problem):
    env = problem.single(**problem.settings)
    _, first = env.reset(seed=0)
    info, done = first, False
    while not done:
        assert not any(info["episode_metrics"].values())
        _, _, done, _, info = env.step(env.action_space.sample())
        assert info.keys() == first.keys()
        assert info["episode_metrics"].keys() == first["episode_metrics"].keys()
    assert all(np.isfinite(list(info["episode_metrics"].values())))
    assert next(iter(info["episode_metrics"].values())) > 0


def test_goodput_is_reported():
    env = gymnasium.make("servegym/Dispatch-v1", scenario="slo-chat", num_requests=40)
    env.reset(seed=0)
    done, total = False, 0.0
    while not done:
        _, reward, done, _, info = env.step(env.action_space.sample())
        total += reward
    metrics = info["episode_metrics"]
    simulator = env.unwrapped.batch.simulator
    outcomes, due_s = simulator.outcomes(0), simulator.episodes[0].table.arrival_s
    good = within_slo(outcomes, simulator.spec)
    assert metrics["slo_attainment"] == good.mean() > 0
    by_then = outcomes["arrival_s"] <= due_s[-1]  # who waited longer for an answer is not counted
    assert metrics["goodput_rps"] == pytest.approx(good[by_then].sum() / (due_s[-1] - due_s[0]))
    assert not by_then.all()
    assert total > 0


@pytest.mark.parametrize("vector", [False, True])
def test_forbidden_actions_are_refused_replaced_or_penalised(problem, vector):
    def play(actions, **settings):
        env = (problem.vector if vector else problem.single)(**problem.settings, **settings)
        _, info = env.reset(seed=3)
        rewards, wrong = [], []
        for action in actions:
            batch = env.unwrapped.batch
            action = int(batch.mask[0].argmin()) if action == "forbidden" else action
            action = int(batch.mask[0].argmax()) if action == "first" else action
            _, reward, *_, info = env.step(np.array([action]) if vector else action)
            rewards.append(float(np.squeeze(reward)))
            wrong.append(bool(np.squeeze(info.get("invalid_action", False))))
        return rewards, wrong

    with pytest.raises(InvalidAction):
        play(["forbidden"])
    mixed = ["forbidden", "first", 10**6, -1]
    resampled, wrong = play(mixed, invalid_action="resample")
    assert wrong == [True, False, True, True]
    penalised, wrong = play(mixed, invalid_action="penalise", invalid_penalty=2.5)
    assert wrong == [True, False, True, True]
    # the same actions are drawn: only the penalty differs
    np.testing.assert_allclose(np.subtract(resampled, penalised), [2.5, 0, 2.5, 2.5])
    assert play(mixed, invalid_action="resample")[0] == resampled


def test_replacements_do_not_depend_on_the_other_environments(problem):
    def play(num_envs):
        env = problem.vector(num_envs, **problem.settings, invalid_action="resample")
        env.reset(seed=1)
        return [env.step(np.full(num_envs, -1))[1][1] for _ in range(8)]

    assert play(2) == play(4)


def test_replacements_differ_and_cover_what_is_allowed(make_scenario):
    env = gymnasium.make_vec(
        "servegym/Dispatch-v1", 64, scenario=make_scenario(), invalid_action="resample"
    )
    env.reset(seed=0)
    env.step(np.full(64, 99))
    chosen = env.unwrapped.batch.simulator.state.request["replica"][:, 0]
    counts = np.bincount(chosen, minlength=3)
    assert (counts > 8).all()  # 21 each, with a standard deviation of 4


def test_sampled_actions_are_allowed(problem):
    env = problem.vector(4, **problem.settings)
    env.reset(seed=0)
    env.action_space.seed(0)
    seen = set()
    for _ in range(40):
        actions = env.action_space.sample()
        assert actions in env.action_space
        assert env.action_masks()[np.arange(4), actions].all()
        seen.update(actions.tolist())
        env.step(actions)
    assert len(seen) > 1


def test_whole_numbers_may_be_floats_and_nothing_else(problem):
    env, other = (problem.single(**problem.settings) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    action = int(env.action_masks().argmax())
    for wrong in (action + 0.5, float("nan"), float("inf"), "0", None, True, [0, 1]):
        with pytest.raises(InvalidAction, match=r"whole number|one action"):
            env.step(wrong)
    assert_same(env.step(float(action))[0], other.step(action)[0])


def test_reset_refuses_what_it_would_ignore(problem):
    env = problem.single(**problem.settings)
    with pytest.raises(ConfigError, match=r"unknown option of reset 'epsiode'.*mean episode"):
        env.reset(options={"epsiode": 1})
    with pytest.raises(ConfigError, match="episode must be an Episode, got int"):
        env.reset(options={"episode": 3})
    many = problem.vector(2, **problem.settings)
    for options, sentence in (
        ({"mask": 1}, "unknown option of reset 'mask'"),
        ({"episode": [1, 2]}, "list of 2 of them, got int"),
        ({"reset_mask": [True, False]}, "must be an array of bool"),
        ({"reset_mask": np.zeros(2, bool)}, "must name at least one of 2"),
        ({"reset_mask": np.ones(3, bool)}, "must name at least one of 2"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            many.reset(options=options)
    with pytest.raises(ResetNeeded, match="reset all environments"):
        many.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ConfigError, match="one seed for each of 2 environments, got 3"):
        many.reset(seed=[1, 2, 3])
    grouped = problem.vector(2, **problem.settings, group_size=2)
    with pytest.raises(ConfigError, match="environments 0 and 1 must have the same seed"):
        grouped.reset(seed=[1, 2])


def test_vector_form_plays_given_episodes(problem):
    env, single = problem.vector(2, **problem.settings), problem.single(**problem.settings)
    single.reset(seed=8)
    episode = single.batch.simulator.episodes[0]
    want, _ = single.reset(options={"episode": episode})
    got, _ = env.reset(options={"episode": episode})
    for e in range(2):
        assert_same({k: v[e] for k, v in got.items()}, {k: v for k, v in want.items()})


def test_unknown_settings_are_refused_and_known_ones_are_in_the_signature(problem):
    for make in (problem.single, problem.vector):
        with pytest.raises(ConfigError, match=r"unknown setting 'laod'.*did you mean load"):
            make(laod=2.0)
        with pytest.raises(TypeError, match="unexpected keyword argument 'frameskip'"):
            make(frameskip=1)  # TorchRL tries it
        parameters = inspect.signature(make).parameters
        assert {"scenario", "load", "flat", "render_mode"} <= parameters.keys()
        assert parameters["scenario"].default == make().batch.scenario.name
    for settings, sentence in (
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        ({"autoreset_mode": "never"}, "autoreset_mode must be one of NextStep"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            problem.vector(2, **settings)
    with pytest.raises(ConfigError, match="invalid_action must be one of raise, resample"):
        problem.single(invalid_action="ignore")
    with pytest.raises(ConfigError, match="invalid_penalty must be at least 0"):
        problem.single(invalid_penalty=-1.0)


def test_make_vec_truncates(problem):
    env = gymnasium.make_vec(problem.env_id, 2, max_episode_steps=3, **problem.settings)
    env.reset(seed=0)
    truncated = [env.step(env.action_space.sample())[3].tolist() for _ in range(4)]
    assert truncated == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]


# ---- views


def raw_and_seen(problem, **settings):
    env, other = (problem.single(**problem.settings, **extra) for extra in ({}, settings))
    raw, seen = env.reset(seed=0)[0], other.reset(seed=0)[0]
    done = False
    while not done:
        assert raw in env.observation_space
        assert seen in other.observation_space
        yield raw, seen
        action = env.action_space.sample()
        raw, _, done, _, _ = env.step(action)
        seen, *_ = other.step(action)


def test_normalised_numbers_are_within_bounds_and_keep_their_order(problem):
    biggest = 0.0
    for raw, seen in raw_and_seen(problem, normalise=True):
        for name in raw:
            if raw[name].dtype != np.float32:
                np.testing.assert_array_equal(raw[name], seen[name])
                continue
            assert seen[name].dtype == np.float32
            assert np.abs(seen[name]).max() <= 1.0
            np.testing.assert_array_equal(np.sign(raw[name]), np.sign(seen[name]))
            for column in range(raw[name].shape[-1]):
                r, s = raw[name][..., column].ravel(), seen[name][..., column].ravel()
                assert (np.diff(s[np.argsort(r, kind="stable")]) >= 0).all()
            biggest = max(biggest, float(raw[name].max()))
    assert biggest > 1.0


def test_one_vector_holds_all_but_the_mask(problem):
    pairs = list(raw_and_seen(problem, flat=True))
    assert pairs
    for raw, seen in pairs:
        parts = [np.ravel(value) for name, value in raw.items() if name != "action_mask"]
        assert seen.dtype == np.float32
        assert sorted(seen.tolist()) == sorted(np.concatenate(parts).astype(np.float32).tolist())


def test_a_number_by_hand(make_scenario, make_episode):
    env = gymnasium.make("servegym/Dispatch-v1", scenario=make_scenario(), normalise=True)
    seen, _ = env.reset(options={"episode": make_episode([0.0], prompt=999)})
    # tokens: log(1 + 999) / log(1 + 10,000,000)
    assert seen["request"][0] == pytest.approx(np.log(1000) / np.log(1e7 + 1))
    assert env.observation_space["request"].high[0] == 1.0


# ---- pictures


@pytest.mark.parametrize("vector", [False, True])
def test_pictures_show_what_changes(problem, vector):
    pytest.importorskip("PIL")
    make = problem.vector if vector else problem.single
    env, text = (make(**problem.settings, render_mode=m) for m in ("rgb_array", "ansi"))
    frames, lines = [], []
    for e in (env, text):
        e.reset(seed=0)
        e.action_space.seed(0)
    for _ in range(6):
        frame, line = env.render(), text.render()
        frames.append(frame[0] if vector else frame)
        lines.append(line[0] if vector else line)
        env.step(env.action_space.sample())
        text.step(text.action_space.sample())
    assert {(f.shape[1:], f.dtype.name) for f in frames} == {((960, 3), "uint8")}
    assert len({f.shape for f in frames}) == 1  # as videos want them
    assert len({f.tobytes() for f in frames}) > 3
    assert len(set(lines)) > 3
    scenario = env.unwrapped.batch.scenario
    assert lines[0].startswith(scenario.name)
    assert lines[0].count("[") >= 2


def test_frames_of_an_episode_make_a_film(problem):
    pytest.importorskip("PIL")
    film = RenderCollection(problem.single(**problem.settings, render_mode="rgb_array"))
    assert film.metadata["render_fps"] == 10
    film.reset(seed=0)
    done, steps = False, 0
    while not done and steps < 20:
        _, _, done, _, _ = film.step(film.action_space.sample())
        steps += 1
    frames = film.render()
    assert len(frames) == steps + 1
    assert len({frame.shape for frame in frames}) == 1
    assert all(height % 2 == 0 for height in frames[0].shape[:2])  # what codecs of videos want


WORDS = {
    "servegym/Dispatch-v1": r"request \d+ went to replica \d",
    "servegym/Preemption-v0": r"(admitted|preempted) request \d+",
    "servegym/Cluster-v0": r"request \d+ went to replica \d|replica \d (admitted|preempted) r",
    "servegym/Workflow-v0": r"stage \d+ of job \d+ started on device \d|nothing started",
}


@pytest.mark.parametrize("vector", [False, True])
def test_text_says_what_was_decided_last(problem, vector):
    env = (problem.vector if vector else problem.single)(**problem.settings, render_mode="ansi")

    def asked():
        text = env.render()
        return (text[0] if vector else text).splitlines()[1]

    env.reset(seed=0)
    assert "last" not in asked()
    for _ in range(5):
        env.step(env.action_space.sample())
        assert re.search(rf"\(last: ({WORDS[problem.env_id]})", asked())
    env.reset(seed=1)
    assert "last" not in asked()


def test_an_engines_picture_shows_who_holds_which_share_of_its_kv():
    env = PreemptionEnv("kv-starved", render_mode="ansi", num_requests=100, load=2.0)
    blocks = env.batch.scenario.spec.types[0].num_blocks
    env.reset(seed=0)
    held, needed = 0, 0
    for _ in range(10):
        env.step(env.action_space.sample())
        engine = env.batch.simulator.state.replica[0, 0]
        lines = env.render().splitlines()[4:]
        assert len(lines) == engine["num_running"] + engine["num_waiting"]
        squares = sum(line.count("#") for line in lines)
        # each of its requests is rounded up to a whole square
        used = 100 * (1 - engine["free_blocks"] / blocks)
        assert used - 1 <= squares <= used + 2 * engine["num_running"] + 1
        held, needed = held + squares, needed + sum(line.count(".") for line in lines)
    assert held > 0
    assert needed > 0


def test_text_counts_what_runs_and_waits(make_scenario, make_episode):
    env = gymnasium.make("servegym/Dispatch-v1", scenario=make_scenario(), render_mode="ansi")
    env.reset(options={"episode": make_episode([0.0] * 4 + [60.0])})
    for action in (0, 2, 2, 2):
        env.step(action)
    assert "4 of 5 requests have ended, 1 in the system" in env.render()
    env.reset(options={"episode": make_episode([0.0] * 20 + [0.001])})
    for _ in range(20):
        env.step(1)
    rows = [row.split("]")[1].split("prompt")[0] for row in env.render().splitlines()[3:]]
    assert [row.count("#") for row in rows] == [0, 16, 0]  # max_num_seqs
    assert [row.count(".") for row in rows] == [0, 4, 0]


# ---- copies, processes, closing


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, *(lambda e, p=p: p.loads(p.dumps(e)) for p in (pickle, cloudpickle))]
)
def test_a_copy_goes_on_as_the_original_and_apart_from_it(problem, vector, copied):
    settings = {**problem.settings, "invalid_action": "resample"}
    env = problem.vector(2, **settings, num_threads=2) if vector else problem.single(**settings)
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(3):
        env.step(env.action_space.sample())
    twin = copied(env)
    assert twin.action_space == env.action_space
    for _ in range(30):
        actions = env.action_space.sample()
        np.testing.assert_array_equal(actions, twin.action_space.sample())
        masks = (env.action_masks(), twin.action_masks())
        np.testing.assert_array_equal(*masks)
        got, want = env.step(actions), twin.step(actions)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
        if not vector and got[2]:
            env.reset()
            twin.reset()
    space = pickle.loads(pickle.dumps(env.action_space))
    assert type(space) in (gymnasium.spaces.Discrete, gymnasium.spaces.MultiDiscrete)
    assert len(pickle.dumps(space)) < 5000  # without the environment
    env.close()
    twin.reset(seed=1)  # it has threads of its own


def step_in_child(env, queue) -> None:
    queue.put(float(env.step(env.action_masks().argmax(-1))[1].sum()))


def test_a_fork_after_stepping_on_threads_steps_too(problem):
    env = problem.vector(4, **problem.settings, num_threads=2)
    env.reset(seed=0)
    env.step(env.action_masks().argmax(-1))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=step_in_child, args=(env, queue))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of such forks
        child.start()
    got = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert got == float(env.step(env.action_masks().argmax(-1))[1].sum())
    env.close()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_closed_environment_says_so(problem, num_threads):
    single = problem.single(**problem.settings)
    many = problem.vector(2, **problem.settings, num_threads=num_threads)
    for env in (single, many):
        env.reset(seed=0)
        action = env.action_space.sample()
        env.step(action)
        env.close()
        env.close()
        with pytest.raises(EnvironmentClosed, match="was closed: make a new one"):
            env.step(action)
        with pytest.raises(EnvironmentClosed, match="was closed: make a new one"):
            env.reset()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float64])
def test_actions_may_lie_apart_in_memory_and_be_of_any_integral_type(problem, dtype):
    results = []
    for apart in (False, True):
        envs = problem.vector(3, **problem.settings)
        _, infos = envs.reset(seed=4)
        rewards = []
        for _ in range(6):
            actions = infos["action_mask"].argmax(1)
            if apart:
                wide = np.full((3, 2), 99, dtype)
                wide[:, 0] = actions
                actions = wide[:, 0]
                assert not actions.flags.c_contiguous
            _, reward, *_, infos = envs.step(actions)
            rewards.append(reward.copy())
        results.append(np.array(rewards))
    np.testing.assert_array_equal(*results)
    assert results[0].any()
