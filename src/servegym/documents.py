"""JSON and YAML texts in which no key is given twice: the parsers' own keep the last in silence."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import yaml

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
