"""How simulator code is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit, typeof
from numba.core.registry import CPUDispatcher
from numba.core.typeinfer import register_dispatcher

from servegym.cluster.by_reference import pass_by_reference
from servegym.cluster.compile_notice import install
from servegym.cluster.kernel_cache import KernelCache, cache_of
from servegym.cluster.state import Params, State

pass_by_reference(Params)
pass_by_reference(State)

_F = TypeVar("_F", bound=Callable[..., object])

#: Kernels only read and write arrays that their caller owns. Without Numba's runtime (`_nrt`) no
#: reference counts are kept for them; with it, atomic counting took 95 % of a run's time.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}

#: Of functions that only kernels call: wrappers for Python and C would take most of their time.
_INTERNAL: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

#: Says on standard error when kernels are compiled; there is one in a process.
NOTICE = install(lambda dispatcher: isinstance(getattr(dispatcher, "_cache", None), KernelCache))


def compiled(function: _F, signature: Any = None, **options: Any) -> _F:
    """Compile a function with Numba, cached on disk wherever there is a place for it.

    Args:
        function: What to compile.
        signature: Compile for these types at once, and for no others; else at the first call.
        options: Numba's.
    """
    dispatcher: Any = njit(**options)(function)
    # in place of `cache=True`, which fails on a read-only file system
    dispatcher._cache = cache_of(function, NOTICE.not_kept)
    if signature is not None and isinstance(dispatcher, CPUDispatcher):
        with register_dispatcher(dispatcher):
            dispatcher.compile(signature)
        dispatcher.disable_compile()
    made: _F = dispatcher
    return made


def kernel(function: _F) -> _F:
    """Compile a function for the simulator's hot path, cached on disk, without holding the GIL.

    Integers reach kernels as int64 only: each further combination of integer widths would be
    compiled anew, and compiling is what a first run waits for.
    """
    return compiled(function, **OPTIONS)


class _Internal(CPUDispatcher):
    """A function that only kernels call; from Python it runs uncompiled, as it is written."""

    def __call__(self, *values: Any) -> Any:
        return self.py_func(*values)


def _internal(function: _F, **options: Any) -> _F:
    made: Any = compiled(function, **OPTIONS, **_INTERNAL, **options)
    if isinstance(made, CPUDispatcher):  # unless Numba is told to compile nothing
        made.__class__ = _Internal  # there is no wrapper that Numba's own call could go through
    internal: _F = made
    return internal


def helper(function: _F) -> _F:
    """Compile a function that only kernels call.

    Params and State reach it by reference, so a call costs no more than any other.
    """
    return _internal(function)


def inlined(function: _F) -> _F:
    """Compile a small or hot function, which only kernels call, into each of its callers."""
    return _internal(function, forceinline=True)


_fixed: dict[Any, Callable[..., Any]] = {}


def fixed(function: _F, *arguments: object) -> _F:
    """Return a kernel's compiled form for arguments of these types, which must always be theirs.

    Numba looks at the types of all arguments at every call, which takes 6 us with a simulator's
    arrays among them. What this returns looks at nothing: other types, or arrays that are not
    contiguous, would be read as what they are not.

    Args:
        function: Made by `kernel`.
        arguments: What it will be called with.
    """
    made = _fixed.get(function)
    if made is None:
        made = function
        if isinstance(function, CPUDispatcher):
            types = tuple(typeof(argument) for argument in arguments)
            function.compile(types)
            result: Any = function.overloads[types]
            made = result.entry_point
        _fixed[function] = made
    return cast("_F", made)
