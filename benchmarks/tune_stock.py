"""Settings of MaskablePPO for an environment, by Optuna, in rl-zoo3's form.

`python benchmarks/tune_stock.py --id servegym/DispatchShaped-v1 --trials 12`: each trial learns on
so many decisions and then plays validation episodes, actions drawn; what counts is what they
return. The first trial has the defaults. The study is a journal, so that a search that was stopped
goes on with the same command. Last, the best settings and the defaults learn and play again with
other seeds of training and other episodes, paired, and the entry for `ppo.yml` is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import yaml
from sb3_contrib import MaskablePPO

from servegym.envs.sb3 import make_vec
from servegym.train.hyperparameters import NUM_STARTS, Range
from servegym.typing import FloatArray

#: Stable-Baselines3's defaults of what is searched.
STOCK = {
    "n_envs": 4,
    "n_steps": 2048,
    "batch_size": 64,
    "n_epochs": 10,
    "learning_rate": 3e-4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "ent_coef": 0.0,
    "clip_range": 0.2,
}
#: Where it is searched; of `gamma` and `gae_lambda` what they lack of 1. Powers of 2 for sizes.
SPACE = {
    "learning_rate": Range(1e-4, 5e-3, logarithmic=True),
    "n_steps": Range(5, 9),
    "batch_size": Range(6, 10),
    "n_epochs": Range(2, 10),
    "gamma": Range(1e-4, 0.2, logarithmic=True),
    "gae_lambda": Range(0.01, 0.5, logarithmic=True),
    "ent_coef": Range(1e-5, 1e-2, logarithmic=True),
    "clip_range": Range(0.1, 0.4),
}
#: Environments of the searched settings: an update is then of a few thousand decisions.
NUM_ENVS = 16
#: Seeds of validation episodes, and of those that the last comparison plays.
VALIDATION, LAST = 500_000, 1_000_000


def settings_of(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return what a trial stands for."""
    found = {name: where.suggest(trial, name) for name, where in SPACE.items()}
    for name in ("n_steps", "batch_size"):
        found[name] = 2 ** int(found[name])
    for name in ("gamma", "gae_lambda"):
        found[name] = float(f"{1.0 - found[name]:.5g}")
    return {"n_envs": NUM_ENVS, **found}


def returns(
    settings: dict[str, Any], seed: int, first: int, given: argparse.Namespace
) -> FloatArray:
    """Learn, play and return the return of each episode."""
    own = {"num_requests": given.num_requests} if given.num_requests else {}
    rest = {name: value for name, value in settings.items() if name != "n_envs"}
    envs = make_vec(given.id, settings["n_envs"], **own)
    model = MaskablePPO("MlpPolicy", envs, seed=seed, device="cpu", **rest)
    model.learn(given.decisions)
    envs.close()
    judges = make_vec(given.id, given.episodes, **own)
    judges.seed(first)
    seen = judges.reset()
    found = np.full(given.episodes, np.nan)
    torch.manual_seed(seed)
    while np.isnan(found).any():
        masks = np.stack(judges.env_method("action_masks"))
        actions, _ = model.predict(seen, action_masks=masks)
        seen, _, over, infos = judges.step(actions)
        for env in np.flatnonzero(over & np.isnan(found)).tolist():
            found[env] = infos[env]["episode"]["r"]
    judges.close()
    return found


def main() -> None:
    """Search, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--id", default="servegym/DispatchShaped-v1")
    parser.add_argument("--trials", type=int, default=12, help="in all, the defaults among them")
    parser.add_argument("--decisions", type=int, default=49_152, help="that a trial learns on")
    parser.add_argument("--episodes", type=int, default=16, help="that judge it")
    parser.add_argument("--num-requests", type=int, help="of an episode, else the environment's")
    parser.add_argument("--last-seeds", type=int, default=3, help="of training, to compare with")
    parser.add_argument("--out", type=Path, default=Path("runs/tune-stock"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    given.out.mkdir(parents=True, exist_ok=True)
    name = given.id.rpartition("/")[2]
    journal = optuna.storages.journal.JournalFileBackend(str(given.out / f"{name}.log"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )
    # what goes on must not draw again what was drawn before
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=NUM_STARTS, seed=len(study.trials))
    if "stock" not in study.user_attrs:
        study.set_user_attr("stock", float(returns(STOCK, 0, VALIDATION, given).mean()))
    print(f"defaults: mean return {study.user_attrs['stock']:.1f}", flush=True)
    states = optuna.trial.TrialState
    while len(study.get_trials(states=(states.COMPLETE,))) < given.trials - 1:
        trial = study.ask()
        settings = settings_of(trial)
        value = float(returns(settings, 0, VALIDATION, given).mean())
        study.tell(trial, value)
        print(f"trial {trial.number + 1}: {value:.1f} {settings}", flush=True)
    best = settings_of(study.best_trial)
    for seed in range(1, 1 + given.last_seeds):
        stock, tuned = (returns(s, seed, LAST, given) for s in (STOCK, best))
        ratios = tuned / stock
        error = 1.96 * ratios.std(ddof=1) / np.sqrt(len(ratios))
        print(
            f"training seed {seed}: {stock.mean():.1f} by default, {tuned.mean():.1f} tuned,"
            f" ratio {ratios.mean():.3f} +- {error:.3f}",
            flush=True,
        )
    print(yaml.safe_dump({given.id: {**best, "policy": "MlpPolicy"}}, sort_keys=False))


if __name__ == "__main__":
    main()
