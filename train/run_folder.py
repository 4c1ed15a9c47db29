"""The folder of a training run: what was asked for, how far it is, and how it went.

`config.json` holds the whole configuration: every setting, the scenario as it was read, digests
of the files that it names, and versions. A folder is only ever gone on with under the same
configuration. `checkpoint.pt` holds the rest, and is whole at any moment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numba
import numpy as np
import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch.utils.tensorboard import SummaryWriter

import servegym
from servegym.errors import ConfigError, OutputError
from servegym.train import format_2
from servegym.whole_files import require_writable, unwritable, write_whole

_Settings = TypeVar("_Settings")

#: Of `config.json` and `checkpoint.pt`; those of `format_2.FORMAT` are read, too.
FORMAT = 3
CONFIG, CHECKPOINT = "config.json", "checkpoint.pt"
#: Keys of a scenario under which a file is named.
_FILE_KEYS = ("path", "calibration", "file")
#: Differences that a sentence names.
_MOST_NAMED = 4
_NOT_SET = "not set"


@dataclass(frozen=True)
class StoredRun:
    """What `config.json` of a run says.

    Attributes:
        path: The folder.
        problem: For which problem a policy is trained.
        configuration: As `configuration` made it.
    """

    path: Path
    problem: str
    configuration: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the trainer, by name."""
        settings: dict[str, Any] = self.configuration["settings"]
        return settings

    @classmethod
    def read(cls, path: Path) -> StoredRun:
        """Read a run's `config.json`.

        Raises:
            ConfigError: If there is none, or it is broken or of another version.
        """
        file = path / CONFIG
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} is no training run: it has no {CONFIG}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} is broken: name another folder") from error
        if not isinstance(raw, dict) or raw.get("format") not in (FORMAT, format_2.FORMAT):
            raise ConfigError(
                f"{file} does not describe a training run of this version of servegym: name another"
                " folder"
            )
        try:
            parts = {
                name: dict(raw[name]) for name in ("settings", "scenario", "files", "versions")
            }
            if raw["format"] == format_2.FORMAT:
                return cls(path, format_2.PROBLEMS[raw["kind"]], parts)
            return cls(path, raw["problem"], parts)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{file} is broken: name another folder") from error

    def rebuild(self, settings: type[_Settings]) -> _Settings:
        """Make the trainer's settings again.

        Raises:
            ConfigError: If they are not those of such a trainer.
        """
        try:
            return TypeAdapter(settings).validate_python(self.settings)
        except ValidationError as error:
            raise ConfigError(
                f"{self.path / CONFIG} does not hold the settings of the trainer of {self.problem}:"
                " name another folder"
            ) from error


class RunFolder:
    """A folder that belongs to one configuration.

    Args:
        path: The folder; it is made when the run begins.
        problem: For which problem a policy is trained.
        settings: All settings of the trainer, a dataclass.
        scenario: Contents of the scenario.

    Raises:
        ConfigError: If the folder holds a run with another configuration.
        OutputError: If it cannot be written.

    Attributes:
        path: The folder.
        saved: What the checkpoint holds, in words; empty without one.
    """

    def __init__(
        self, path: Path, problem: str, settings: Any, scenario: Mapping[str, Any]
    ) -> None:
        self.path, self.problem = path, problem
        self.configuration = configuration(settings, scenario)
        self.saved = ""
        if (path / CONFIG).exists() or (path / CHECKPOINT).exists():
            self._require_same(StoredRun.read(path))
        require_writable(path)

    @classmethod
    def stored(cls, run: StoredRun) -> Self:
        """Open a run to read what it has found, whatever has changed since."""
        folder = cls.__new__(cls)
        folder.path, folder.problem, folder.saved = run.path, run.problem, ""
        folder.configuration = run.configuration
        return folder

    def _require_same(self, stored: StoredRun) -> None:
        if stored.problem != self.problem:
            raise ConfigError(
                f"{self.path} holds a run of problem {stored.problem}, and this is one of"
                f" {self.problem}: give another --out"
            )
        found = differences(stored.configuration, self.configuration)
        if found:
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({name_some(found)}): give"
                " another --out, or what it was begun with to go on"
            )

    def begin(self) -> dict[str, Any] | None:
        """Write the configuration of a new run, or read the checkpoint of one that was begun.

        Returns:
            What `save` was given last, in today's format; None for a new run.

        Raises:
            ConfigError: If the checkpoint is broken or another run's.
            OutputError: If the folder cannot be written.
        """
        if (self.path / CHECKPOINT).exists():
            content = read_checkpoint(self.path, self.configuration)
            self.saved = str(content.get("progress", ""))
            if content["format"] == format_2.FORMAT:
                with restoring(self.path):
                    return format_2.upgraded(self.problem, content)
            return content
        if not (self.path / CONFIG).exists():
            described = {
                "format": FORMAT,
                "problem": self.problem,
                **self.configuration,
                "started_at_git_revision": _git_revision(),
            }
            write_whole({self.path / CONFIG: (json.dumps(described, indent=2) + "\n").encode()})
        return None

    def save(self, progress: str, content: Mapping[str, Any]) -> None:
        """Write the checkpoint whole or not at all.

        Args:
            progress: How far it is, in words.
            content: Tensors, numbers, text, lists and dictionaries.

        Raises:
            OutputError: If it cannot be written; the one before is untouched.
        """
        draft = io.BytesIO()
        torch.save(
            {
                "format": FORMAT,
                "configuration": digest(self.configuration),
                "progress": progress,
                **content,
            },
            draft,
        )
        before = self._checkpoint_version()
        try:
            write_whole({self.path / CHECKPOINT: draft.getvalue()})
        finally:
            # Ctrl-C may come when the new one has taken its place, but nobody has said so yet
            if self._checkpoint_version() != before:
                self.saved = progress

    def _checkpoint_version(self) -> tuple[int, int] | None:
        """What tells one checkpoint from another; None without one."""
        try:
            found = (self.path / CHECKPOINT).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    @contextmanager
    def tensorboard(self, next_step: int) -> Iterator[SummaryWriter]:
        """Open the log; what an interrupted sitting wrote from `next_step` on is put aside."""
        folder = self.path / "tensorboard"
        try:
            writer = SummaryWriter(str(folder), purge_step=next_step)
            try:
                yield writer
            finally:
                writer.close()
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(unwritable(folder, error)) from error


def configuration(settings: Any, scenario: Mapping[str, Any]) -> dict[str, Any]:
    """Put together all that a run's result depends on, as JSON holds it.

    Args:
        settings: Of the trainer, a dataclass.
        scenario: Its contents.
    """
    made = {
        "settings": {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)},
        "scenario": dict(scenario),
        "files": {name: _file_digest(Path(name)) for name in _named_files(scenario)},
        "versions": {
            "servegym": servegym.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
            "torch": torch.__version__,
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(_plain(made)))
    return plain


def differences(stored: Any, got: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """Compare configurations.

    Returns:
        Where they differ: the setting's name, its stored value and the one that was given.
    """
    if isinstance(stored, dict) and isinstance(got, dict):
        found = []
        for key in [*stored, *(k for k in got if k not in stored)]:
            below = f"{place}.{key}" if place and place != "settings" else str(key)
            found += differences(stored.get(key, _NOT_SET), got.get(key, _NOT_SET), below)
        return found
    if isinstance(stored, list) and isinstance(got, list) and len(stored) == len(got):
        if any(isinstance(x, dict) for x in stored):
            pairs = enumerate(zip(stored, got, strict=True))
            return [d for i, pair in pairs for d in differences(*pair, f"{place}.{i}")]
    return [] if stored == got else [(place, stored, got)]


def name_some(found: list[tuple[str, Any, Any]]) -> str:
    """Name the first differences in words."""
    words = [f"{name} is {_short(old)} there, {_short(new)} here" for name, old, new in found]
    if len(words) > _MOST_NAMED:
        words[_MOST_NAMED:] = [f"and {len(words) - _MOST_NAMED} more"]
    return "; ".join(words)


def read_checkpoint(path: Path, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a run has saved; no code in it is ever run.

    Args:
        path: The run's folder.
        configuration: Its configuration.

    Raises:
        ConfigError: If there is none, or it is broken, or another run's.
    """
    file = path / CHECKPOINT
    try:
        content: Any = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{path} has no {CHECKPOINT} yet: train first") from None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} is broken: delete it to start anew") from error
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, format_2.FORMAT):
        raise ConfigError(f"{file} is no checkpoint of this version: delete it to start anew")
    if content.get("configuration") != digest(configuration):
        raise ConfigError(
            f"{file} was not made by the run that {CONFIG} beside it describes: delete it to start"
            " anew"
        )
    return content


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is taken apart into one sentence.

    Raises:
        ConfigError: If something is missing in it, or has another shape or type.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else "holds what does not fit"
        raise ConfigError(f"{path / CHECKPOINT} {what}: delete it to start anew") from error


def digest(configuration: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a configuration."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Turn settings into what JSON knows."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _named_files(content: Any) -> Iterator[str]:
    """Find the files that a scenario names."""
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        if isinstance(value, str):
            if key in _FILE_KEYS and Path(value).is_file():
                yield value
        elif isinstance(value, Mapping | list | tuple):
            yield from _named_files(value)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = value if value == _NOT_SET else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _git_revision() -> str:
    """Revision of the folder the run was started in, which need not be servegym's."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
