"""What an agent sees of a batch: raw or normalised, in parts or as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from servegym.typing import Float32Array

#: By unit: up to where the normalised view is about linear, and where it ends at 1.
SCALES = {
    "s": (1e-3, 1e4),
    "tokens": (1.0, 1e7),
    "tokens/s": (1.0, 1e7),
    "blocks": (1.0, 1e6),
    "requests/s": (1e-2, 1e4),
    "requests": (1.0, 1e4),
    "replicas": (1.0, 1e4),
    "jobs": (1.0, 1e4),
    "stages": (1.0, 1e4),
    "-": (1e-2, 1e4),
}


class Column(Protocol):
    """One number of an observation, as the contract states it."""

    @property
    def name(self) -> str:
        """Name of the feature."""
        ...

    @property
    def low(self) -> float:
        """Least value in the unit."""
        ...

    @property
    def high(self) -> float:
        """Greatest value in the unit."""
        ...

    @property
    def unit(self) -> str:
        """Unit as the tables write it, `-` for none."""
        ...

    @property
    def meaning(self) -> str:
        """What it says."""
        ...


def column_table(columns: Sequence[Column], heading: str, first: int = 0) -> str:
    """Render columns as a Markdown table; `heading` says what one is called, `first` its number."""
    rows = [f"| Num | {heading} | Min | Max | Unit | Meaning |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {i} | `{c.name}` | {c.low:g} | {c.high:g} | {c.unit} | {c.meaning} |"
        for i, c in enumerate(columns, first)
    ]
    return "\n".join(rows)


class Table:
    """Raw numbers of one kind, `float32[..., columns]`: their bounds and their normalised form.

    A column within 0 to 1 stays as it is. Any other becomes
    `sign(x) * log(1 + |x| / unit) / log(1 + top / unit)`, clipped to -1 to 1, with `unit` and `top`
    from `SCALES`.

    Args:
        columns: What the last axis holds.
        shape: Of one environment's numbers.

    Attributes:
        size: How many columns there are.
    """

    def __init__(self, columns: Sequence[Column], shape: tuple[int, ...]) -> None:
        # absent rows are 0
        self._low = np.array([min(c.low, 0.0) for c in columns], np.float32)
        self._high = np.array([c.high for c in columns], np.float32)
        self._shape = shape
        self.size = len(columns)
        self._share = np.array([c.low >= 0 and c.high <= 1 for c in columns])
        scales = np.array([SCALES[c.unit] for c in columns])
        self._unit = scales[:, 0].astype(np.float32)
        self._top = np.log1p(scales[:, 1] / scales[:, 0]).astype(np.float32)

    def space(self, normalise: bool) -> spaces.Box:
        """Space of one environment's numbers."""
        low, high = self._low, self._high
        if normalise:
            low, high = np.sign(low), np.ones_like(high)
        return spaces.Box(
            np.broadcast_to(low, self._shape), np.broadcast_to(high, self._shape), dtype=np.float32
        )

    def normalised(self, raw: Float32Array) -> Float32Array:
        """Return raw numbers within -1 to 1."""
        scaled = np.sign(raw) * np.log1p(np.abs(raw) / self._unit) / self._top
        return np.where(self._share, raw, np.clip(scaled, -1.0, 1.0))


class Observer:
    """Makes what agents observe: a `Dict` with the mask, or with `flat` one vector without it.

    Args:
        tables: Numbers, by name.
        others: Spaces of what else is seen, by name.
        num_actions: Length of the mask.
        normalise: Whether tables are shown normalised, else raw.
        flat: Whether all is one vector, without the mask.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        others: Mapping[str, spaces.Space[Any]],
        num_actions: int,
        *,
        normalise: bool,
        flat: bool,
    ) -> None:
        self._tables = tables if normalise else {}
        self._flat = flat
        parts = {name: table.space(normalise) for name, table in tables.items()} | dict(others)
        self.space: spaces.Space[Any]
        if flat:
            ends = [_ends(space) for space in parts.values()]
            low, high = (np.concatenate(end) for end in zip(*ends, strict=True))
            self.space = spaces.Box(low, high, dtype=np.float32)
        else:
            self.space = spaces.Dict({**parts, "action_mask": spaces.MultiBinary(num_actions)})

    def __call__(self, parts: Mapping[str, NDArray[Any]]) -> Any:
        """Return fresh arrays with all environments' observations.

        Args:
            parts: Raw arrays by name, in the order of the space, the mask last.
        """
        seen = {
            name: self._tables[name].normalised(part) if name in self._tables else part.copy()
            for name, part in parts.items()
        }
        if not self._flat:
            return seen
        del seen["action_mask"]
        rows = [part.reshape(len(part), -1) for part in seen.values()]
        return np.concatenate(rows, axis=1, dtype=np.float32, casting="unsafe")


def _ends(space: spaces.Space[Any]) -> tuple[Float32Array, Float32Array]:
    if isinstance(space, spaces.Box):
        low, high = space.low, space.high
    elif isinstance(space, spaces.Discrete):
        low, high = np.zeros(1), np.full(1, space.n - 1)
    else:
        low, high = np.zeros(space.shape or ()), np.ones(space.shape or ())
    return low.astype(np.float32).ravel(), high.astype(np.float32).ravel()
