"""A step cost as a file that needs nothing but NumPy to read."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np

from servegym.costs.grid import CostGrid
from servegym.errors import ConfigError
from servegym.whole_files import write_whole


def save_grid(grid: CostGrid, path: Path) -> None:
    """Write a step cost as `.npz`."""
    content = io.BytesIO()
    np.savez(content, **asdict(grid))
    write_whole({path: content.getvalue()})


def load_grid(path: Path) -> CostGrid:
    """Read a step cost that `save_grid` wrote.

    Raises:
        ConfigError: If the file is missing or is none.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        numbers = {name: float(array) for name, array in arrays.items() if array.ndim == 0}
        return CostGrid(**arrays | numbers)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(f"{path} is not a step cost of servegym: {error}") from error
