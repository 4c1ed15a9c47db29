"""JSON as clients and engines write it."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json


def parse_json(text: bytes) -> Any:
    """Parse JSON as Python's `json` does, about three times as fast.

    The fast parser refuses some of what `json` takes, such as lone surrogates and deep nesting:
    what it refuses is read by `json`, whose word is the last.

    Raises:
        ValueError: If it is not JSON, or nested too deeply.
    """
    try:
        return from_json(text)
    except ValueError:
        pass
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
