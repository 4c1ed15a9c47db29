"""JSON and YAML that say one thing: of a key given twice, other readers take the last."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml

_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|.*:.*")


class RepeatedKey(ValueError):
    """Raised when an object has a key twice."""


def load_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is not JSON, nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_yaml(text: str) -> Any:
    """Parse YAML with plain values only.

    Raises:
        yaml.YAMLError: If it is not YAML, nested too deeply, a mapping has a key twice, or a value
            is a number of thousands of digits or no date.
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader that is stricter
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise RepeatedKey(f"the key {key!r} is given twice")
    return found


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses what the specification forbids, or readers take differently."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Read a number; 010 is eight and 1:30 ninety to some, and not to those who write them."""
        if _AMBIGUOUS.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} is no plain decimal number", node.start_mark
            )
        kind = node.tag.rpartition(":")[2]
        found: int | float = getattr(self, f"construct_yaml_{kind}")(node)
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        # before merge keys (<<) are unfolded: what they bring may be overridden
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
