"""JSON and YAML texts, read strictly, and what is said of a wrong one.

No key is given twice: the parsers' own keep the last in silence.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from servegym.errors import ConfigError, unknown_name

_M = TypeVar("_M", bound=BaseModel)

#: What opens a collection within a line. The parser in C ends the process where a few ten
#: thousand are open, so it gets no text that could have so many.
_OPENING = ("[", "{", "- ", "? ")
_MAX_FAST_DEPTH = 5_000
_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|.*:.*")
_MERGE = "tag:yaml.org,2002:merge"


class RepeatedKey(ValueError):
    """Raised when an object has a key twice."""


def load_json(text: str) -> Any:
    """Parse JSON in which no object has a key twice.

    Raises:
        ValueError: If it is not JSON, nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def without_nan(value: Any) -> Any:
    """Return plain data with null for the numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise RepeatedKey(f"the key {key!r} is given twice")
    return found


class _OneMeaning:
    """Part of a loader; what it refuses it refuses as the parser does, with the place."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[attr-defined]
            try:
                known = key in seen
            except TypeError:
                break  # no key at all: the loader itself says so
            if known:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)  # type: ignore[misc]


class _Loader(_OneMeaning, yaml.SafeLoader):
    pass


class _FastLoader(_OneMeaning, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


def _number(loader: Any, node: Any) -> int | float:
    """Read a number; 010 is eight and 1:30 ninety to some, and not to those who write them."""
    if _AMBIGUOUS.fullmatch(node.value):
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value} is no plain decimal number", node.start_mark
        )
    kind = node.tag.rpartition(":")[2]
    found: int | float = getattr(loader, f"construct_yaml_{kind}")(node)
    return found


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    yaml.add_constructor(_tag, _number, _Loader)
    yaml.add_constructor(_tag, _number, _FastLoader)


def load_yaml(text: str) -> Any:
    """Parse YAML with plain values only.

    Raises:
        yaml.YAMLError: If it is not YAML, or a mapping has a key twice.
    """
    if sum(map(text.count, _OPENING)) < _MAX_FAST_DEPTH:
        try:
            return yaml.load(text, Loader=_FastLoader)
        except (yaml.YAMLError, ValueError, OverflowError):
            pass  # the parser in Python says better what is wrong, and where
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, no such date
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def read_mapping(text: str, origin: str, such_as: str) -> Mapping[str, Any]:
    """Read YAML of keys and values.

    Args:
        text: The YAML.
        origin: Names it in errors.
        such_as: Some of the keys, as the end of a sentence.

    Raises:
        ConfigError: If it is not YAML, or something else.
    """
    try:
        data = load_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line}: not YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{origin} must hold keys and values, such as {such_as}")
    return data


def checked(data: object, origin: str, model: type[_M]) -> _M:
    """Make a model of data; `origin` names them in errors.

    Raises:
        ConfigError: If a key or value is not allowed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {one_sentence(error, data, model)}") from error


def one_sentence(
    error: ValidationError, data: Any, root: type[BaseModel], *, by_name: bool = False
) -> str:
    """Say what is wrong with the data of a model: where, what was got, and what is allowed.

    Args:
        error: What the model said.
        data: What it was to be made of.
        root: The model.
        by_name: Whether entries of lists are called by their `name`, else by their number.
    """
    # an unknown key explains a missing one; of the choices of a union, the one that got furthest
    first = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    place = _place(first, data, by_name)
    models = _models_at(first["loc"], root)
    if first["type"].startswith("union_tag"):
        kinds = [m.model_fields["kind"].default for m in models]
        if "tag" in first["ctx"]:
            return f"{place}: {unknown_name('kind', first['ctx']['tag'], kinds)}"
        return f"{place}.kind is missing: choose one of {', '.join(kinds)}"
    if first["type"] == "extra_forbidden":
        keys = sorted({field.alias or key for m in models for key, field in m.model_fields.items()})
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": choose one of {', '.join(keys)}"
        return f"unknown key {place}{hint}"
    message = str(first.get("ctx", {}).get("error", first["msg"]))
    if not place:
        return message
    value = first["input"]
    long = isinstance(value, Mapping) or (isinstance(value, list) and len(repr(value)) > 60)
    got = "" if long else f", got {value!r}"
    return f"{place}: {message[0].lower()}{message[1:]}{got}"


def _place(error: ErrorDetails, data: Any, by_name: bool) -> str:
    """Join the keys to an error's place, without pydantic's names for the choices of a union."""
    keys: list[str] = []
    for key in error["loc"]:
        listed = isinstance(data, list | tuple) and isinstance(key, int) and key < len(data)
        known = listed or (isinstance(data, Mapping) and key in data)
        if known:
            data = data[key]
        if known or (error["type"] == "missing" and key == error["loc"][-1]):
            entry = by_name and listed and isinstance(data, Mapping)
            keys.append(str(data.get("name", key) if entry else key))
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
