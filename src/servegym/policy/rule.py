"""How a dispatch rule is compiled, so that one simulation loop serves them all."""

from __future__ import annotations

from collections.abc import Callable

from numba import typeof, types

from servegym.cluster.jit import OPTIONS, compiled
from servegym.policy.policy import Decide

#: `decide(replicas[F, R], request[G], mask[R + 2], params[p], memory[m], rng[1]) -> action`.
SIGNATURE = types.int64(
    types.float64[:, ::1],
    types.float64[::1],
    types.boolean[::1],
    types.float64[::1],
    types.float64[::1],
    types.uint64[::1],
)


def rule(function: Callable[..., int]) -> Decide:
    """Compile a dispatch rule with the signature every rule shares (cached on disk)."""
    made: Decide = compiled(function, SIGNATURE)
    return made


def compile_for_rules(
    function: Callable[..., int], example: tuple[object, ...], *, num_rules: int = 1
) -> Callable[..., int]:
    """Compile a kernel whose first arguments are rules, for arguments like `example`.

    The rule is typed as a function address, so one compilation serves all rules.

    Args:
        function: `function(decide, *arguments) -> int64`.
        example: Arguments of the types it will be called with, without the rules.
        num_rules: How many rules stand before them.
    """
    signature = types.int64(*[types.FunctionType(SIGNATURE)] * num_rules, *map(typeof, example))
    return compiled(function, signature, **OPTIONS)
