"""How simulator code is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

_F = TypeVar("_F", bound=Callable[..., object])

#: Kernels only read and write arrays that their caller owns. Without Numba's runtime (`_nrt`) no
#: reference counts are kept for them; with it, atomic counting took 95 % of a run's time.
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}


def kernel(function: _F) -> _F:
    """Compile a function for the simulator's hot path, cached on disk, without holding the GIL.

    Integers reach kernels as int64 only: each further combination of integer widths would be
    compiled anew, and compiling is what a first run waits for.
    """
    compiled: _F = njit(**OPTIONS)(function)
    return compiled


def inlined(function: _F) -> _F:
    """Compile a function into each of its callers.

    A call that takes the whole state passes every array by value, some 250 words: without
    inlining, a run takes 6 times as long.
    """
    compiled: _F = njit(**OPTIONS, forceinline=True)(function)
    return compiled
