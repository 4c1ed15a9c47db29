"""`servegym train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from tyro.conf import OmitArgPrefixes, arg

from servegym.commands.console import make_console
from servegym.commands.sitting import trained
from servegym.commands.workload import TRACE_OPTIONS, Played
from servegym.errors import ConfigError
from servegym.problems.problem import AnyProblem
from servegym.problems.registry import find_problem, load_problem
from servegym.train.hyperparameters import made_settings, read_settings
from servegym.train.job_shop import RandomJobShops
from servegym.train.mix import is_mix
from servegym.train.registry import LEARNERS, Entry, find_trainer

#: The learner of mixes of scenarios.
_MIXES = "counterfactual"


def require_torch() -> None:
    """Say what to install if the training extra is missing."""
    try:
        import tensorboard  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"training needs {error.name}: pip install -e '.[train]' in a checkout of servegym"
        ) from error


@dataclass(frozen=True)
class Train(Played):
    """Train a policy and export it; a killed run goes on where its checkpoint is.

    What is trained is what the scenario poses: a dispatcher (PPO, or policy iteration on
    counterfactuals), the order inside one engine (a search), both in a fleet whose engines take
    orders (a search), a scheduler of jobs (a search, then PPO). The trainer's settings follow;
    those of another trainer are shown with a scenario of its: `servegym train --scenario
    text-to-sql --help`, or `kv-starved`, `kv-starved-fleet`, or with `--learner counterfactual
    --help`.
    """

    scenario: str = "mixed-chat"
    """Bundled scenario name or YAML file, of any problem; `generalist` or a file of variants, which
    one dispatcher is trained on together; or `job-shop`: small random job shops."""
    learner: str | None = None
    """What trains it: of a dispatcher ppo (else taken), counterfactual, which tries every choice of
    a decision on the state as it is, cross-entropy, which searches weights on whole episodes, or
    offline, from a data set alone; or joint (else taken in a
    fleet whose engines take orders), which searches the order of the engines, too; or search (else
    taken where some replicas only prefill or decode, where requests migrate, and where there are
    tiers of KV), which finds weights for both decisions there."""
    settings_file: Annotated[Path | None, arg(name="settings")] = None
    """File of settings that `servegym search` has written; other options change them."""
    track: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Log to MLflow or Weights & Biases, too; where to is said to them in their own ways, such as
    MLFLOW_TRACKING_URI and WANDB_MODE=offline."""
    out: Path | None = None
    """Folder of the run: config.json, tensorboard/, checkpoint.pt, policy/. By default
    runs/KIND-SCENARIO, such as runs/ppo-mixed-chat. A folder is gone on with under the same
    configuration only."""

    def run(self) -> None:
        """Train and export."""
        learner, settings, out = self.asked()
        path = trained(learner.trainer(settings, out), self.track)
        make_console().print(f"policy: {path}\ntensorboard --logdir {out}")

    def asked(self, prefix: str = "") -> tuple[Entry, Any, Path]:
        """Return the trainer, its settings and the folder; `prefix` begins the folder's name."""
        require_torch()
        problem, posed = _posed(self.scenario)
        if not problem.takes_trace:
            why = f"is for scenarios of requests, and {self.scenario} is one of {problem.unit}"
            self.refuse(("trace", *TRACE_OPTIONS), why)
        mixed = is_mix(self.scenario)
        if mixed:
            why = f"is for one scenario, and {self.scenario} is a mix of several"
            self.refuse(("trace", *TRACE_OPTIONS), why)
        learner = self.learner
        if self.settings_file is not None:
            learner = read_settings(self.settings_file).learner
        entry = find_trainer(problem.name, _learner(self.scenario, learner), posed)
        out = self._folder(f"{prefix}{entry.folder}")
        takes_trace = problem.takes_trace and not mixed
        scenario = self.chosen_file(out) if takes_trace else self.scenario
        settings = getattr(self, "settings", None) or entry.settings()
        return entry, replace(settings, scenario=scenario), out

    def _folder(self, kind: str) -> Path:
        """Folder of the run: runs of different scenarios do not meet unless they are told to."""
        if self.out is not None:
            return self.out
        parts = [kind, Path(self.scenario).stem, *([Path(self.trace).stem] if self.trace else [])]
        parts += [] if self.wait_for_answers else ["open-loop"]
        return Path("runs") / "-".join(parts)


T = TypeVar("T", bound=Train)


def train_command(words: Sequence[str], command: type[T]) -> type[T]:
    """Return a command with all settings of the trainer that the words' scenario calls for.

    Args:
        words: Of the command line.
        command: `Train`, or what takes the same options.

    Raises:
        ConfigError: If there is no such scenario, or an option is for other problems.
    """
    scenario = _given(words, "--scenario") or Train.scenario
    problem, posed = _posed(scenario)
    learner, file = _given(words, "--learner"), _given(words, "--settings")
    found = read_settings(Path(file)) if file else None
    if found and learner not in (None, found.learner):
        raise ConfigError(f"{file} has settings of learner {found.learner}: leave --learner out")
    learner = _learner(scenario, found.learner if found else learner)
    settings = find_trainer(problem.name, learner, posed).settings
    _refuse_others(words, scenario, problem.name, settings, command)
    usual = made_settings(settings, found, Path(file or "")) if found else settings()
    if base := _given(words, "--base"):
        usual = _with_base(usual, base, words)
    kind = OmitArgPrefixes[Annotated[settings, arg(help=f"What trains {problem.name}.")]]  # type: ignore[valid-type]
    made = make_dataclass(
        command.__name__, [("settings", kind, field(default=usual))], bases=(command,), frozen=True
    )
    made.__doc__ = command.__doc__
    return made


def _with_base(settings: Any, base: str, words: Sequence[str]) -> Any:
    """Give a network the parameters of the rule that it is to begin as, not those of another."""
    network: Any = getattr(settings, "network", None)
    if "base_params" not in getattr(type(network), "model_fields", ()):
        return settings
    others = network.model_dump(exclude={"base", "base_params"})
    if "--extended" in words:  # some rules can be a base with it alone
        others["extended"] = True
    return replace(settings, network=type(network)(**others, base=base))


def _posed(scenario: str) -> tuple[AnyProblem, Any]:
    """Return the problem of what is trained on, and that if it is a scenario."""
    if scenario == RandomJobShops.name:
        return find_problem("workflow"), None
    if is_mix(scenario):
        return find_problem("dispatch"), None
    return load_problem(scenario)


def _learner(scenario: str, named: str | None) -> str | None:
    """Return the learner that is named, or the only one that a mix of scenarios has.

    Raises:
        ConfigError: If another one is named for a mix.
    """
    if not is_mix(scenario):
        return named
    if named not in (None, _MIXES):
        raise ConfigError(
            f"{scenario} is a mix of scenarios, which --learner {_MIXES} trains on, got {named}:"
            " leave --learner out"
        )
    return _MIXES


def _given(words: Sequence[str], option: str) -> str | None:
    """Return an option's value among the words of a command."""
    for word, following in zip(words, [*words[1:], ""], strict=False):  # there may be none at all
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _refuse_others(
    words: Sequence[str], scenario: str, problem: str, settings: type[Any], command: type[Train]
) -> None:
    """Refuse options that only other trainers have, of other problems or of this one."""
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    unknown = given - _options(command) - _options(settings)
    for option in sorted(unknown):
        owners = {
            name: [x for x, entry in entries.items() if option in _options(entry.settings)]
            for name, entries in LEARNERS.items()
        }
        if owners[problem]:
            raise ConfigError(
                f"{option} is an option of --learner {' and '.join(owners[problem])}: name that"
                " learner, or leave it out"
            )
        others = [name for name, learners in owners.items() if learners]
        if others:
            raise ConfigError(
                f"{option} is for scenarios of {' and '.join(others)}, and {scenario} is one of"
                f" {problem}: leave it out"
            )


def _options(settings: type[Any]) -> set[str]:
    """Return the names of the options that a class of settings makes."""
    found: set[str] = set()
    for key, hint in get_type_hints(settings, include_extras=True).items():
        name = key
        for extra in getattr(hint, "__metadata__", ()):
            name = getattr(extra, "name", None) or name
        found.add(f"--{name.replace('_', '-')}")
        for part in get_args(hint)[:1]:
            if hasattr(part, "model_fields"):
                found |= _options(part)
    return found | {f"--no-{option[2:]}" for option in found}
