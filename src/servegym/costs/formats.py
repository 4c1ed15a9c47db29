"""Number formats of weights and activations by the names that users write.

`bf16`; `fp8`: scales of activations computed with every call; `fp8-static`: held by the checkpoint,
one a tensor; `fp8-block`: computed for 128 activations, with a scale a block of 128 x 128 weights;
`fp4`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from servegym.costs.source import Scales
from servegym.errors import ConfigError, unknown_name

#: Those that a scenario may ask for.
ScenarioFormat = Literal["bf16", "fp8", "fp8-static", "fp8-block"]


class NumberFormat(NamedTuple):
    """What `StepCost` takes: fp8 or not, fp4 or not, scales of activations in fp8."""

    fp8: bool = False
    fp4: bool = False
    scales: Scales = "dynamic"


FORMATS = {
    "bf16": NumberFormat(),
    "fp8": NumberFormat(fp8=True),
    "fp8-static": NumberFormat(fp8=True, scales="static"),
    "fp8-block": NumberFormat(fp8=True, scales="block"),
    "fp4": NumberFormat(fp4=True),
}


def number_format(precision: str) -> NumberFormat:
    """Look a number format up.

    Raises:
        ConfigError: If there is none of that name.
    """
    if precision not in FORMATS:
        raise ConfigError(unknown_name("precision", precision, FORMATS))
    return FORMATS[precision]
