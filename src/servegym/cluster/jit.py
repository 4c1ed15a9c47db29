"""How simulator code is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

from servegym.cluster.by_reference import pass_by_reference
from servegym.cluster.state import Params, State

pass_by_reference(Params)
pass_by_reference(State)

_F = TypeVar("_F", bound=Callable[..., object])

#: Kernels only read and write arrays that their caller owns. Without Numba's runtime (`_nrt`) no
#: reference counts are kept for them; with it, atomic counting took 95 % of a run's time.
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}
#: Functions that only kernels call need no wrappers, which are most of what would be compiled.
_NO_WRAPPERS: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def kernel(function: _F) -> _F:
    """Compile a function for the simulator's hot path, cached on disk, without holding the GIL.

    Integers reach kernels as int64 only: each further combination of integer widths would be
    compiled anew, and compiling is what a first run waits for.
    """
    compiled: _F = njit(**OPTIONS)(function)
    return compiled


def helper(function: _F) -> _F:
    """Compile a function that only kernels call.

    Params and State reach it by reference (`cluster.by_reference`), so a call costs little.
    """
    compiled: _F = njit(**OPTIONS, **_NO_WRAPPERS)(function)
    return compiled


def inlined(function: _F) -> _F:
    """Compile a small or hot function, which only kernels call, into each of its callers."""
    compiled: _F = njit(**OPTIONS, **_NO_WRAPPERS, forceinline=True)(function)
    return compiled
