"""Numbers in the cells of a trace, as they are written there and not as they could be meant."""

from __future__ import annotations

import math
import re

from servegym.errors import WorkloadError

# narrower than float(), which also takes 1_000, nan and digits of other scripts
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_MAYBE_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:\.000)+")


def number(where: str, column: str, value: object) -> float:
    """Return a cell as a number; it may be infinite or NaN where the file says so by type.

    Raises:
        WorkloadError: If it is none, as with thousands separators.
    """
    if isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 2**1000:
            return float(value)
        return math.inf if value > 0 else -math.inf
    text = str(value).strip()
    if not _NUMBER.fullmatch(text):
        raise WorkloadError(f"{where}, column {column}: {value!r} is not a number")
    return float(text)


def finite(where: str, column: str, value: object) -> float:
    """Return a cell as a finite number.

    Raises:
        WorkloadError: If it is none.
    """
    found = number(where, column, value)
    if not math.isfinite(found):
        raise WorkloadError(f"{where}, column {column}: {value!r} is not a finite number")
    return found


def whole(where: str, column: str, value: object, low: int, high: int) -> int:
    """Return a cell as a whole number from `low` to `high`.

    Raises:
        WorkloadError: If it is none, or may be a thousand times what it seems.
    """
    found = number(where, column, value)
    if not (low <= found <= high and found == int(found)):
        raise WorkloadError(
            f"{where}, column {column}: {value!r} must be a whole number from {low} to {high}"
        )
    if isinstance(value, str) and _MAYBE_THOUSANDS.fullmatch(value.strip()):
        raise WorkloadError(
            f"{where}, column {column}: {value!r} may mean thousands: write whole numbers without"
            " separators"
        )
    return int(found)
