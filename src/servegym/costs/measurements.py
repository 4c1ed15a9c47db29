"""Measured times of one operator, for fits and checks."""

from __future__ import annotations

from dataclasses import dataclass

from servegym.costs.forms import Operator
from servegym.typing import BoolArray, FloatArray


@dataclass(frozen=True)
class Measurements:
    """Times of one operator on one GPU.

    Attributes:
        operator: Its shapes.
        seconds: Measured, `float64[N]`.
        held_out: What no fit may see, `bool[N]`.
        source: Of the measurements.
    """

    operator: Operator
    seconds: FloatArray
    held_out: BoolArray
    source: str
