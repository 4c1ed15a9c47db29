"""Scenario files: the bundled ones, one's own, and what is said of a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from servegym.documents import load_yaml
from servegym.errors import ConfigError, unknown_name

_M = TypeVar("_M", bound=BaseModel)


def bundled_names(folder: str) -> list[str]:
    """Names of the bundled files in a folder of `assets`."""
    files = resources.files("servegym.assets").joinpath(folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith("yaml"))


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
    file = resources.files("servegym.assets").joinpath(folder, f"{text}.yaml")
    return parse(file.read_text(encoding="utf-8"), text, model)


def parse(text: str, origin: str, model: type[_M]) -> _M:
    """Check YAML text; `origin` names it in errors.

    Raises:
        ConfigError: If a key or value in it is not allowed.
    """
    data = _read_yaml(text, origin)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {one_sentence(error, data, model)}") from error


def _read_yaml(text: str, origin: str) -> Mapping[str, Any]:
    """Read keys and values; `origin` names them in errors."""
    try:
        data = load_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line}: not YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{origin} must hold keys and values, such as name, fleet and workload")
    return data


def one_sentence(error: ValidationError, data: Any, root: type[BaseModel]) -> str:
    """Say what is wrong with the data of a model: where, what was got, and what is allowed."""
    # an unknown key explains a missing one; of the choices of a union, the one that got furthest
    first = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    place = _place(first, data)
    models = _models_at(first["loc"], root)
    if first["type"].startswith("union_tag"):
        kinds = [m.model_fields["kind"].default for m in models]
        if "tag" in first["ctx"]:
            return f"{place}: {unknown_name('kind', first['ctx']['tag'], kinds)}"
        return f"{place}.kind is missing: choose one of {', '.join(kinds)}"
    if first["type"] == "extra_forbidden":
        keys = sorted({key for m in models for key in m.model_fields})
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": choose one of {', '.join(keys)}"
        return f"unknown key {place}{hint}"
    message = str(first.get("ctx", {}).get("error", first["msg"]))
    got = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r}"
    return f"{place}: {message[0].lower()}{message[1:]}{got}"


def _place(error: ErrorDetails, data: Any) -> str:
    """Join the keys to an error's place, without pydantic's names for the choices of a union."""
    keys: list[str] = []
    for key in error["loc"]:
        known = key in data if isinstance(data, Mapping) else isinstance(key, int)
        if known:
            data = data[key]
        if known or (error["type"] == "missing" and key == error["loc"][-1]):
            keys.append(str(key))
    return ".".join(keys)


def _models_at(loc: tuple[int | str, ...], root: type[BaseModel]) -> list[type[BaseModel]]:
    """Models that the innermost mapping on the way to a place can be."""
    models: list[type[BaseModel]] = [root]
    for key in loc:
        fields = [m.model_fields[key] for m in models if key in m.model_fields]
        inner = [found for field in fields for found in _models_in(field.annotation)]
        kinds = {m.model_fields["kind"].default: m for m in models if "kind" in m.model_fields}
        models = inner or ([kinds[key]] if key in kinds else models)
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]
