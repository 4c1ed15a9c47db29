"""YAML in which no key stands twice: of two values the first would be lost in silence."""

from __future__ import annotations

from typing import Any

import yaml

#: What opens a collection within a line. The parser in C ends the process where a few ten
#: thousand are open, so it gets no text that could have so many.
_OPENING = ("[", "{", "- ", "? ")
_MAX_FAST_DEPTH = 5_000
_MERGE = "tag:yaml.org,2002:merge"


class _NoKeyTwice:
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
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)  # type: ignore[misc]


class _Loader(_NoKeyTwice, yaml.SafeLoader):
    pass


class _FastLoader(_NoKeyTwice, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


def load_yaml(text: str) -> Any:
    """Read a YAML document with plain values only.

    Args:
        text: The document.

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
