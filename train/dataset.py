"""Reading Minari data sets of dispatchers, as learners take them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from servegym.errors import ConfigError
from servegym.policy.contract import SCHEMA_VERSION
from servegym.typing import BoolArray, Float32Array, FloatArray, IntArray

#: Folder of Minari's files within that of a data set.
DATA = "data"
#: Key of what servegym says in a data set's metadata, and namespace of its name.
NAME = "servegym"


class Decisions(NamedTuple):
    """All decisions of a data set, and what was seen after each; N rows, one an observation.

    Episodes stand one after the other, each with the observation of its end: row n + 1 is what was
    seen after the decision of row n.

    Attributes:
        replicas: Raw, `float32[N, R, F]`.
        request: Raw, `float32[N, G]`.
        mask: 1 where allowed, `float32[N, A]`.
        action: `int64[N]`; 0 in rows of ends.
        reward: Of the action, `float64[N]`.
        dt_s: Simulated seconds from the decision to the next observation, `float64[N]`.
        decided: Whether a decision was taken there, `bool[N]`: false at ends.
        terminal: Whether the episode ended with the decision, `bool[N]`.
    """

    replicas: Float32Array
    request: Float32Array
    mask: Float32Array
    action: IntArray
    reward: FloatArray
    dt_s: FloatArray
    decided: BoolArray
    terminal: BoolArray


class DataSet:
    """A data set that `servegym record` has written.

    Args:
        folder: Its folder.

    Attributes:
        about: What servegym says of it; see `docs/standards.md`.

    Raises:
        ConfigError: If there is none, it was recorded otherwise, or Minari is missing.
    """

    def __init__(self, folder: Path) -> None:
        minari = minari_library()
        self.folder = folder
        try:
            self.minari = minari.MinariDataset(folder.absolute() / DATA)
        except (ValueError, OSError, KeyError) as error:
            raise ConfigError(
                f"{folder} is no data set ({error}): make one with servegym record"
            ) from error
        self.about: dict[str, Any] = self.minari.storage.metadata.get(NAME, {})
        if self.about.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"{folder} was not recorded by servegym record with observations of schema"
                f" {SCHEMA_VERSION}: record it again"
            )

    @property
    def extended(self) -> bool:
        """Whether what a router infers is in the observations, too."""
        return bool(self.about["settings"]["features"] == "extended")

    @property
    def num_extra(self) -> int:
        """Actions beside the replicas."""
        space: Any = self.minari.observation_space
        return int(space["action_mask"].shape[0] - space["replicas"].shape[0])

    def digest(self) -> str:
        """Return the SHA-256 of the files with the episodes."""
        found = hashlib.sha256()
        for path in sorted((self.folder / DATA).glob("*.hdf5")):
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()

    def decisions(self) -> Decisions:
        """Read all episodes."""
        parts = [_decisions_of(episode) for episode in self.minari.iterate_episodes()]
        return Decisions(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _decisions_of(episode: Any) -> Decisions:
    seen = episode.observations
    decided = np.ones(len(seen["request"]), np.bool_)
    decided[-1] = False
    return Decisions(
        seen["replicas"],
        seen["request"],
        seen["action_mask"].astype(np.float32),
        _before_end(episode.actions),
        _before_end(episode.rewards),
        _before_end(episode.infos["dt_s"][1:]),
        decided,
        _before_end(episode.terminations),
    )


def _before_end(values: Any) -> Any:
    """Give the row of the end a 0, too."""
    return np.pad(values, (0, 1))


def minari_library() -> Any:
    """Import Minari, or say what to install.

    Raises:
        ConfigError: If it is missing.
    """
    try:
        import h5py  # noqa: F401  # Minari asks for it late
        import minari
    except ImportError as error:
        raise ConfigError(
            f"data sets need {error.name}: pip install -e '.[offline]' in a checkout of servegym"
        ) from error
    return minari
