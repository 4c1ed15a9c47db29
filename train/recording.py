"""Data sets of what policies saw, did and got, in Minari's format."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import numba
import numpy as np

import servegym
from servegym.errors import ConfigError
from servegym.policy.contract import INFERRED, SCHEMA_VERSION
from servegym.policy.exploration import check_share, explore
from servegym.policy.layout import scenario_actions
from servegym.policy.observe import observe_batch, prepare
from servegym.policy.policy import Policy
from servegym.scenario import Scenario, load_scenario
from servegym.train.dataset import DATA, NAME, minari_library
from servegym.typing import FloatArray, IntArray

Shaping = Literal["none", "cost-to-go"]
ENVIRONMENT = "servegym/Dispatch-v1"


class RecordedEpisode(NamedTuple):
    """One episode; T decisions.

    Attributes:
        observations: As the environment shows them, by name, `[T + 1, ...]`; the last is the end's.
        actions: The environment's, `int64[T]`.
        rewards: `float64[T]`.
        terminated: Whether the episode ended with the last decision, not cut off.
        infos: `dt_s` (seconds since the decision before) and `now_s`, both as the environment gives
            them with an observation, and `propensity`, the probability of the action taken there,
            NaN at the end; `float64[T + 1]` each.
        metrics: The environment's `episode_metrics`.
    """

    observations: dict[str, np.ndarray]
    actions: IntArray
    rewards: FloatArray
    terminated: bool
    infos: dict[str, FloatArray]
    metrics: dict[str, float]


class EpisodeRecorder:
    """Lets policies play a dispatch environment.

    Args:
        scenario: Name or path of what is played.
        settings: Of the environment; see `docs/env-dispatch.md`.

    Attributes:
        env: The environment.
    """

    def __init__(self, scenario: str, **settings: Any) -> None:
        assert servegym.__version__  # importing servegym registers the environment
        self.env = gymnasium.make(
            ENVIRONMENT, scenario=scenario, disable_env_checker=True, **settings
        )
        self._batch: Any = self.env.unwrapped.batch  # type: ignore[attr-defined]
        actions = self._batch.scenario.actions
        self._actions = scenario_actions(
            self._batch.width, hold=actions.hold, reject=actions.reject
        )

    def play(self, policy: Policy, seed: int, explored: float = 0.0) -> RecordedEpisode:
        """Play the first episode of a seed.

        Args:
            policy: Decides.
            seed: Of the environment, of the policy's own randomness and of what is explored.
            explored: Share of choices that `explore` replaces.
        """
        observation, info = self.env.reset(seed=seed)
        if policy.needs & INFERRED:  # what is inferred rests on all that was watched since
            prepare(self._batch.simulator, policy.needs)
            observation, info = self.env.reset(seed=seed)
        policy.reset(1, seed)
        rng = np.random.default_rng((seed, 1))  # not what the environment draws from
        seen, infos = [observation], {"dt_s": [info["dt_s"]], "now_s": [info["now_s"]]}
        actions, rewards, propensities = [], [], []
        over = terminated = False
        while not over:
            decision, envs = observe_batch(self._batch.simulator, policy.needs)
            chosen = int(policy.act(decision, envs)[0])
            chosen, propensity = explore(chosen, decision.mask[0], explored, rng)
            action = int(np.searchsorted(self._actions, chosen))
            observation, reward, terminated, truncated, info = self.env.step(action)
            over = terminated or truncated
            seen.append(observation)
            actions.append(action)
            rewards.append(reward)
            propensities.append(propensity)
            for name, values in infos.items():
                values.append(info[name])
        return RecordedEpisode(
            {name: np.stack([x[name] for x in seen]) for name in observation},
            np.array(actions, np.int64),
            np.array(rewards, np.float64),
            terminated,
            {
                **{name: np.array(values) for name, values in infos.items()},
                "propensity": np.array([*propensities, np.nan]),
            },
            info["episode_metrics"],
        )

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


def record(
    scenario: str,
    policy: Policy,
    folder: Path,
    references: Mapping[str, Policy],
    *,
    num_episodes: int,
    load: tuple[float, float] = (0.6, 1.1),
    num_requests: int | None = None,
    first_seed: int = 0,
    explored: float = 0.0,
    shaping: Shaping = "cost-to-go",
    extended: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Write a Minari data set of a policy's play on a scenario of requests.

    Args:
        scenario: Name or path.
        policy: Plays; anything but an oracle.
        folder: The data set's; `data/` is made in it.
        references: Rules by what they are called: the mean returns of the random one and of the
            best of the others on the same episodes are the scores 0 and 1 of Minari's normalised
            score. The first is the random one.
        num_episodes: Episodes, one a seed.
        load: Range of the load factor, drawn per episode.
        num_requests: Requests per episode, else the scenario's own.
        first_seed: Seeds count from here.
        explored: Share of choices that `policy.exploration.explore` replaces.
        shaping: Of rewards; the return of a whole episode is the same either way.
        extended: Whether what a router infers is in the observations, too.
        progress: Called with the share that is done.

    Returns:
        What the data set says of itself beside Minari's own: see `docs/standards.md`.

    Raises:
        ConfigError: If the folder holds a data set, or the policy is an oracle.
    """
    minari = minari_library()
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    check_share(explored)
    for each in (policy, *references.values()):
        if each.information == "oracle":
            raise ConfigError(
                f"cannot record {each.name}, an oracle: it decides by what no policy can see"
            )
    if num_episodes < 1:
        raise ConfigError(f"episodes must be at least 1, got {num_episodes}")
    folder = folder.absolute()  # Minari takes relative paths of files from the data set's folder
    place, draft = folder / DATA, folder / f"{DATA}.part"
    if place.exists():
        raise ConfigError(f"{folder} holds a data set: give another --output")
    settings: dict[str, Any] = {
        "load": list(load),
        "shaping": shaping,
        "features": "extended" if extended else "contract",
    }
    if num_requests is not None:
        settings["num_requests"] = num_requests
    recorder = EpisodeRecorder(scenario, **settings)
    shutil.rmtree(draft, ignore_errors=True)  # left by a run that was stopped
    folder.mkdir(parents=True, exist_ok=True)
    env = recorder.env
    storage = MinariStorage.new(draft, env.observation_space, env.action_space, env.spec)
    seeds = [first_seed + i for i in range(num_episodes)]
    returns: dict[str, list[float]] = {name: [] for name in references}
    own: list[float] = []
    for i, seed in enumerate(seeds):
        played = recorder.play(policy, seed, explored)
        own.append(float(played.rewards.sum()))
        over = np.zeros((2, len(played.actions)), np.bool_)
        over[0 if played.terminated else 1, -1] = True
        storage.update_episodes(
            [
                EpisodeBuffer(
                    id=i,
                    seed=seed,
                    observations=played.observations,
                    actions=played.actions,
                    rewards=played.rewards,
                    terminations=over[0],
                    truncations=over[1],
                    infos=played.infos,
                )
            ]
        )
        for name, rule in references.items():
            returns[name].append(float(recorder.play(rule, seed).rewards.sum()))
        progress((i + 1) / num_episodes)
    recorder.close()
    scores = {name: float(np.mean(values)) for name, values in returns.items()}
    lowest, *others = scores
    best = max(others, key=lambda name: scores[name], default=lowest)
    about: dict[str, Any] = {
        "policy": policy.name,
        "mean_return": float(np.mean(own)),
        "explored": explored,
        "scenario": scenario_contents(load_scenario(scenario)),
        "settings": settings,
        "seeds": seeds,
        "schema_version": SCHEMA_VERSION,
        "references": scores,
        "versions": {
            "servegym": servegym.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
            "gymnasium": gymnasium.__version__,
        },
    }
    storage.update_metadata(
        {
            "dataset_id": _dataset_id(folder),
            "minari_version": minari.__version__,
            "algorithm_name": policy.name,
            "description": (
                f"{num_episodes} episodes of {policy.name} on {about['scenario']['name']}; scores 0"
                f" and 1 are {lowest} and {best} on the same episodes"
            ),
            "requirements": [f"servegym=={servegym.__version__}"],
            "eval_env_spec": env.spec.to_json() if env.spec else "",
            "ref_min_score": scores[lowest],
            "ref_max_score": scores[best],
            "num_episodes_average_score": num_episodes,
            NAME: about,
        }
    )
    os.replace(draft, place)
    return about


def scenario_contents(scenario: Scenario) -> dict[str, Any]:
    """Return what a scenario says, as JSON holds it."""
    contents: dict[str, Any] = json.loads(scenario.model_dump_json())
    return contents


def _dataset_id(folder: Path) -> str:
    """Name a data set as Minari does, by its folder and a version."""
    name = folder.resolve().name
    stem, _, version = name.rpartition("-v")
    named = name if stem and version.isdigit() else f"{name}-v0"
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in named)
    return f"{NAME}/{plain}"
