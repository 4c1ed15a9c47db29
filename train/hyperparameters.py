"""Searching a learner's settings: each trial is a training run, judged by validation episodes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from servegym.documents import checked, read_mapping
from servegym.errors import ConfigError, unknown_name
from servegym.train.registry import Entry
from servegym.whole_files import write_whole

STUDY, RESULT = "study.log", "settings.yaml"
#: Trials before the first that is stopped early, and before the first that is not drawn at random.
NUM_STARTS = 5


class Range(NamedTuple):
    """Where a setting is searched; whole numbers where the ends are."""

    low: float
    high: float
    logarithmic: bool = False

    def suggest(self, trial: Any, name: str) -> float:
        """Let an Optuna trial choose a value."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            whole: int = trial.suggest_int(name, self.low, self.high, log=self.logarithmic)
            return whole
        value: float = trial.suggest_float(name, self.low, self.high, log=self.logarithmic)
        return float(f"{value:.4g}")


#: What is searched of each learner's settings, by what their runs' folders begin with; settings of
#: the network as `network.NAME`.
SPACES: dict[str, dict[str, Range]] = {
    "ppo": {
        "learning_rate": Range(1e-4, 1e-2, logarithmic=True),
        "horizon_s": Range(2.0, 60.0, logarithmic=True),
        "credit_s": Range(0.5, 20.0, logarithmic=True),
        "epochs": Range(1, 6),
        "minibatch": Range(256, 4096, logarithmic=True),
        "clip": Range(0.1, 0.3),
        "entropy": Range(1e-4, 1e-2, logarithmic=True),
        "network.eta": Range(3.0, 30.0, logarithmic=True),
    },
    "counterfactual": {
        "learning_rate": Range(5e-4, 2e-2, logarithmic=True),
        "num_batches": Range(32, 512, logarithmic=True),
        "prefix_price": Range(0.01, 3.0, logarithmic=True),
        "smoothing": Range(1e-3, 0.1, logarithmic=True),
        "network.eta": Range(3.0, 30.0, logarithmic=True),
    },
    "offline": {
        "learning_rate": Range(1e-4, 1e-2, logarithmic=True),
        "horizon_s": Range(0.2, 20.0, logarithmic=True),
        "conservatism": Range(0.003, 3.0, logarithmic=True),
        "expectile": Range(0.5, 0.95),
        "temperature": Range(0.5, 20.0, logarithmic=True),
        "target_rate": Range(0.002, 0.05, logarithmic=True),
        "network.eta": Range(3.0, 30.0, logarithmic=True),
    },
}


class SettingsFile(BaseModel):
    """What `servegym search` writes and `servegym train --settings` reads.

    Attributes:
        learner: What `--learner` calls it.
        settings: Its settings that are not at their defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learner: str
    settings: dict[str, Any]


class Searched(NamedTuple):
    """What a search has found.

    Attributes:
        settings: The settings file.
        run_folder: Of the best trial's run.
        score: Mean score of its best network on the validation episodes, lower is better.
        num_trials: Trials that ran to the end.
        num_pruned: Trials that were stopped early.
    """

    settings: Path
    run_folder: Path
    score: float
    num_trials: int
    num_pruned: int


def search(
    learner: str,
    entry: Entry,
    settings: Any,
    folder: Path,
    *,
    num_trials: int,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Searched:
    """Try settings until there have been so many trials; a search that was stopped goes on.

    Args:
        learner: What `--learner` calls it.
        entry: It.
        settings: Those that are not searched.
        folder: `study.log`, `settings.yaml` and the trials' runs are in it.
        num_trials: Trials in all.
        progress: Called with what is done and the share of it.

    Raises:
        ConfigError: If Optuna is missing, the learner's settings are not searched, or the folder
            holds a search with others.
    """
    optuna = _optuna()
    if entry.folder not in SPACES:
        raise ConfigError(f"settings of learner {learner} are not searched: {', '.join(SPACES)}")
    if num_trials < 1:
        raise ConfigError(f"trials must be at least 1, got {num_trials}")
    space, asked = SPACES[entry.folder], as_plain(settings)
    for name in space:
        _pop(asked, name)
    folder.mkdir(parents=True, exist_ok=True)
    journal = optuna.storages.journal.JournalFileBackend(str(folder / STUDY))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal),
        study_name=learner,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(NUM_STARTS),
    )
    if study.user_attrs.get("asked", asked) != asked:
        raise ConfigError(f"{folder} holds a search with other settings: give another --out")
    study.set_user_attr("asked", asked)
    # what goes on must not draw again what was drawn before
    seed = settings.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=NUM_STARTS, seed=seed)
    states = optuna.trial.TrialState
    for stopped in study.get_trials(states=(states.RUNNING,)):
        study.tell(stopped.number, state=states.FAIL)
        study.enqueue_trial(stopped.params)
    over = (states.COMPLETE, states.PRUNED)
    while (count := len(study.get_trials(states=over))) < num_trials:
        trial = study.ask()
        values = {name: where.suggest(trial, name) for name, where in space.items()}
        made = _with_values(settings, values)
        place = _place(folder, values)
        trial.set_user_attr("folder", place.name)
        trainer = entry.trainer(made, place)

        def note(
            text: str, share: float, trainer: Any = trainer, trial: Any = trial, count: int = count
        ) -> None:
            progress(f"trial {count + 1}: {text}", (count + share) / num_trials)
            if "validation/objective" in trainer.history[-1]:
                trial.report(float(trainer.best_scores.mean()), trainer.num_updates_made)
                if trial.should_prune():
                    raise optuna.TrialPruned

        try:
            trainer.run(note)
        except optuna.TrialPruned:
            study.tell(trial, state=states.PRUNED)
        else:
            study.tell(trial, float(trainer.best_scores.mean()))
    best = study.best_trial
    values = {name: _rounded(best.params[name]) for name in space}
    best_place = _place(folder, values)
    found = as_plain(_with_values(settings, values))
    write_whole({folder / RESULT: settings_text(learner, found, best.value).encode()})
    num_pruned = len(study.get_trials(states=(states.PRUNED,)))
    return Searched(folder / RESULT, best_place, best.value, num_trials - num_pruned, num_pruned)


def as_plain(settings: Any) -> dict[str, Any]:
    """Return settings as YAML has them, without the scenario and what is at its default."""
    usual = type(settings)()
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value, default = getattr(settings, field.name), getattr(usual, field.name)
        if field.name in ("scenario", "learner") or value == default:
            continue
        if hasattr(value, "model_dump"):
            value = value.model_dump(mode="json", exclude_defaults=True)
        plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def settings_text(learner: str, settings: Mapping[str, Any], score: float) -> str:
    """Return the settings file of a search: `servegym train --settings FILE` reads it."""
    content = {"learner": learner, "settings": dict(settings)}
    body = yaml.safe_dump(content, sort_keys=False)
    return f"# found by servegym search; score on validation episodes {score:.6g}\n{body}"


def read_settings(path: Path) -> SettingsFile:
    """Read a settings file.

    Raises:
        ConfigError: If it is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}: make one with servegym search") from None
    return checked(read_mapping(text, str(path), "learner: ppo"), str(path), SettingsFile)


def made_settings(kind: type[Any], found: SettingsFile, path: Path) -> Any:
    """Make a learner's settings of those in a file.

    Raises:
        ConfigError: If one is unknown or impossible; it names the file.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    for name in found.settings:
        if name not in known:
            raise ConfigError(f"{path}: {unknown_name('setting', name, known)}")
    try:
        return TypeAdapter(kind).validate_python(dict(found.settings))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {place}: {first['msg']}, got {first['input']!r}") from error


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _place(folder: Path, values: Mapping[str, float]) -> Path:
    """Folder of a trial's run: the same for the same values, so that a stopped one goes on."""
    name = hashlib.sha256(json.dumps(dict(values)).encode()).hexdigest()[:12]
    return folder / "trials" / name


def _with_values(settings: Any, values: Mapping[str, float]) -> Any:
    own = {name: value for name, value in values.items() if "." not in name}
    nested: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        part, _, inner = name.partition(".")
        if inner:
            nested.setdefault(part, {})[inner] = value
    parts = {
        part: getattr(settings, part).model_copy(update=update) for part, update in nested.items()
    }
    return dataclasses.replace(settings, **own, **parts)


def _pop(plain: dict[str, Any], name: str) -> None:
    """Leave a searched setting out of what must stay the same."""
    part, _, inner = name.partition(".")
    if not inner:
        plain.pop(name, None)
    elif part in plain:
        plain[part].pop(inner, None)
        if not plain[part]:
            del plain[part]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            f"searching settings needs {error.name}: pip install -e '.[optuna]' in a checkout of"
            " servegym"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
