"""Scenario files: the bundled ones, and one's own."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import TypeVar, cast

from pydantic import BaseModel

from servegym.documents import checked, read_mapping
from servegym.errors import ConfigError, unknown_name

_M = TypeVar("_M", bound=BaseModel)


def bundled_names(folder: str) -> list[str]:
    """Names of the bundled files in a folder of `assets`."""
    return list(_names(folder))


@cache
def _names(folder: str) -> tuple[str, ...]:
    files = resources.files("servegym.assets").joinpath(folder).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith("yaml")))


def load(name_or_path: str | Path, folder: str, kind: str, model: type[_M]) -> _M:
    """Load a bundled file by name, or one of the user's own by its path.

    Args:
        name_or_path: A path ends in `.yaml` or `.yml`.
        folder: Of `assets`, with the bundled ones.
        kind: What one of them is called.
        model: What it holds.

    Raises:
        ConfigError: If there is none, or a key or value in it is not allowed.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"no scenario file at {text}")
        try:
            return parse(path.read_text(encoding="utf-8"), text, model)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{text} is not UTF-8 text") from error
    names = bundled_names(folder)
    if text not in names:
        message = unknown_name(kind, text, names)
        also = " Or" if message.endswith("?") else ", or"
        raise ConfigError(f"{message}{also} give a .yaml file")
    return cast("_M", _bundled(text, folder, model))


@cache
def _bundled(name: str, folder: str, model: type[BaseModel]) -> BaseModel:
    """Read a bundled file once: all of them are read to tell of which problem a name is."""
    file = resources.files("servegym.assets").joinpath(folder, f"{name}.yaml")
    return parse(file.read_text(encoding="utf-8"), name, model)


def parse(text: str, origin: str, model: type[_M]) -> _M:
    """Check YAML text; `origin` names it in errors.

    Raises:
        ConfigError: If a key or value in it is not allowed.
    """
    return checked(read_mapping(text, origin, "name, fleet and workload"), origin, model)
