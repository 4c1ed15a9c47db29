"""What changed between two results of `servegym bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from servegym.documents import load_json
from servegym.errors import ConfigError
from servegym.whole_files import write_whole


class Change(NamedTuple):
    """One measurement before and after.

    Attributes:
        name: Of the measurement.
        before: Median.
        after: Median.
        verdict: `"better"` or `"worse"` if the ranges from least to most do not meet, `"within the
            spread"` if they do, `"measured once"` if one of them has no spread.
    """

    name: str
    before: float
    after: float
    verdict: str


def flatten(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Name every measurement of a result, those per size as `name @ size`."""
    found: dict[str, dict[str, float]] = {}
    for key, value in result.items():
        if "median" in value:
            found[key] = value
        else:
            found |= {f"{key} @ {size}": spread for size, spread in value.items()}
    return found


def read_result(path: Path) -> dict[str, Any]:
    """Read what `servegym bench --json` wrote.

    Raises:
        ConfigError: If it is something else.
    """
    try:
        result: dict[str, Any] = load_json(path.read_text(encoding="utf-8"))
        for spread in flatten(result).values():
            float(spread["median"] + spread["min"] + spread["max"] + spread["repetitions"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no result to compare with ({type(error).__name__}): give a file that "
            "`servegym bench --json` wrote"
        ) from None
    return result


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Compare the measurements that two results share."""
    old, new = flatten(before), flatten(after)
    return [
        Change(name, old[name]["median"], new[name]["median"], _verdict(name, old[name], new[name]))
        for name in new
        if name in old
    ]


def _verdict(name: str, old: Mapping[str, float], new: Mapping[str, float]) -> str:
    if min(old["repetitions"], new["repetitions"]) < 2:
        return "measured once"
    if old["min"] <= new["max"] and new["min"] <= old["max"]:
        return "within the spread"
    less = new["max"] < old["min"]
    return "better" if less == is_cost(name) else "worse"


def is_cost(name: str) -> bool:
    """Whether less of a measurement is better: times and growth are, rates are not."""
    return "_per_s" not in name


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result for `read_result`."""
    write_whole({path: (json.dumps(result, indent=1) + "\n").encode()})
