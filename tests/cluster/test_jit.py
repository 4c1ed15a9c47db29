"""Functions that only kernels call, called from elsewhere."""

from __future__ import annotations

import pytest
from numba import types

from servegym.cluster.jit import helper, inlined, kernel


@helper
def halve(x):
    return x // 2


@inlined
def twice_halved(x):
    return halve(halve(x))


@kernel
def compiled(x):
    return twice_halved(x)


@pytest.mark.parametrize("function", [halve, twice_halved])
def test_what_only_kernels_call_runs_uncompiled_from_python(function):
    # it has no wrapper: to call its machine code from here would end the process
    assert function(40) == function.py_func(40)


def test_kernels_call_its_machine_code():
    assert compiled(40) == 10
    assert compiled.signatures


def test_compiled_or_not_it_runs_as_written_from_python():
    halve.compile((types.int64,))
    assert halve.signatures
    assert halve(40) == 20
