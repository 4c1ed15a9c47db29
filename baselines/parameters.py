"""Parameters of a rule as they are written behind its name: `eta=0.5,weight=0.1`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping

from servegym.errors import ConfigError, unknown_name

_DEFAULT_BOUNDS = (0.0, 1e9)


def read_parameters(
    name: str,
    factory: Callable[..., object],
    given: str,
    bounds: Mapping[str, tuple[float, float]],
) -> dict[str, float]:
    """Read the parameters of a rule.

    Args:
        name: The rule's name.
        factory: Its function, whose arguments are the parameters.
        given: `"key=number,key=number"`, or nothing.
        bounds: `(low, high)` of the parameters that are not just any number of at least 0.

    Returns:
        The given values by parameter.

    Raises:
        ConfigError: If a parameter is unknown or given twice, or a value is not allowed.
    """
    known = inspect.signature(factory).parameters
    values: dict[str, float] = {}
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise ConfigError(
                unknown_name(f"parameter of {name}", key, known)
                if known
                else f"{name} has no parameters, got {key!r}"
            )
        if key in values:
            raise ConfigError(f"parameter {key} of {name} must be given once, got {given!r}")
        values[key] = _number(name, key, value, bounds.get(key, _DEFAULT_BOUNDS))
    return values


def _number(name: str, key: str, text: str, bounds: tuple[float, float]) -> float:
    low, high = bounds
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(
            f"parameter {key} of {name} must be a number from {low:g} to {high:g}, got {text!r}"
        )
    return value
