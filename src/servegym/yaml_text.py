"""YAML in which no key stands twice: of two values the first would be lost in silence."""

from __future__ import annotations

from typing import Any

import yaml

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
    try:
        return yaml.load(text, Loader=_FastLoader)
    except yaml.YAMLError:  # the parser in Python says better what is wrong, and where
        return yaml.load(text, Loader=_Loader)
