"""RLlib's PPO, APPO and IMPALA over the dispatcher's network, on one machine or a Ray cluster."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from typing_extensions import override

import servegym
from servegym.agents.rllib_module import dispatch_module
from servegym.errors import ConfigError
from servegym.scenario import Scenario, load_scenario
from servegym.train.network_run import NetworkRun
from servegym.train.rllib_settings import RllibTraining
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Stage

_ENVIRONMENT = "servegym-dispatch"
#: What RLlib calls the one module of an agent alone.
_MODULE = "default_policy"
#: A runner may compile kernels first.
_SAMPLE_TIMEOUT_S = 600.0
#: Folder of RLlib's own checkpoints in that of the run.
_CHECKPOINTS = "rllib"


class RllibTrainer(NetworkRun[RllibTraining]):
    """A run that trains a dispatcher; `found` is its network."""

    settings = RllibTraining
    stages = (Stage("RLlib", "updates"),)
    algorithm = "rllib"
    load_scenario = staticmethod(load_scenario)

    def __init__(self, config: RllibTraining, folder: Path | StoredRun) -> None:
        _ray()
        super().__init__(config, folder)
        self.steps_per_update = config.decisions_per_update
        self._stored = ""  # name of RLlib's checkpoint to go on from
        self._started_ray = False

    @property
    @override
    def validation_size(self) -> tuple[int, int]:
        return self.config.validation_episodes, self.config.validation_requests

    @property
    @override
    def num_updates(self) -> int:
        return self.config.total_decisions // self.config.decisions_per_update

    @cached_property
    def learner(self) -> Any:
        """RLlib's algorithm; Ray is started or joined with it."""
        ray = _ray()
        if not ray.is_initialized():
            c = self.config
            joins = c.address or os.environ.get("RAY_ADDRESS")
            # one for each runner, for the learner and for what aggregates
            more = {} if joins else {"num_cpus": max(os.cpu_count() or 1, c.num_env_runners + 2)}
            ray.init(address=c.address or None, log_to_driver=False, **more)
            self._started_ray = True
        ray.tune.register_env(_ENVIRONMENT, make_environments)
        return algorithm_config(self.config, self.parts[0].scenario).build_algo()

    @override
    def warm_up(self) -> None:
        if self._stored:
            self.learner.restore_from_path(str(self._checkpoint(self._stored)))
            return
        weights = {f"network.{k}": v.cpu().numpy() for k, v in self.network.state_dict().items()}
        learners = self.learner.learner_group
        learners.set_weights({_MODULE: weights})
        self.learner.env_runner_group.sync_weights(
            from_worker_or_learner_group=learners, inference_only=True
        )

    @override
    def improve(self) -> dict[str, float]:
        """Let RLlib make an update, and take over its network."""
        result = self.learner.train()
        weights = self.learner.learner_group.get_weights()[_MODULE]
        own = {
            name.removeprefix("network."): torch.as_tensor(value)
            for name, value in weights.items()
            if name.startswith("network.")
        }
        self.network.load_state_dict(own)
        return logged(result)

    @override
    def close_stage(self) -> None:
        self.learner.stop()
        if self._started_ray:
            _ray().shutdown()

    @override
    def state(self) -> dict[str, Any]:
        if not self.finished:
            name = f"update-{self.update}"
            self.learner.save_to_path(str(self._checkpoint(name)))
            # the one before stays until the run's own checkpoint names this one
            for old in self._checkpoint("").iterdir():
                if old.name not in (name, self._stored):
                    shutil.rmtree(old)
            self._stored = name
        return {**super().state(), "algorithm_checkpoint": self._stored}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        super().restore(content)
        self._stored = str(content["algorithm_checkpoint"])

    def _checkpoint(self, name: str) -> Path:
        return (self.folder.path / _CHECKPOINTS / name).absolute()


def make_environments(context: Mapping[str, Any]) -> Any:
    """Make the environments of one runner; the scenario travels as its contents."""
    assert servegym.__version__  # importing servegym registers the environment
    settings = {key: value for key, value in context.items() if key != "num_envs"}
    settings["scenario"] = Scenario.model_validate(settings["scenario"])
    return gymnasium.make_vec("servegym/Dispatch-v1", context["num_envs"], **settings)


def algorithm_config(config: RllibTraining, scenario: Scenario) -> Any:
    """Return RLlib's configuration, an `AlgorithmConfig`."""
    from ray.rllib.algorithms.appo import APPOConfig
    from ray.rllib.algorithms.impala import IMPALAConfig
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    kinds = {"ppo": PPOConfig, "appo": APPOConfig, "impala": IMPALAConfig}
    made = kinds[config.algorithm]()
    made.environment(
        _ENVIRONMENT,
        env_config={
            "scenario": scenario.model_dump(mode="json"),
            "load": tuple(config.load),
            "num_requests": config.num_requests,
            "features": "extended" if config.network.extended else "contract",
            "shaping": "cost-to-go",
            "reward_scale": "auto",
        },
    )
    made.env_runners(
        num_env_runners=config.num_env_runners,
        num_envs_per_env_runner=config.num_envs,
        gym_env_vectorize_mode="vector_entry_point",
        sample_timeout_s=_SAMPLE_TIMEOUT_S,
    )
    made.rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=dispatch_module(),
            model_config={"network": config.network.model_dump(mode="json")},
        )
    )
    made.learners(num_learners=0, num_gpus_per_learner=int(config.device == "cuda"))
    made.debugging(seed=config.seed)
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "gamma": config.gamma,
        "grad_clip": config.max_grad_norm,
        "entropy_coeff": config.entropy,
    }
    if config.algorithm == "ppo":
        made.training(
            train_batch_size_per_learner=config.decisions_per_update,
            minibatch_size=config.minibatch,
            num_epochs=config.epochs,
            lambda_=config.gae_lambda,
            clip_param=config.clip,
            **common,
        )
        return made
    if config.algorithm == "appo":
        common |= {"lambda_": config.gae_lambda, "clip_param": config.clip}
    made.training(train_batch_size_per_learner=config.minibatch, **common)
    made.reporting(
        min_time_s_per_iteration=0,
        min_sample_timesteps_per_iteration=config.decisions_per_update,
    )
    return made


_OF_LEARNER = ("learners", _MODULE)
#: Names in TensorBoard, and where results have them: IMPALA calls losses otherwise.
_LOGGED = (
    ("rollout/return", ("env_runners", "episode_return_mean")),
    ("train/policy_loss", (*_OF_LEARNER, "policy_loss")),
    ("train/policy_loss", (*_OF_LEARNER, "mean_pi_loss")),
    ("train/value_loss", (*_OF_LEARNER, "vf_loss")),
    ("train/entropy", (*_OF_LEARNER, "entropy")),
    ("train/approx_kl", (*_OF_LEARNER, "mean_kl_loss")),
    ("time/sample_s", ("timers", "env_runner_sampling_timer")),
    ("time/learn_s", ("timers", "learner_update_timer")),
)


def logged(result: Mapping[str, Any]) -> dict[str, float]:
    """Pick from RLlib's results what all trainers log, where it is there and finite."""
    found: dict[str, float] = {}
    for name, place in _LOGGED:
        value: Any = result
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and np.isfinite(float(value)):
            found[name] = float(value)
    return found


def _ray() -> Any:
    """Import Ray, or say what to install; those who only look at this module need none."""
    try:
        import ray.tune
    except ImportError as error:
        raise ConfigError(
            f"learner rllib needs {error.name}: pip install -e '.[ray]' in a checkout of servegym"
        ) from error
    return ray
